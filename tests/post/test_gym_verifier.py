"""The verifier `gym`: reasoning-gym's scorers in processes that can be killed."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from reasoning_gym import create_dataset

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output
from pascaline.errors import BadInput
from pascaline.post.verifiers import get, gym, judge

FAMILIES = ["advanced_geometry", "calendar_arithmetic", "chain_sum", "cryptarithm", "game_of_life", "jugs", "rearc", "tower_of_hanoi"]


def asked(problems: list[Problem], completions: list[str]) -> list[float | None]:
    data = [json.loads(json.dumps(problem.data)) for problem in problems]  # as from a file
    columns: dict[str, list[Any]] = {name: [one[name] for one in data] for name in data[0]}
    return get("gym")(prompts=[p.prompt for p in problems], completions=completions, completion_ids=[[]] * len(problems), **columns)


def test_its_scores_are_the_librarys_own_where_these_are_full_pay() -> None:
    problems, answers, expected = [], [], []
    for family in FAMILIES:
        drawn = puzzles.problems(f"gym:{family}", 3, 2, held_out=True)
        for i, problem in enumerate(drawn):
            dataset = create_dataset(family, seed=problem.data["seed"], size=5)  # a fresh one; tuples and dates as it made them
            for answer in (problem.data["answer"], drawn[i - 1].data["answer"], "", "1", problem.data["answer"][:-1]):
                problems.append(problem)
                answers.append(answer)
                expected.append(float(dataset.score_answer(answer, dataset[0]) == 1))
    assert asked(problems, answers) == expected
    assert 24 <= sum(expected) < len(expected) / 2


def test_thoughts_are_no_part_of_the_answer() -> None:
    problem = puzzles.problems("gym:chain_sum", 1, 0, held_out=False)[0]
    right = problem.data["answer"]
    said = [f"<think>carry the one</think>{right}", f"<think>{right}", f"<think>{right}</think>", f"<think>0</think>{right}\n", right]
    assert asked([problem] * 5, said) == [1.0, 0.0, 0.0, 1.0, 1.0]


def test_a_problem_of_the_gym_is_judged_by_it() -> None:
    problems = puzzles.problems("gym:gcd", 2, 0, held_out=False, max_value=100)
    outputs = [[Output([1], [0.0], "stop", text, None) for text in (p.data["answer"], "none", f"{p.data['answer']}0")] for p in problems]
    assert judge(problems, outputs).verdicts == [[Verdict.RIGHT, Verdict.WRONG, Verdict.WRONG]] * 2


def test_digits_of_other_scripts_are_wrong_though_the_library_reads_them() -> None:
    problem = puzzles.problems("gym:chain_sum", 1, 0, held_out=False)[0]
    right = problem.data["answer"]
    wide = right.translate({ord("0") + i: 0xFF10 + i for i in range(10)})
    dataset = create_dataset("chain_sum", size=1, seed=problem.data["seed"], **problem.data["config"])
    assert dataset.score_answer(wide, dataset[0]) == 1  # the defect
    assert asked([problem] * 2, [right, wide]) == [1.0, 0.0]


def test_questions_that_differ_in_case_only_are_one_problem() -> None:
    """sentence_reordering writes the same words with and without a capital; both sides of the split had them."""
    keys = [p.key for p in puzzles.problems("gym:sentence_reordering", 20, 0, held_out=False)]
    assert keys == [key.casefold() for key in keys]


def test_what_runs_out_of_time_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "TIMEOUT", 0.05)  # less than importing reasoning-gym takes
    problem = puzzles.problems("gym:chain_sum", 1, 0, held_out=False)[0]
    assert asked([problem], [problem.data["answer"]]) == [None]


def test_data_that_names_a_refused_family_is_refused_and_not_judged() -> None:
    problem = puzzles.problems("gym:chain_sum", 1, 0, held_out=False)[0]
    forged = Problem("file", "", "", {**problem.data, "family": "n_queens"}, "gym")
    with pytest.raises(BadInput, match="gym:n_queens' is refused"):
        asked([forged], ["[]"])
    with pytest.raises(BadInput, match="needs a column family"):
        get("gym")(prompts=[""], completions=[""], completion_ids=[[]], answer=["1"])


def test_its_processes_do_not_load_torch() -> None:
    program = "import sys, pascaline.data.puzzles.gym; print('torch' in sys.modules, 'reasoning_gym' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "False False\n"
