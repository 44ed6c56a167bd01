"""Votes among samples: the outcome is that of all k whatever is cancelled, nothing is cancelled too early or too late."""

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from pascaline.data import puzzles
from pascaline.engine import Engine, Output, Request, Sampling
from pascaline.engine.vote import Ballot, said, vote, votes
from pascaline.errors import BadInput
from pascaline.tokenizer import train


class Scripted:
    """In place of an engine: sample i of prompt [p] says its script's text after so many steps, one token each."""

    def __init__(self, *scripts: list[tuple[str, int]], reason: str = "stop"):
        self.scripts, self.reason, self.live, self.cancelled = scripts, reason, list[Request](), list[Request]()

    def add(self, prompt, sampling: Sampling, salt: str = "") -> list[Request]:
        if prompt[0] >= len(self.scripts):
            raise BadInput("there is no such script")
        group = [Request(prompt, sampling, seed=0, index=i) for i in range(sampling.n)]
        self.live += group
        return group

    def step(self) -> list[Request]:
        touched = list(self.live)
        for request in touched:
            text, steps = self.scripts[request.prompt[0]][request.index]
            request.token_ids.append(5)
            if len(request.token_ids) == steps:
                self.end(request, self.reason, text)
        return touched

    def end(self, request: Request, reason: str, text: str = "") -> None:
        request.finish_reason = reason
        request.output = Output(request.token_ids, [], reason, text)
        self.live.remove(request)

    def cancel(self, request: Request) -> None:
        if request.finish_reason is None:
            self.cancelled.append(request)
            self.end(request, "cancelled")


def outcome(answers: list[str | None]) -> str | None:
    """The plain majority; of equally many votes the answer that was said first wins."""
    given = [answer for answer in answers if answer is not None]
    return max(given, key=given.count, default=None)  # max keeps the first of equal ones


# ---- the outcome -------------------------------------------------------------------------------------------------------

