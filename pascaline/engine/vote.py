"""Parallel thinking: k answers to one prompt, and the one to go with, by majority (self-consistency, Wang et al. 2022, arXiv 2203.11171,
section 2) or by a judge (best of n).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

from pascaline.engine.engine import Engine
from pascaline.engine.intake import Prompt
from pascaline.engine.request import Output, Request
from pascaline.engine.sampler import Sampling

Answer = Callable[[Output], Hashable | None]
Judge = Callable[[Prompt, Output], float]


@dataclass(frozen=True)
class Vote:
    """How a vote went. winner: the sample to go with, None if all abstained; answer: what it says; tally: votes for each answer, most
    first; outputs: all k in order, those that could change nothing any more with finish_reason "cancelled"; scores: the judge's, -inf for
    what it did not see or gave no number, empty without one."""

    winner: Output | None
    answer: Hashable | None
    tally: dict[Hashable, int]
    outputs: list[Output]
    scores: list[float] = field(default_factory=list)

    @property
    def tokens_spent(self) -> int:
        """Tokens of all answers, the cancelled ones' too; the prompt is computed once."""
        return sum(len(output.token_ids) for output in self.outputs)

    @property
    def cancelled(self) -> int:
        """Samples that were not finished. What they would have said more is not known: they were the long ones."""
        return sum(output.finish_reason == "cancelled" for output in self.outputs)


def said(output: Output) -> str | None:
    """The stripped text; None for an answer that was cut off or says nothing."""
    return output.text.strip() or None if output.finish_reason == "stop" else None


def vote(
    engine: Engine, prompt: Prompt, sampling: Sampling | None = None, k: int = 8, answer: Answer = said, judge: Judge | None = None
) -> Vote:
    """Sample k answers and choose one. `answer` normalises a sample to what is counted, None abstains; samples that cannot change the
    outcome any more are cancelled. With a `judge` (a verifier, a reward model) the best score wins instead, and all k are finished."""
    return votes(engine, [prompt], sampling, k, answer, judge)[0]


def votes(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    k: int = 8,
    answer: Answer = said,
    judge: Judge | None = None,
) -> list[Vote]:
    """Several votes at once in one batch, each as `vote` would hold it alone. What else the engine is at goes on meanwhile."""
    ballots: list[Ballot] = []
    try:
        for prompt in prompts:
            ballots.append(Ballot(prompt, engine.add(prompt, replace(sampling or Sampling(), n=k)), answer, judge))
        owners = {request: ballot for ballot in ballots for request in ballot.requests}
        while any(ballot.running for ballot in ballots):
            ended = [request for request in engine.step() if request.finish_reason is not None and request in owners]
            for ballot in {owners[request]: None for request in ended}:
                for request in ballot.superfluous():
                    engine.cancel(request)
    finally:
        for ballot in ballots:
            for request in ballot.running:
                engine.cancel(request)
    return [ballot.result() for ballot in ballots]


class Ballot:
    """A vote under way, over requests that somebody else steps."""

    def __init__(self, prompt: Prompt, requests: list[Request], answer: Answer = said, judge: Judge | None = None):
        self.prompt, self.requests, self.answer, self.judge = prompt, requests, answer, judge
        self._answers: dict[Request, Hashable | None] = {}  # of the finished ones

    @property
    def running(self) -> list[Request]:
        return [request for request in self.requests if request.finish_reason is None]

    def superfluous(self) -> list[Request]:
        """The requests that run although the vote is decided."""
        running = self.running
        return running if self.judge is None and running and self._decided(min(r.index for r in running), len(running)) else []

    def _votes(self) -> dict[Hashable, list[int]]:
        """Answer -> the samples that gave it, by index; the winning answer first."""
        found: dict[Hashable, list[int]] = {}
        for request in self.requests:
            if request.finish_reason not in ("stop", "length"):
                continue
            if request not in self._answers:
                assert request.output is not None
                self._answers[request] = self.answer(request.output)
            if self._answers[request] is not None:
                found.setdefault(self._answers[request], []).append(request.index)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[1][0])))

    def _decided(self, first: int, left: int) -> bool:
        """Whether the leader wins even if all `left` samples that run, the lowest of them number `first`, agree on another answer. Of
        equally many votes those win that have the lowest sample among them."""
        votes = list(self._votes().values())
        if not votes:
            return False
        leader, *others = votes
        rivals = [(len(samples) + left, min(samples[0], first)) for samples in others] + [(left, first)]
        return all((-len(leader), leader[0]) < (-count, lowest) for count, lowest in rivals)

    def result(self) -> Vote:
        """When nothing runs any more."""
        votes, outputs = self._votes(), [request.output for request in self.requests if request.output is not None]
        tally = {answer: len(samples) for answer, samples in votes.items()}
        if self.judge is None:
            leader = next(iter(votes.items()), None)
            winner, answer = (None, None) if leader is None else (outputs[leader[1][0]], leader[0])
            return Vote(winner, answer, tally, outputs)
        scores = [self._score(request) for request in self.requests]
        best = max(range(len(scores)), key=scores.__getitem__)  # the first of equal ones
        if scores[best] == -math.inf:
            return Vote(None, None, tally, outputs, scores)
        return Vote(outputs[best], self._answers[self.requests[best]], tally, outputs, scores)

    def _score(self, request: Request) -> float:
        assert self.judge is not None and request.output is not None
        if request.finish_reason not in ("stop", "length"):
            return -math.inf
        score = float(self.judge(self.prompt, request.output))
        return -math.inf if math.isnan(score) else score
