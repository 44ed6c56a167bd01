"""A trained verifier at work: a model that grades attempts (pascaline/data/puzzles/grade.py), and the best of n by its grades against the
majority vote at equal tokens.

Shapes: P problems, n answers each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pascaline.data.puzzles import Problem, Verdict, grade
from pascaline.engine import Engine, Output, Sampling
from pascaline.eval import passk
from pascaline.eval.honesty import auc
from pascaline.eval.tasks import Result
from pascaline.post.verifiers import judge
from pascaline.recipe import Recipe
from pascaline.tables import GRADE

TOP = 64  # likeliest tokens among which the beginnings of RIGHT are looked for


@dataclass(frozen=True)
class Grade:
    """What a grader said of an attempt. output: None where the attempt leaves no room in its context; score: the probability, as the
    model gives it, that behind the thought it had the grade begins as RIGHT does, and 0 where it came to no grade; tokens: of its prompt
    and its output together."""

    problem: Problem
    output: Output | None
    score: float
    tokens: int

    @property
    def said(self) -> str | None:
        """The grade; None where it came to none."""
        done = self.output is not None and self.output.finish_reason == "stop"
        return (self.output.text.strip() or None) if self.output is not None and done else None


class Grader:
    """Grades attempts greedily, so that one has the same grade whenever it is asked for. The engine is loaded when it is needed first.

    Also a judge for the engine's best of n: vote(engine, p.prompt, k=8, judge=lambda _, output: grader.score(p, output))."""

    def __init__(self, load: Callable[[], Engine], max_tokens: int):
        """max_tokens: of a grade with its thought."""
        self._load, self.max_tokens = load, max_tokens
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        self._engine = self._engine or self._load()
        return self._engine

    def score(self, problem: Problem, output: Output) -> float:
        """Of one attempt, in 0..1."""
        return self.grades([attempt(problem, output)])[0].score

    def grades(self, problems: Sequence[Problem]) -> list[Grade]:
        """Of attempts, each asked about as a problem of the puzzle grade:PUZZLE."""
        engine, own = self.engine, self.engine.tokenizer
        assert own is not None
        engine.flush()  # the tokens computed are then the same in a run that was interrupted
        prompts = [own.prompt_ids(problem.prompt) for problem in problems]
        room = int(engine.model.config.max_position_embeddings)
        asked = [ids for ids in prompts if len(ids) < room]
        outputs = iter(engine.generate(asked, Sampling(0.0, 1.0, self.max_tokens, top_logprobs=TOP)) if asked else [])
        found, begins = [], dict[int, bool]()
        for problem, ids in zip(problems, prompts, strict=True):
            output = next(outputs)[0] if len(ids) < room else None
            score = self._chance(ids, output, begins) if output else 0.0
            found.append(Grade(problem, output, score, len(ids) + len(output.token_ids) if output else 0))
        return found

    def _chance(self, prompt: Sequence[int], output: Output, begins: dict[int, bool]) -> float:
        """The score of a grade. begins: whether a token begins RIGHT, as found so far."""
        own = self.engine.tokenizer
        assert own is not None
        if output.finish_reason != "stop" or not output.text.strip():
            return 0.0
        first = len(output.token_ids)
        while first and (own.thought(prompt, output.token_ids[:first])[1] or "").strip():
            first -= 1  # until what is said behind the thought is gone, whatever gap the template puts there
        chance = 0.0
        for token, logprob in output.top_logprobs[first]:
            if token not in begins:
                piece = own.decode([token]).strip()
                begins[token] = bool(piece) and grade.RIGHT.startswith(piece)
            chance += math.exp(logprob) * begins[token]
        return min(chance, 1.0)


def attempt(problem: Problem, output: Output) -> Problem:
    """The problem of grading an answer."""
    return grade.ask(problem, output.reasoning or "", output.text)


# ---- how good the grades are -----------------------------------------------------------------------------------------


def quality(grades: Sequence[Grade], places: Sequence[int]) -> dict[str, Any]:
    """places: of each grade, the problem's index. Shares over all attempts, a missing grade counting as wrong:

    - real: the grade is exactly what the puzzle finds, with its interval (problems are the clusters); verdict: it is right about whether
      there is a fault at all; named: of the attempts with a fault, those where the fault it names is real; sound: attempts without a fault,
      which "right" always would score in `real` and `verdict`;
    - brier: mean of (score - whether there is no fault)^2; missing: attempts without a finished grade. None without an attempt.
    """
    keys = ("real", "real_low", "real_high", "verdict", "named", "sound", "brier", "missing")
    if not grades:
        return {"attempts": 0, **dict.fromkeys(keys)}
    asked = [grade.problem for grade in grades]
    said = [[g.output] if g.output else [Output([], [], "length")] for g in grades]
    real = np.array([row[0] is Verdict.RIGHT for row in judge(asked, said).verdicts])
    truth = judge(asked, [[Output([], [], "stop", grade.RIGHT)] for _ in asked]).verdicts
    sound = np.array([row[0] is Verdict.RIGHT for row in truth])
    given = [g.said for g in grades]
    verdict = np.array([word is not None and (word == grade.RIGHT) == fine for word, fine in zip(given, sound, strict=True)])
    own = np.array(places)
    mean, low, high = passk.mean_interval([real[own == i].mean() for i in np.unique(own)])
    scores = np.array([g.score for g in grades])
    values = (mean, low, high, verdict.mean(), real[~sound].mean() if (~sound).any() else None, sound.mean(),
              ((scores - sound) ** 2).mean(), np.mean([word is None for word in given]))  # fmt: skip
    return {"attempts": len(grades), **{key: None if v is None else float(v) for key, v in zip(keys, values, strict=True)}}


