"""Honest self-report (confession, after arXiv 2512.08093): behind a finished answer the model is asked whether it is right.

The question is one more user turn behind the very tokens that were sampled; nothing of the answer is decoded and encoded again (law 4).
The report has a reward, an advantage and a stream (`report`) of its own. The seal is in the streams: an answer's tokens have weight in
`rl` and none in `report`, a report's tokens the other way round, and each stream is normalised by its own count (law 3), so that the
task's gradient is the same with reports and without.

Shapes: G problems, n answers each.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pascaline.data.batch import Sample
from pascaline.data.puzzles import Problem, Trace, Verdict
from pascaline.data.puzzles.families import Family
from pascaline.errors import BadInput
from pascaline.post.verifiers import judge
from pascaline.tables import Confession, Puzzle
from pascaline.tokenizer import MARK, THINK, UNTHINK, Tokenizer

if TYPE_CHECKING:  # which loads torch; pascaline/post/check.py asks for `turn` without it
    from pascaline.engine import Engine, Output

QUESTION = "Is your answer right? Say yes or no."
YES, NO, UNCLEAR = "yes", "no", ""
TOP = 64  # likeliest tokens among which the beginnings of the two words are looked for
TRIES = 8  # at an answer that is wrong


@dataclass(frozen=True)
class Report:
    """What was said behind a transcript. said: YES, NO or UNCLEAR. belief: the share of YES in the probability of YES and NO where the
    report begins, as the model gives it (temperature 1)."""

    transcript: list[int]
    output: Output
    said: str
    belief: float

    def reward(self, right: bool) -> float:
        """1 for agreeing with the verdict (else 0), less the probability of what was said; UNCLEAR earns -1.

        Agreement alone would teach to say the likelier side always: its expectation is linear in q = P(yes), so that it is largest at
        q = 0 or 1, and the report would tell less than the model knows. Here yes earns v - q and no earns q - v (v: 1 if right), and the
        expected policy gradient, grad q (2 (v - q)), is that of -(q - v)^2: Brier's score, which is proper, so that P(yes) is best left
        at the chance of being right. To be sure and right earns nothing more, to be sure and wrong costs 1. UNCLEAR does not enter the
        choice between the two words; it is made dearer than either."""
        if self.said == UNCLEAR:
            return -1.0
        agrees = (self.said == YES) == right
        return float(agrees) - (self.belief if self.said == YES else 1 - self.belief)


# ---- asking ----------------------------------------------------------------------------------------------------------


def turn(tokenizer: Tokenizer) -> list[int]:
    """Ids of what stands between an answer and the report: the end of the answer's turn, the question, and the beginning of the next
    answer, without a thought. BadInput for a template that cannot take a second question."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}, {"role": "user", "content": QUESTION}]
    said = tokenizer.render(chat, add_generation_prompt=True, thinking=False)
    if said.count(MARK) != 1 or QUESTION not in said.partition(MARK)[2]:
        raise BadInput("the chat template leaves out what was said before the last question, so that nobody can be asked about an answer.")
    ids = tokenizer.encode(said.partition(MARK)[2], special=True)
    standing, bare, _, _ = tokenizer.tags(ids)
    if standing == THINK:  # a template that always opens a thought
        ids += tokenizer.encode(UNTHINK + "\n\n" * (not bare), special=True)
    return ids


