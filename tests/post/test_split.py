"""No problem that is asked in the evaluation is met in training, in whichever stage, by construction and by this test."""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Trace
from pascaline.engine import Engine
from pascaline.eval import tasks
from pascaline.post import evaluation, stages
from pascaline.post.rollout import Rollouts
from pascaline.post.sft import puzzle_chats
from pascaline.recipe import Recipe, load

RECIPES = Path(__file__).parent.parent.parent / "recipes"


def asked(recipe: Recipe) -> list[Problem]:
    """Every problem of the evaluation."""
    plan = recipe.eval
    found = tasks.held_out(plan.puzzles, recipe.puzzles, plan.problems, evaluation.SEED)
    assert all(len(problems) == len({p.key for p in problems}) == plan.problems for problems in found.values())
    return [problem for problems in found.values() for problem in problems]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Problem]]:
    """Every training problem that anybody draws while the test runs."""
    found: list[Problem] = []
    draw = puzzles.problems

    def recorded(name: str, count: int, seed: int, held_out: bool, **dials: Any) -> list[Problem]:
        problems = draw(name, count, seed, held_out, **dials)
        if not held_out:
            found.extend(problems)
        return problems

    monkeypatch.setattr(puzzles, "problems", recorded)
    yield found


@pytest.mark.parametrize("name", ["tiny", "laptop", "extend"])
def test_training_never_draws_a_held_out_problem(
    name: str, drawn: list[Problem], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(RECIPES / f"{name}.toml")
    for puzzle in recipe.puzzles:  # what is drawn matters here, not what is written about it
        monkeypatch.setattr(puzzles.get(puzzle), "trace", lambda problem, rng, **_: Trace("", problem.key))
    counts = []
    for _ in stages._texts(recipe, lambda _: None, tmp_path):
        pass
    counts.append(len(drawn))
    deque(puzzle_chats(recipe.puzzles, recipe.seed), maxlen=0)
    counts.append(len(drawn))
    rollouts = Rollouts(Engine(tiny_model()), recipe.rl, recipe.puzzles, recipe.seed)
    for step in range(recipe.rl.steps):
        rollouts.problems(step)
    tables = recipe.puzzles.values()
    assert counts == [sum(t.traces for t in tables), sum(t.traces + t.examples for t in tables)]
    assert len(drawn) == counts[1] + recipe.rl.steps * recipe.rl.prompts
    questions = asked(recipe)
    assert not {p.key for p in questions} & {p.key for p in drawn}
    assert not {p.prompt for p in questions} & {p.prompt for p in drawn}
    assert all(puzzles.held_out(p.key) for p in questions)


def test_no_question_of_the_evaluation_stands_in_the_corpus(tiny_run: Path) -> None:
    recipe = load(tiny_run / "recipe.toml")
    lines = (tiny_run / "01-corpus" / "documents.jsonl").read_text().splitlines()
    texts = "\n".join(json.loads(line)["text"] for line in lines)
    assert len(lines) > 800 and "Make " in texts and "Start with " in texts
    assert not [p.prompt for p in asked(recipe) if p.prompt in texts]
    chats = "\n".join(message["content"] for chat in puzzle_chats(recipe.puzzles, recipe.seed) for message in chat.messages)
    assert "Make " in chats and not [p.prompt for p in asked(recipe) if p.prompt in chats]


def test_rollout_problems_are_spread_over_the_puzzles_and_differ_by_step_and_seed() -> None:
    recipe = load(RECIPES / "tiny.toml", {"rl.puzzles": ["countdown", "chain"], "rl.prompts": 5})
    engine = Engine(tiny_model())
    rollouts = Rollouts(engine, recipe.rl, recipe.puzzles, 1)
    first = rollouts.problems(0)
    assert [p.puzzle for p in first] == ["countdown"] * 3 + ["chain"] * 2
    assert rollouts.problems(0) == first == Rollouts(engine, recipe.rl, recipe.puzzles, 1).problems(0)
    assert rollouts.problems(1) != first != Rollouts(engine, recipe.rl, recipe.puzzles, 2).problems(0)


def test_sft_problems_are_other_draws_than_the_corpus(drawn: list[Problem], tiny_run: Path) -> None:
    recipe = load(RECIPES / "tiny.toml")
    deque(puzzle_chats(recipe.puzzles, recipe.seed), maxlen=0)
    chats = [p.key for p in drawn]
    corpus = [puzzles.problems(n, t.examples, recipe.seed, held_out=False, **t.dials) for n, t in recipe.puzzles.items()]
    assert chats != [p.key for problems in corpus for p in problems]