SCRIPT = st.lists(st.tuples(st.sampled_from(["a", "b", "c", ""]), st.integers(1, 5)), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(SCRIPT)
def test_the_outcome_is_that_of_all_samples_and_is_known_as_soon_as_can_be(script):
    """Whatever the samples that run might have said: enumerated."""
    engine = Scripted(script)
    result = vote(engine, [0], k=len(script))
    answers = [text or None for text, _ in script]
    assert result.answer == outcome(answers)
    assert (result.winner is None) == (result.answer is None)
    assert result.winner is None or result.winner.text == result.answer
    finished = [i for i, output in enumerate(result.outputs) if output.finish_reason == "stop"]
    assert result.cancelled == len(script) - len(finished) == len(engine.cancelled)

    def decided(known: list[int]) -> bool:
        rest = [i for i in range(len(script)) if i not in known]
        ends = set()
        for guess in product(["a", "b", "c", "d", None], repeat=len(rest)):
            said = dict(zip(rest, guess, strict=True)) | {i: answers[i] for i in known}
            ends.add(outcome([said[i] for i in range(len(script))]))
        return len(ends) == 1

    last = max(script[i][1] for i in finished)
    assert decided(finished) and (
        len(finished) == len(script) or all(steps > last for i, (_, steps) in enumerate(script) if i not in finished)
    )
    assert not decided([i for i in finished if script[i][1] < last])
    assert result.tokens_spent == sum(min(steps, last) for _, steps in script)


def test_what_a_vote_tells():
    engine = Scripted([("7", 4), (" 7 \n", 2), ("8", 3), ("", 1), ("7", 5), ("9", 30)])
    result = vote(engine, [0], Sampling(seed=3), k=6)
    assert result.answer == "7" and result.winner is result.outputs[0] and result.tally == {"7": 3, "8": 1}
    assert [o.finish_reason for o in result.outputs] == ["stop"] * 5 + ["cancelled"] and result.cancelled == 1
    assert result.tokens_spent == 4 + 2 + 3 + 1 + 5 + 5 and result.scores == []


def test_answers_are_normalised_and_some_abstain():
    engine = Scripted([("the 7", 1), ("7.0", 2), ("8", 3), ("none", 4), ("8", 5)])
    number = {"the 7": 7, "7.0": 7, "8": 8, "none": None}
    result = vote(engine, [0], k=5, answer=lambda output: number[output.text])
    assert result.answer == 7 and result.tally == {7: 2, 8: 1} and result.winner.text == "the 7"
    silent = vote(engine, [0], k=5, answer=lambda output: None)
    assert silent.winner is silent.answer is None and silent.tally == {} and silent.cancelled == 0
    cut = vote(Scripted([("7", 2)] * 3, reason="length"), [0], k=3)
    assert cut.winner is None and said(replace(cut.outputs[0], finish_reason="stop")) == "7"


def test_an_answer_that_fails_has_no_vote():
    engine = Scripted([("7", 3), ("8", 3), ("7", 3)])
    requests = engine.add([0], Sampling(n=3))
    ballot = Ballot([0], requests)
    for request in requests[::2]:
        engine.end(request, "error", "7")
    assert len(ballot.running) == 1 and not ballot.superfluous()
    engine.end(requests[1], "stop", "8")
    assert ballot.result().answer == "8" and ballot.result().tally == {"8": 1}


# ---- best of n -----------------------------------------------------------------------------------------------------------


def test_the_judges_best_wins_and_all_are_heard():
    engine, asked = Scripted([("7", 1), ("7", 1), ("8", 30), ("9", 2)]), []

    def judge(prompt, output: Output) -> float:
        asked.append(prompt)
        return {"7": 0.25, "8": 0.75, "9": math.nan}[output.text]

    result = vote(engine, [0], k=4, judge=judge)
    assert result.winner is result.outputs[2] and result.answer == "8" and result.tally == {"7": 2, "8": 1, "9": 1}
    assert result.scores == [0.25, 0.25, 0.75, -math.inf] and result.cancelled == 0 and asked == [[0]] * 4
    assert vote(engine, [0], k=2, judge=judge).winner.text == "7"  # the first of equal ones
    nobody = vote(engine, [0], k=4, judge=lambda prompt, output: math.nan)
    assert nobody.winner is nobody.answer is None


# ---- several at once -----------------------------------------------------------------------------------------------------


def test_several_votes_run_together_and_end_apart():
    scripts = [("a", 2), ("a", 3), ("b", 50)], [("b", 40), ("c", 1), ("b", 2)]
    engine = Scripted(*scripts)
    first, second = votes(engine, [[0], [1]], k=3)
    assert (first.answer, second.answer) == ("a", "b") and first.cancelled == 1 and first.tokens_spent == 2 + 3 + 3
    assert second.tokens_spent == 40 + 1 + 2 and votes(engine, [], k=3) == []


def test_when_something_fails_nothing_runs_on():
    engine = Scripted([("a", 5), ("b", 5)])
    with pytest.raises(BadInput, match="no such script"):
        votes(engine, [[0], [1]], k=2)
    assert not engine.live and len(engine.cancelled) == 2
    with pytest.raises(BadInput, match="n = 0"):
        vote(engine, [0], k=0)

    def broken(output: Output) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        vote(Scripted([("a", 1), ("b", 5)]), [0], k=2, answer=broken)


# ---- on a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    texts = [p.prompt for p in puzzles.problems("countdown", 200, 0, held_out=False)]
    tokenizer = train(texts, 300)
    return Engine(tiny_model(vocab_size=tokenizer.vocab_size, initializer_range=0.1).init_(1), tokenizer, max_rows=16)


ENDS = Sampling(1.0, 1.0, max_tokens=60, seed=5, stop_ids=tuple(range(10, 60)))  # random samples end sooner or later


def parity(output: Output) -> int:
    """Something that random models often agree on."""
    return output.token_ids[0] % 2


def test_votes_on_a_model_are_the_same_alone_and_together(engine):
    prompts = ["one", "two and three", [5, 6, 7]]
    together = votes(engine, prompts, ENDS, 5, parity)
    for prompt, one in zip(prompts, together, strict=True):
        alone, again = (vote(engine, prompt, ENDS, 5, parity) for _ in range(2))
        assert alone == again and alone.answer == one.answer
        (whole,) = engine.generate([prompt], replace(ENDS, n=5))
        assert one.answer == outcome([parity(o) for o in whole])
        for output, uncut in zip(one.outputs, whole, strict=True):
            assert uncut.token_ids[: len(output.token_ids)] == output.token_ids
    assert sum(one.cancelled for one in together) > 0 and all(one.tokens_spent >= 5 for one in together)
    assert len({one.winner.text for one in together}) > 1


def test_cancelled_samples_leave_no_block_behind(engine):
    other = engine.add("bystander", Sampling(1.0, 1.0, max_tokens=60, ignore_eos=True))[0]
    result = vote(engine, "who?", ENDS, 6, parity)
    assert result.cancelled > 0 and other.finish_reason is None and len(other.token_ids) > 0
    engine.cancel(other)
    engine.step()
    assert not engine.busy and engine._blocks.used == 0
