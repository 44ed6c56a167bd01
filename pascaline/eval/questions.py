"""The task of every family of problems: ask each several times, judge the answers, and tell what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict, collection, plain
from pascaline.engine import Engine, Output, Sampling
from pascaline.engine.request import Request
from pascaline.errors import BadInput
from pascaline.eval import passk, suite
from pascaline.eval.plan import Plan, measured
from pascaline.eval.tasks import Result, said
from pascaline.post.verifiers import closed, judge
from pascaline.post.verifiers.numbers import integer_reading, reading

EXAMPLES = 3  # answers that are kept to be read
READINGS = {"integer": integer_reading, "expression": reading}  # verifier: how it reads an answer
Watch = Callable[[int, int], None]


def questions(engine: Engine, plan: Plan, watch: Watch) -> dict[str, Any]:
    """A measurement: pass@1 as the mean over problems of the share of right answers, and beside it

    - by_k: for k = 1, 2, 4, ... samples pass@k, unbiased, and the majority vote of k, each with its interval;
    - tokens, tokens_right, tokens_wrong: mean length of all answers, of the right and of the others;
    - abstain, false_claim, truncated, unclosed, unjudged (tasks.Result.summary), too_long: share of problems that do not fit the context;
    - constant: what it would earn to give always the most frequent right answer; None where no right answer is known.
    """
    problems = suite.problems(plan)
    outputs = ask(engine, problems, plan, watch)
    judged = judge(problems, outputs)
    result = Result(problems, outputs, judged.verdicts, judged.trouble)
    told = result.summary()
    facts: dict[str, Any] = {key: told[key] for key in ("abstain", "false_claim", "truncated", "unclosed", "unjudged")}
    facts |= _tokens(result)
    return measured(
        result.means,
        [p.key for p in problems],
        by_k=by_k(result),
        **facts,
        too_long=float(np.mean([not any(o.token_ids for o in group) for group in outputs])),
        constant=constant(problems),
        trouble=result.trouble,
        examples=_examples(result),
    )


# ---- asking ----------------------------------------------------------------------------------------------------------


def ask(engine: Engine, problems: Sequence[Problem], plan: Plan, watch: Watch) -> list[list[Output]]:
    """plan.samples answers to each problem. A problem's samples depend on it and the plan's seed, not on which others are asked too.

    One that does not fit the model's context is not asked: its answers are cut off before the first token. watch is called at every
    step of the engine.
    """
    own, room = engine.tokenizer, engine.model.config.max_position_embeddings
    if own is None:
        raise BadInput(f"task '{plan.label}' asks in words, and this engine has no tokenizer.")
    groups: list[list[Request]] = []
    for problem in problems:
        ids = [*own.prefix, *own.encode(plain_prompt(problem, plan))] if plan.plain else own.prompt_ids(messages(problem, plan))
        sampling = Sampling(plan.temperature, plan.top_p, plan.max_tokens, plan.samples, seed=seed_of(plan.seed, problem.key))
        groups.append(engine.add(ids, sampling) if len(ids) < room else [])
    asked = [request for group in groups for request in group]
    try:
        _answered(engine, asked, len(problems), watch)
    finally:
        for request in asked:
            engine.cancel(request)
    missing = Output([], [], "length")
    outputs = [[r.output for r in group if r.output is not None] or [missing] * plan.samples for group in groups]
    return [[read_plain(o) for o in group] for group in outputs] if plan.plain else outputs


def _answered(engine: Engine, asked: Sequence[Request], problems: int, watch: Watch) -> None:
    ended = 0
    for request in asked:
        while request.output is None:
            ended += sum(r.finish_reason is not None for r in engine.step())
            watch(min(ended * problems // len(asked), problems - 1), problems)
    watch(problems, problems)


def seed_of(seed: int, key: str) -> int:
    """Of a problem's samples."""
    return int.from_bytes(blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), "big")


def messages(problem: Problem, plan: Plan) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": plan.system}] if plan.system else []
    return [*system, {"role": "user", "content": problem.prompt}]


def plain_prompt(problem: Problem, plan: Plan) -> str:
    return "".join(plain.prompt(part) for part in (plan.system, problem.prompt) if part)


def read_plain(output: Output) -> Output:
    """What a base model wrote, as thought and answer."""
    thought, answer = plain.split(output.text)
    return replace(output, text=answer or "", reasoning=thought)


# ---- telling ---------------------------------------------------------------------------------------------------------


def by_k(result: Result) -> list[dict[str, Any]]:
    """For k = 1, 2, 4, ... and all samples. Problems with fewer judged answers than k are left out of pass@k; who has no vote counts
    against the majority."""
    samples = len(result.outputs[0])
    counts = [1 << i for i in range(samples.bit_length()) if 1 << i < samples] + [samples]
    ballots, right, drawn = result.ballots(canonical), result.right, result.judged.sum(1)
    found = []
    for k in counts:
        enough = drawn >= k
        row: dict[str, Any] = {"k": k, "n": int(enough.sum())}
        best = passk.pass_at_k(drawn[enough], right.sum(1)[enough], k)
        votes = passk.majority_by_problem(ballots, right.tolist(), k)[drawn > 0]
        for name, values in (("pass", best), ("majority", votes)):
            row[name], row[f"{name}_low"], row[f"{name}_high"] = passk.mean_interval(values) if len(values) else (None, None, None)
        found.append(row)
    return found


def canonical(problem: Problem, text: str) -> Hashable | None:
    """What an answer votes for: the number that it says, where the verifier judges numbers (7, 7.0 and "7 eggs" are one answer); else its
    text."""
    value = READINGS[problem.verifier](text) if problem.verifier in READINGS else None
    return said(problem, text) if value is None else f"= {value}"


def gold(problem: Problem) -> str | None:
    """A right answer, if one is known."""
    if problem.puzzle not in suite.FILES:
        return puzzles.get(problem.puzzle).solve(problem)
    try:
        return collection.trace(problem).answer
    except BadInput:  # the file gives none
        return None


def constant(problems: Sequence[Problem]) -> dict[str, Any] | None:
    """{"answer", "score"}: the most frequent right answer, and its mean score when it is given to every problem."""
    known = Counter(answer for p in problems if (answer := gold(p)) is not None)
    if not known:
        return None
    ((answer, _),) = known.most_common(1)
    verdicts = [row[0] for row in judge(problems, [[Output([], [], "stop", answer)]] * len(problems)).verdicts]
    judged = [verdict is Verdict.RIGHT for verdict in verdicts if verdict is not Verdict.UNJUDGED]
    return {"answer": answer, "score": float(np.mean(judged)) if judged else None}


def _tokens(result: Result) -> dict[str, float | None]:
    lengths = np.array([[len(o.token_ids) for o in group] for group in result.outputs])
    masks = {"tokens": lengths >= 0, "tokens_right": result.right, "tokens_wrong": result.judged & ~result.right}
    return {name: float(lengths[mask].mean()) if mask.any() else None for name, mask in masks.items()}


def _examples(result: Result) -> list[dict[str, Any]]:
    told = zip(result.problems, result.outputs, result.verdicts, strict=True)
    return [
        {"prompt": p.prompt, "thought": o[0].reasoning or "", "answer": o[0].text, "closed": closed(o[0]), "verdict": v[0].value}
        for p, o, v in list(told)[:EXAMPLES]
    ]
