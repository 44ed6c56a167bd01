"""The table of a chain: a row a stage, what it does on each puzzle, how it answers, what it cost. R1's Dev1/Dev2/Dev3 (arXiv 2501.12948v2,
table 3) in the small."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pascaline.engine import Engine
from pascaline.eval.passk import mean_interval
from pascaline.eval.tasks import Result
from pascaline.ledger import COST
from pascaline.post.environments.episode import whole
from pascaline.post.reward import RewardModel
from pascaline.post.stage import Run
from pascaline.post.verifiers import scores
from pascaline.recipe import Recipe
from pascaline.tables import GRADE
from pascaline.train.loop import forward_flops

STYLE = ("format", "language")  # verifiers whose mean score stands in the table


def judge(run: Run) -> RewardModel | None:
    """The reward model of the chain, which says of token ids (prompt and answer) how good the answer is; None in a chain without one."""
    name = next((stage for stage in run.recipe.chain if run.recipe.judges(stage)), None)
    if name is None:
        return None
    return RewardModel.load(run.folder(name))


def measured(engine: Engine, result: Result, judge: RewardModel | None) -> dict[str, Any]:
    """Of a model's answers: the mean score of each verifier of STYLE, length, and `worth`: for each problem how good the first answer
    is, by the reward model, which has spent `judge_flops` on it, or, without one, 1 where it is right."""
    own = engine.tokenizer
    assert own is not None
    each = [(problem, output) for problem, group in zip(result.problems, result.outputs, strict=True) for output in group]
    style = {name: scores(name, [p for p, _ in each], [o for _, o in each])[0] for name in STYLE}
    if judge:
        first = [whole(own.prompt_ids(p.prompt), group[0]) for p, group in zip(result.problems, result.outputs, strict=True)]
        worth = [float(score) for score in judge.scores(first)]
        spent = {"judge_flops": forward_flops(judge.model, sum(map(len, first)))}
    else:
        worth, spent = result.right[:, 0].astype(float).tolist(), {}
    lengths = [len(output.token_ids) for _, output in each]
    return {
        **{name: float(np.mean([s or 0.0 for s in found])) for name, found in style.items()},
        "mean_tokens": float(np.mean(lengths)), "worth": worth, **spent,
    }  # fmt: skip


def table(recipe: Recipe, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What report.json holds of it, beside what the stages cost. parts: the evaluation's pieces by name.

    pass_1 from `samples` answers a problem on the first puzzle and one on the others; pass_k and maj_k of k answers to vote_problems
    problems; win_rate: share of those problems on which the stage's first answer is worth more than that of the first stage that
    answers, ties half, with its 95 % interval.
    """
    plan, first = recipe.eval, recipe.talkers[0]
    found, k = [], 1
    for name in recipe.talkers:
        votes = {puzzle: parts[f"{name}.{puzzle}-votes" if i else f"{name}.votes"] for i, puzzle in enumerate(plan.puzzles)}
        against = [parts[f"{first}.{puzzle}-votes" if i else f"{first}.votes"]["worth"] for i, puzzle in enumerate(plan.puzzles)]
        once = {puzzle: parts[f"{name}.{puzzle}" if i else f"{name}.t{plan.temperature:g}"] for i, puzzle in enumerate(plan.puzzles)}
        at, k = max((i, k) for i, k in enumerate(votes[plan.puzzles[0]]["k"]) if k <= 16)
        puzzles = {
            puzzle: {"pass_1": once[puzzle]["accuracy"], "pass_k": vote["best_of"][at], "maj_k": vote["majority"][at]}
            for puzzle, vote in votes.items()
        }
        pairs = [(a, b) for vote, other in zip(votes.values(), against, strict=True) for a, b in zip(vote["worth"], other, strict=True)]
        wins, low, high = mean_interval([(a > b) + 0.5 * (a == b) for a, b in pairs])
        means = {key: float(np.mean([vote[key] for vote in votes.values()])) for key in (*STYLE, "mean_tokens")}
        beaten = {} if name == first else {"win_rate": wins, "win_low": low, "win_high": high}
        found.append({"stage": name, "puzzles": puzzles, **means, **beaten})
    judged = next((stage for stage in recipe.chain if recipe.judges(stage)), None)
    return {"k": k, "against": first, "judge": judged, "n": plan.vote_problems, "rows": found}


def graded(recipe: Recipe, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What report.json holds of graders: `graders`, each on held-out attempts of the puzzle's own, and `rows`, what a model's answers came
    to by the grades of `grader`. parts: the evaluation's pieces by name; {} in a chain without."""
    own = [{"grader": name, "puzzle": puzzle.removeprefix(GRADE), **{k: v for k, v in parts[f"{name}.{puzzle}"].items() if k not in COST}}
           for name in recipe.graders for puzzle in recipe.attempts]  # fmt: skip
    rows = [{"model": name, "puzzle": puzzle, **found["grader"]} for name in recipe.talkers for i, puzzle in enumerate(recipe.eval.puzzles)
            if "grader" in (found := parts[f"{name}.{puzzle}-votes" if i else f"{name}.votes"])]  # fmt: skip
    return {"grader": recipe.eval.grader, "graders": own, "rows": rows} if own or rows else {}
