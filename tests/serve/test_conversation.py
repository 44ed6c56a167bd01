import asyncio
import subprocess
import sys
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from scripted import Scripted, usage

from pascaline.errors import BadInput
from pascaline.serve import conversation
from pascaline.serve.conversation import Branch, Conversation, Turn, answer, final, read, tally

SETTINGS = {"seed": 7, "temperature": 0.6}


def run(scripts, branches: int = 1, stop_after: int | None = None, close_after: int | None = None) -> tuple[Turn, Scripted]:
    """Ask "q"; press Stop, or close the page, after so many pictures."""
    backend, turn = Scripted({"q": scripts}), Turn(question="q", branches=[Branch() for _ in range(branches)])
    ticks = 0

    async def main() -> None:
        nonlocal ticks
        stream = answer(backend, [{"role": "user", "content": "q"}], turn, SETTINGS, lambda: ticks == stop_after)
        async with aclosing(stream):
            async for _ in stream:
                ticks += 1
                if ticks == close_after:
                    break

    asyncio.run(asyncio.wait_for(main(), 20))
    return turn, backend


def test_thought_and_answer_are_kept_apart() -> None:
    turn, backend = run([("reasoning", "a"), ("reasoning", "b"), ("wait", 0.2), ("content", "4"), ("content", "2"), usage(5)])
    branch = turn.branches[0]
    assert (branch.thought, branch.answer, branch.state, branch.tokens) == ("ab", "42", "done", 5)
    assert branch.seconds >= 0.2
    assert (backend.running, backend.cancelled) == (0, 0)


def test_the_seconds_are_those_of_the_thought_alone(monkeypatch) -> None:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(conversation, "time", clock)
    branch, seen = Branch(), []
    for later, kind, piece in ((5, "reasoning", "a"), (7, "reasoning", "b"), (5, "content", "4"), (9, "content", "2"), (9, *usage(5))):
        clock.now += later
        branch.tick()
        branch.take(kind, piece)
        seen.append((branch.state, branch.seconds))
    assert seen == [("thinking", 0.0), ("thinking", 7.0), ("answering", 12.0), ("answering", 12.0), ("done", 12.0)]


def test_an_unclosed_thought_ends_with_the_answer_and_says_that_it_was_cut_off() -> None:
    turn, _ = run([("reasoning", "and so"), usage(64, "length")])
    assert turn.branches[0].state == "cut" and turn.branches[0].answer == ""


@pytest.mark.parametrize("end", [{"stop_after": 3}, {"close_after": 3}])
def test_stop_and_a_closed_page_cancel_every_stream_and_keep_what_was_said(end) -> None:
    turn, backend = run([("reasoning", "so far"), ("wait", 60), usage(1)], branches=3, **end)
    assert (backend.running, backend.cancelled) == (0, 3)
    assert [(b.state, b.thought) for b in turn.branches] == [("stopped", "so far")] * 3


def test_each_branch_has_its_own_seed_and_a_failed_one_fails_alone() -> None:
    scripts = [[("content", "1"), usage(1)], [("raise", BadInput("too long."))], [("content", "1"), ("raise", RuntimeError("at 0x7f"))]]
    turn, backend = run(scripts, branches=3)
    assert sorted(settings["seed"] for _, settings in backend.asked) == [7, 8, 9]
    assert sorted((b.state, b.error) for b in turn.branches) == [
        ("done", ""),
        ("failed", "The server failed on this answer."),
        ("failed", "too long."),
    ]


def test_the_vote_counts_equal_final_answers_of_those_that_ended() -> None:
    said = ["so **42**.", "no idea", "Answer: 42", "\\boxed{42} it is", "42", "", "no idea"]
    states = ["done", "done", "done", "done", "cut", "done", "done"]
    branches = [Branch(answer=text, state=state) for text, state in zip(said, states, strict=True)]
    branches[0].answer = "Hence:\n**42**."
    assert [(g.answer, g.branches) for g in tally(branches)] == [("42", [0, 2, 3]), ("no idea", [1, 6])]
    assert Turn(question="", branches=branches, tally=tally(branches)).answer == "Hence:\n**42**."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("\n \n", ""),
        ("The answer is 7.", "7"),
        ("**Final answer:** `(6 + 13) * 2`", "(6 + 13) * 2"),
        ("2**3**2", "2**3**2"),
        ("a \\boxed{1} then \\boxed{\\frac{1}{2}}, done", "\\frac{1}{2}"),
        ("\\boxed{never closed", "never closed"),
        ("Yes.\n\n", "yes"),
    ],
)
def test_what_is_put_to_the_vote(text: str, expected: str) -> None:
    assert final(text) == expected


def test_the_next_question_brings_answers_but_no_thoughts_and_no_question_that_was_stopped_in_its_thought() -> None:
    talk = Conversation(
        turns=[
            Turn(question="one", branches=[Branch(thought="hm", answer="1", state="done")]),
            Turn(question="two", branches=[Branch(thought="hm", state="stopped")]),
            Turn(question="three", branches=[Branch(thought="hm", answer="thr", state="stopped")]),
        ]
    )
    told = [(m["role"], m["content"]) for m in talk.messages("Be brief.", "four")]
    assert told == [("system", "Be brief."), ("user", "one"), ("assistant", "1"), ("user", "three"), ("assistant", "thr"), ("user", "four")]
    assert talk.messages("  ", "x")[0]["role"] == "user", "an empty system prompt is none"


def test_a_conversation_comes_back_from_the_browser_whole_and_a_forged_one_is_refused() -> None:
    talk = Conversation(turns=[Turn(question="q", branches=[Branch(thought="t", answer="a", state="done", seconds=1.5, tokens=9)])])
    assert read(talk.model_dump()) == talk and read(None) == read({}) == Conversation()
    for forged in (
        {"turns": 3},
        {"turns": [{"question": "q", "branches": [{"state": "king"}]}]},
        {"turns": [{"question": "q", "branches": []}]},
        "x",
    ):
        with pytest.raises(BadInput, match="conversation"):
            read(forged)
    voted = {"question": "q", "branches": [{"answer": "a", "state": "done"}], "tally": [{"answer": "a", "branches": [99]}]}
    assert read({"turns": [voted]}).messages("", "?")[1]["content"] == "a", "whom the browser calls the winner does not matter"


def test_without_the_page_gradio_is_not_imported_and_without_gradio_there_is_one_sentence() -> None:
    code = (
        "import sys; from pascaline.serve import conversation, server; from pascaline.serve.options import Options\n"
        "assert server._page(Options(ui=False), print) is None and 'gradio' not in sys.modules\n"
        "sys.modules['gradio'] = None\n"
        "from pascaline.errors import BadInput\n"
        "try: import pascaline.serve.chat\n"
        "except BadInput as error: assert 'pascaline[ui]' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
