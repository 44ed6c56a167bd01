"""A trained verifier at work: a model that grades attempts (pascaline/data/puzzles/grade.py), and the best of n by its grades against the
majority vote at equal tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pascaline.data.puzzles import Problem, Verdict, grade
from pascaline.engine import Engine, Output, Sampling
from pascaline.engine.vote import said
from pascaline.eval import passk
from pascaline.eval.honesty import auc
from pascaline.eval.tasks import Result
from pascaline.post.verifiers import judge

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
        return said(self.output) if self.output else None


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
        """Of attempts, each asked about as a problem of the puzzle grade:PUZZLE; what is asked twice is computed once."""
        engine, own = self.engine, self.engine.tokenizer
        assert own is not None
        engine.flush()  # the tokens computed are then the same in a run that was interrupted
        prompts = {text: own.prompt_ids(text) for text in dict.fromkeys(problem.prompt for problem in problems)}
        asked = [text for text, ids in prompts.items() if len(ids) < engine.model.config.max_position_embeddings]
        answers = engine.generate([prompts[text] for text in asked], Sampling(0.0, 1.0, self.max_tokens)) if asked else []
        outputs = {text: output for text, (output,) in zip(asked, answers, strict=True)}
        chances = self._chances([(text, prompts[text], output) for text, output in outputs.items() if said(output)])
        found = []
        for problem in problems:
            output = outputs.get(problem.prompt)
            tokens = len(prompts[problem.prompt]) + len(output.token_ids) if output else 0
            found.append(Grade(problem, output, chances.get(problem.prompt, 0.0), tokens))
        return found

    def _chances(self, finished: Sequence[tuple[str, list[int], Output]]) -> dict[str, float]:
        """The scores. The likeliest tokens are asked for where the grade begins only: at every token they would fill the memory."""
        begins: dict[int, bool] = {}  # whether a token begins RIGHT, as found so far
        own, places = self.engine.tokenizer, []
        assert own is not None
        for _, prompt, output in finished:
            first = len(output.token_ids)
            while first and (own.thought(prompt, output.token_ids[:first])[1] or "").strip():
                first -= 1  # until what is said behind the thought is gone, whatever gap the template puts there
            places.append(prompt + output.token_ids[:first])
        found = self.engine.generate(places, Sampling(0.0, 1.0, 1, top_logprobs=TOP)) if places else []
        chances = {}
        for (text, _, _), (first_token,) in zip(finished, found, strict=True):
            for token, _ in first_token.top_logprobs[0]:
                if token not in begins:
                    piece = own.decode([token]).strip()
                    begins[token] = bool(piece) and grade.RIGHT.startswith(piece)
            chances[text] = min(sum(math.exp(p) for token, p in first_token.top_logprobs[0] if begins[token]), 1.0)
        return chances


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
    asked = [g.problem for g in grades]
    outputs = [[g.output or Output([], [], "length")] for g in grades]
    real = np.array([row[0] is Verdict.RIGHT for row in judge(asked, outputs).verdicts])
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
    prompts and outputs of their grades, where the same is asked twice once only. m: the most answers that cost no more without grades. `k`
    is the largest for which there are m answers, None where a grade costs more than all answers; there stand the differences, paired by
    problem. `points` and `majority` are the two curves, at `counts` too.
    """
    ballots, right = result.ballots(), result.right
    places = [(i, j) for i, row in enumerate(ballots) for j, ballot in enumerate(row) if ballot is not None]
    grades = grader.grades([attempt(result.problems[i], result.outputs[i][j]) for i, j in places])
    scores = np.full(right.shape, -np.inf)
    for place, given in zip(places, grades, strict=True):
        scores[place] = given.score
    count, n = right.shape
    answer = sum(len(o.token_ids) for group in result.outputs for o in group) / n  # tokens of one answer to each problem
    times = Counter((i, given.problem.prompt) for (i, _), given in zip(places, grades, strict=True))
    costs = {(i, given.problem.prompt): given.tokens for (i, _), given in zip(places, grades, strict=True)}

    def grading(k: int) -> float:
        """Tokens of the grades of k answers to each problem: a grade's, times the chance that it is needed."""
        return float(passk.pass_at_k(n, list(times.values()), k) @ np.array(list(costs.values()))) if times else 0.0

    equal = {k: m for k in range(1, n + 1) if (m := affordable(k, answer, grading(k))) <= n}
    most = max(equal, default=None)

    def best(k: int) -> np.ndarray:
        return passk.best_by_problem(scores.tolist(), right.tolist(), k)

    def vote(k: int) -> np.ndarray:
        return passk.majority_by_problem(ballots, right.tolist(), k)

    def curve(worth: Callable[[int], np.ndarray], extra: Callable[[int], float], own: int | None) -> list[dict[str, Any]]:
        return [{"k": k, "tokens": (sum(prompts) + k * answer + extra(k)) / count, "accuracy": float(worth(k).mean())}
                for k in sorted({*counts, *([own] if own else [])})]  # fmt: skip

    return {
        "n": count, "pass_1": float(right.mean()), **quality(grades, [i for i, _ in places]),
        "auc": auc([(given.score, bool(right[place])) for place, given in zip(places, grades, strict=True)]),
        "answer_tokens": answer / count, "grade_tokens": sum(g.tokens for g in grades) / len(grades) if grades else None,
        "points": curve(best, grading, most), "majority": curve(vote, lambda k: 0.0, equal[most] if most else None),
        "k": most, **({"m": equal[most], **_differences(best(most), vote(equal[most]), right.mean(1), most)} if most else {}),
    }  # fmt: skip


def affordable(k: int, answer: float, grades: float) -> int:
    """How many answers cost no more than k answers and their grades, in tokens. The prompt's are the same on both sides."""
    return k + math.floor(grades / answer + 1e-9)  # a sum that is whole must not lose one to rounding


def _differences(best: np.ndarray, vote: np.ndarray, once: np.ndarray, k: int) -> dict[str, Any]:
    """One value a problem each. The best of 1 is pass@1, and then there is nothing to estimate."""
    pairs = {"over_majority": (best, vote), **({"over_once": (best, once)} if k > 1 else {}), "majority_over_once": (vote, once)}
    gains = {name: dict(zip(("gain", "low", "high"), passk.paired_difference(a, b), strict=True)) for name, (a, b) in pairs.items()}
    return {"best_k": float(best.mean()), "maj_m": float(vote.mean()), **gains}