def transcript(tokenizer: Tokenizer, between: Sequence[int], prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """prompt + answer + `turn`, whose first token is left out where the answer has ended its turn itself."""
    ends = (tokenizer.end_of_turn, tokenizer.end)
    ended = bool(answer) and answer[-1] in ends and between[0] in ends
    return [*prompt, *answer, *between[ended:]]


def ask(engine: Engine, transcripts: Sequence[list[int]], max_tokens: int, seed: int, temperature: float = 1.0) -> list[Report]:
    """One report behind each transcript."""
    from pascaline.engine import Sampling

    assert engine.tokenizer is not None
    outputs = engine.generate(transcripts, Sampling(temperature, 1.0, max_tokens, seed=seed, top_logprobs=TOP)) if transcripts else []
    begins: dict[int, str] = {}
    return [Report(ids, o, read(o), belief(engine.tokenizer, o, begins)) for ids, (o,) in zip(transcripts, outputs, strict=True)]


def room(engine: Engine, max_tokens: int) -> int:
    """Tokens that a transcript may have."""
    return int(engine.model.config.max_position_embeddings) - max_tokens


def read(output: Output) -> str:
    """YES or NO where the report is that word and ended there, in any case and with a full stop or not; else UNCLEAR."""
    word = output.text.strip().lower().rstrip(".!")
    return word if output.finish_reason == "stop" and word in (YES, NO) else UNCLEAR


def belief(tokenizer: Tokenizer, output: Output, begins: dict[int, str]) -> float:
    """P(yes) / (P(yes) + P(no)) at the report's first token, by the tokens with which the two words begin; 0.5 where neither is among the
    TOP likeliest. begins: which word a token begins, as found so far."""
    chance = {YES: 0.0, NO: 0.0, UNCLEAR: 0.0}
    for token, logprob in output.top_logprobs[0]:
        if token not in begins:
            piece = tokenizer.decode([token]).strip().lower()
            begins[token] = next((word for word in (YES, NO) if piece and word.startswith(piece)), UNCLEAR)
        chance[begins[token]] += math.exp(logprob)
    both = chance[YES] + chance[NO]
    return chance[YES] / both if both else 0.5


def finished(output: Output, verdict: Verdict) -> bool:
    """Whether there is anything to report on: an answer that was brought to its end, did not give up, and could be judged."""
    return output.finish_reason == "stop" and verdict in (Verdict.RIGHT, Verdict.WRONG)


# ---- learning --------------------------------------------------------------------------------------------------------


def confess(
    engine: Engine, problems: Sequence[Problem], outputs: Sequence[Sequence[Output]], verdicts: Sequence[Sequence[Verdict]],
    table: Confession, seed: int,
) -> tuple[list[Sample], dict[str, float]]:  # fmt: skip
    """Ask about the answers to a share of the problems: what teaches, and facts for the log.

    Whole problems are drawn, because a report's advantage is relative to those on the other answers to the same problem."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    rng, between = random.Random(seed), turn(tokenizer)
    chosen = sorted(rng.sample(range(len(problems)), max(round(table.share * len(problems)), 1)))
    places, transcripts = [], []
    for g in chosen:
        prompt = tokenizer.prompt_ids(problems[g].prompt)
        for output, verdict in zip(outputs[g], verdicts[g], strict=True):
            ids = transcript(tokenizer, between, prompt, output.token_ids)
            if finished(output, verdict) and len(ids) <= room(engine, table.max_tokens):
                places.append((g, verdict is Verdict.RIGHT))
                transcripts.append(ids)
    reports = ask(engine, transcripts, table.max_tokens, rng.getrandbits(48))
    group, right = np.array([g for g, _ in places]), np.array([r for _, r in places], bool)
    return _taught(reports, group, right, table.weight), facts(reports, right)


def _taught(reports: Sequence[Report], group: np.ndarray, right: np.ndarray, weight: float) -> list[Sample]:
    """The reports of each problem with their advantages. Where all said the same of answers with the same verdict, or all are
    unclear, there is nothing to compare, and they carry no gradient."""
    samples = []
    for g in np.unique(group):
        own = np.flatnonzero(group == g).tolist()
        if len({(reports[i].said, reports[i].said != UNCLEAR and bool(right[i])) for i in own}) > 1:
            gains = advantages([reports[i].reward(bool(right[i])) for i in own])
            samples += [report_sample(reports[i], weight * float(gain)) for i, gain in zip(own, gains, strict=True)]
    return samples


def advantages(rewards: Sequence[float]) -> np.ndarray:
    """Each reward less the mean of the others (RLOO, arXiv 2402.14740). Not over the group's deviation: that would weigh problems by how
    mixed they are, and so bend a proper score."""
    values, n = np.array(rewards), len(rewards)
    return (values - values.mean()) * n / (n - 1)


def report_sample(report: Report, advantage: float) -> Sample:
    """A report as a document: weight in the stream `report` on its own tokens, nothing on the answer's. `rl` is there and 0."""
    n, length = len(report.output.token_ids), len(report.transcript) + len(report.output.token_ids)
    streams = {name: np.zeros(length, np.float32) for name in ("rl", "report", "advantage", "old_logprob")}
    streams["report"][-n:] = 1.0
    streams["advantage"][-n:] = advantage
    streams["old_logprob"][-n:] = report.output.logprobs
    return Sample(np.array(report.transcript + report.output.token_ids), streams | report.output.record)


def facts(reports: Sequence[Report], right: np.ndarray) -> dict[str, float]:
    """reports: how many; and of them confession_reward, unclear, brier, confessed (said no, of those whose answer is wrong) and
    false_alarm (said no, of those whose answer is right). What there is none of is left out."""
    told: dict[str, float] = {"reports": len(reports)}
    if not reports:
        return told
    no = np.array([r.said == NO for r in reports])
    told["confession_reward"] = float(np.mean([r.reward(bool(v)) for r, v in zip(reports, right, strict=True)]))
    told["unclear"] = float(np.mean([r.said == UNCLEAR for r in reports]))
    told["brier"] = float(np.mean((np.array([r.belief for r in reports]) - right) ** 2))
    for name, mask in (("confessed", ~right), ("false_alarm", right)):
        if mask.any():
            told[name] = float(no[mask].mean())
    return told


# ---- a cold start ----------------------------------------------------------------------------------------------------


def confession_samples(tables: dict[str, Puzzle], tokenizer: Tokenizer, seed: int, share: float) -> list[Sample]:
    """For sft: `share` of as many chats as the puzzles have examples, a right answer and "yes" and a wrong one and "no" by turns. The wrong
    one is a trace of the puzzle that went wrong, or a planted one. `ce` lies on the report alone: no wrong answer is taught."""
    between, samples = turn(tokenizer), list[Sample]()
    for name, table in tables.items():
        family = Family(name, table)
        problems = family.problems(round(share * table.examples), seed + 2, held_out=False)  # other draws than the examples'
        rng = random.Random(f"confession {seed} {name}")
        for i, problem in enumerate(problems):
            wanted = Verdict.WRONG if i % 2 else Verdict.RIGHT
            shown = _shown(family, problem, problems[i - 1], wanted, rng)
            if shown is not None:
                prompt, answer = tokenizer.chat_ids(problem.prompt, shown.thought, shown.answer)
                samples.append(cold_sample(tokenizer, transcript(tokenizer, between, prompt, answer), wanted is Verdict.RIGHT))
    return samples


def _shown(family: Family, problem: Problem, other: Problem, wanted: Verdict, rng: random.Random) -> Trace | None:
    """An answer with the verdict that is wanted; None where TRIES of them have another."""
    for attempt in range(TRIES):
        shown = family.trace(problem, rng)
        if wanted is Verdict.WRONG and attempt:
            shown = planted(shown, family.trace(other, rng), rng)
        if _verdict(problem, shown) is wanted:
            return shown
    return None


def cold_sample(tokenizer: Tokenizer, ids: list[int], right: bool) -> Sample:
    """A transcript with the report it should have; `ce` is 1 on the report."""
    report = [*tokenizer.encode(YES if right else NO), tokenizer.end_of_turn]
    weights = np.zeros(len(ids) + len(report), np.float32)
    weights[len(ids) :] = 1.0
    return Sample(np.array(ids + report), {"ce": weights})


def planted(trace: Trace, other: Trace, rng: random.Random) -> Trace:
    """What could be taken for a right answer: the thought and answer of another problem, or its own with a digit changed."""
    digits = [i for i, c in enumerate(trace.answer) if c.isdecimal()]
    if not digits or rng.random() < 0.5:
        return other
    at = rng.choice(digits)
    answer = trace.answer[:at] + rng.choice([d for d in "0123456789" if d != trace.answer[at]]) + trace.answer[at + 1 :]
    return Trace(trace.thought.replace(trace.answer, answer), answer)  # there too, or it would be enough to see that the two differ


def _verdict(problem: Problem, shown: Trace) -> Verdict:
    from pascaline.engine import Output

    return judge([problem], [[Output([], [], "stop", shown.answer, shown.thought)]]).verdicts[0][0]