def measured(engine: Engine, problems: Sequence[Problem], max_tokens: int) -> dict[str, Any]:
    """A grader on held-out problems of a puzzle grade:PUZZLE."""
    return quality(Grader(lambda: engine, max_tokens).grades(problems), range(len(problems)))


# ---- the best by its grades --------------------------------------------------------------------------------------------


def best_of(result: Result, prompts: Sequence[int], grader: Grader, counts: Sequence[int]) -> dict[str, Any]:
    """The best of k answers by the grader's scores, against the majority among as many answers as cost no more. prompts: the tokens of
    each problem's, computed once for all its answers.

    Every answer that votes is graded; the others score lowest. T(k), the tokens a problem takes on average: its prompt, k answers, and the
    prompts and outputs of their grades. m: the most answers that cost no more without grades. `k` is the largest for which there are m
    answers, None where a grade costs more than all answers; there stand the differences, paired by problem. `points` and `majority` are the
    two curves, at `counts` too.
    """
    ballots, right = result.ballots(), result.right
    places = [(i, j) for i, row in enumerate(ballots) for j, ballot in enumerate(row) if ballot is not None]
    grades = grader.grades([attempt(result.problems[i], result.outputs[i][j]) for i, j in places])
    scores = np.full(right.shape, -np.inf)
    for place, given in zip(places, grades, strict=True):
        scores[place] = given.score
    said, graded = sum(len(o.token_ids) for group in result.outputs for o in group), sum(g.tokens for g in grades)
    count, n = right.shape
    equal = {k: m for k in range(1, n + 1) if (m := affordable(k, said, graded)) <= n}
    most = max(equal, default=None)

    def best(k: int) -> np.ndarray:
        return passk.best_by_problem(scores.tolist(), right.tolist(), k)

    def vote(k: int) -> np.ndarray:
        return passk.majority_by_problem(ballots, right.tolist(), k)

    def curve(worth: Callable[[int], np.ndarray], each: int, own: int | None) -> list[dict[str, Any]]:
        """each: tokens of all n answers."""
        return [{"k": k, "tokens": (sum(prompts) + k * each / n) / count, "accuracy": float(worth(k).mean())}
                for k in sorted({*counts, *([own] if own else [])})]  # fmt: skip

    return {
        "n": count, "pass_1": float(right.mean()), **quality(grades, [i for i, _ in places]),
        "auc": auc([(given.score, bool(right[place])) for place, given in zip(places, grades, strict=True)]),
        "answer_tokens": said / right.size, "grade_tokens": graded / len(grades) if grades else None,
        "points": curve(best, said + graded, most), "majority": curve(vote, said, equal[most] if most else None),
        "k": most, **({} if most is None else {"m": equal[most], **_differences(best(most), vote(equal[most]), right.mean(1))}),
    }  # fmt: skip


def affordable(k: int, answers: int, grades: int) -> int:
    """How many answers cost no more than k answers with their grades; both: tokens of all n. The prompt's are the same on both sides."""
    return k * (answers + grades) // answers


def _differences(best: np.ndarray, vote: np.ndarray, once: np.ndarray) -> dict[str, Any]:
    """[P] each."""
    pairs = {"over_majority": (best, vote), "over_once": (best, once), "majority_over_once": (vote, once)}
    gains = {name: dict(zip(("gain", "low", "high"), passk.paired_difference(a, b), strict=True)) for name, (a, b) in pairs.items()}
    return {"best_k": float(best.mean()), "maj_m": float(vote.mean()), **gains}


# ---- the report --------------------------------------------------------------------------------------------------------


def table(recipe: Recipe, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What report.json holds of graders: `graders`, each on held-out attempts of the puzzle's own, and `rows`, what a model's answers came
    to by the grades of `grader`. parts: the evaluation's pieces by name; {} in a chain without."""
    own = [{"grader": name, "puzzle": puzzle.removeprefix(GRADE), **parts[f"{name}.{puzzle}"]}
           for name in recipe.graders for puzzle in recipe.attempts]  # fmt: skip
    rows = [{"model": name, "puzzle": puzzle, **found["grader"]} for name in recipe.talkers for i, puzzle in enumerate(recipe.eval.puzzles)
            if "grader" in (found := parts[f"{name}.{puzzle}-votes" if i else f"{name}.votes"])]  # fmt: skip
    return {"grader": recipe.eval.grader, "graders": own, "rows": rows} if own or rows else {}
