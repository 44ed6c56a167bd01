"""The hygiene suite catches verifiers that are bad on purpose, each by the check that is named for it, and passes a good one."""

import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import fooled
import pytest

from pascaline import cli
from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict
from pascaline.errors import BadInput
from pascaline.eval import hygiene
from pascaline.eval.hygiene import Limits, examine, split
from pascaline.eval.hygiene.hostile import look_alikes, texts
from pascaline.eval.hygiene.probe import Probe
from pascaline.eval.hygiene.subject import Subject, from_file, from_puzzle, read
from pascaline.post.verifiers import Judged


def rows(count: int = 40, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {3 * i} more than {i + 9}?", "answer": f"It is {3 * i} + {i + 9}.\n#### {4 * i + 9}"}
            for i in range(start, start + count)]  # fmt: skip


def written(folder: Path, name: str, lines: Sequence[Any]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the process of its own, which takes seconds to start."""
    monkeypatch.setattr(Probe, "survives", lambda *_: "")


def subject(folder: Path, verifier: str, form: bool = False) -> Subject:
    path = written(folder, "data.jsonl", rows())
    return from_file(f"fooled:{verifier}", path, written(folder, "test.jsonl", rows(20, 100)), 0, 0, {}, None, form)


def failed(found: dict[str, Any]) -> set[str]:
    return {check["check"] for check in found["checks"] if check["verdict"] == "fail"}


SHOTGUNS = {"every right answer", "every number to 100", "echo and every number"}


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(
    ("verifier", "caught"),
    [
        ("good", set[str]()),
        ("pays_zero", {"constant"}),
        ("pays_substrings", SHOTGUNS),
        ("pays_silence", {"empty"}),
        ("pays_echoes", {"echo"}),
        ("half", {"oracle", "oracle, no thought"}),
        ("wants_thoughts", {"oracle, no thought"}),
        ("doubles", {"scores within 0 to 1"}),
        ("infinite", {"scores within 0 to 1"}),
        ("blind", {"oracle", "oracle, no thought", "could not judge"}),
        ("reads_thoughts", {"answer only in the thought"}),
        ("breaks", {"hostile: raises"}),
        ("forgives_scripts", {"hostile: right"}),
        ("forgives_nan", {"hostile: right"}),
        ("lottery", {"same again", "same in another order", "same one by one"}),
        ("only_in_batches", {"same one by one"}),
        ("by_place", {"same in another order", "empty"}),
        ("pays_once", {"same at the end"}),
        ("spoils_neighbours", {"hostile: changes its neighbours"}),
    ],
)
def test_a_bad_verifier_is_caught_by_the_check_that_is_named_for_it(tmp_path: Path, verifier: str, caught: set[str]) -> None:
    random.seed(0)
    fooled.seen.clear()
    found = examine(subject(tmp_path, verifier))
    assert failed(found) >= caught and found["passed"] is (not caught), hygiene.table(found)
    if verifier not in ("lottery", "pays_once", "reads_thoughts", "by_place"):  # which are bad in more than one way
        assert failed(found) == caught, hygiene.table(found)
    json.dumps(found, allow_nan=False)
    assert hygiene.table(found).encode()  # whatever a verifier repeats of a hostile answer, a terminal can show it


@pytest.mark.usefixtures("unprobed")
def test_a_slow_answer_is_blamed_unless_the_verifier_says_that_it_could_not_judge(tmp_path: Path) -> None:
    limits = Limits(slow=20)
    assert failed(examine(subject(tmp_path, "sleeps"), limits)) == {"hostile: worst ms"}
    assert failed(examine(subject(tmp_path, "waits"), limits)) == set()
    assert failed(examine(subject(tmp_path, "waits"), Limits(slow=20, seconds=0.04))) == {"hostile: worst ms"}


def test_what_hangs_or_ends_a_verifier_is_told_and_the_suite_goes_on(tmp_path: Path) -> None:
    found = examine(subject(tmp_path, "hangs_and_exits"), Limits(seconds=2))
    assert failed(found) == {"hostile: worst ms", "hostile: raises"}, hygiene.table(found)
    told = {check["check"]: check["which"] for check in found["checks"] if "which" in check}
    assert told["hostile: worst ms"] == [["power tower", "did not come back within 2 s"]]
    assert told["hostile: raises"] == [["exit", "ended its process"]]


@pytest.mark.usefixtures("unprobed")
def test_an_unclosed_thought_that_is_paid_for_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hygiene, "judge", lambda problems, outputs: Judged([[Verdict.RIGHT] * len(group) for group in outputs]))
    assert failed(examine(subject(tmp_path, "good"))) == {"unclosed thought"}


@pytest.mark.usefixtures("unprobed")
def test_a_verifier_of_form_may_pay_a_constant_but_not_silence(tmp_path: Path) -> None:
    assert {"constant", "echo", "hostile: right"} <= failed(examine(subject(tmp_path, "style")))
    found = examine(subject(tmp_path, "style", form=True), Limits(form=True))
    assert found["passed"], hygiene.table(found)
    told = {check["check"]: check for check in found["checks"]}
    assert (told["constant"]["verdict"], told["constant"]["value"]) == ("told", 1.0)
    assert failed(examine(subject(tmp_path, "pays_silence", form=True), Limits(form=True))) == {"empty"}


@pytest.mark.usefixtures("unprobed")
def test_what_is_right_by_chance_is_no_fault(tmp_path: Path) -> None:
    """A hostile text with a 1 in it, for a problem whose answer is 1, and a verifier that reads the last number."""
    path = written(
        tmp_path, "ones.jsonl", [{"prompt": f"{i} - {i - n}?", "answer": str(n)} for i in range(30, 60) for n in (1, 2, 3, 13, 9, 0)]
    )
    found = examine(from_file("fooled:last_number", path, None, 0, 0, {}, None, False))
    assert failed(found) <= {"echo"}, hygiene.table(found)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(("fence", "caught"), [(0, {"hostile: raises", "hostile: right"}), (1, set[str]())])
def test_the_examples_of_the_documentation_do_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fence: int, caught: set[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "verifiers.md").read_text()
    (tmp_path / f"rewards{fence}.py").write_text(re.findall("```python\n(.*?)```", page, re.DOTALL)[fence])
    monkeypatch.syspath_prepend(tmp_path)
    data = written(
        tmp_path, "data.jsonl", [{"question": f"What is {i} + {j}?", "answer": str(i + j)} for i in range(2, 20) for j in range(3, 60, 7)]
    )
    assert failed(hygiene.check(f"rewards{fence}:last_number", data, count=64, quiet=True)) == caught


@pytest.mark.usefixtures("unprobed")
def test_partial_credit_for_no_work_is_told(tmp_path: Path) -> None:
    """reasoning-gym's default scorer pays for any text that holds the answer, the more the shorter it is."""
    told = {check["check"]: check for check in examine(subject(tmp_path, "pays_in_part"))["checks"]}
    part = told["partial credit without work"]
    assert 0.1 < part["value"] < 0.9 and part["verdict"] == "told"
    told = {check["check"]: check for check in examine(subject(tmp_path, "good"))["checks"]}
    assert told["partial credit without work"]["value"] == 0


# ---- split


def test_equal_and_near_problems_on_both_sides_are_found(tmp_path: Path) -> None:
    story = "Ann has {} pears and buys {} more at the market on a rainy Monday, then gives half away. How many are left?"
    train = [{"prompt": story.format(i, i + 1), "answer": "1"} for i in range(10)] + [{"prompt": "12 + 7 =", "answer": "19"}]
    clean = [{"prompt": story.format(i, i + 1), "answer": "1"} for i in range(20, 30)] + [{"prompt": "12 * 7 =", "answer": "84"}]
    again = [{"prompt": story.format(3, 4).upper().replace(" ", "  "), "answer": "1"}]
    reworded = [{"prompt": story.format(3, 4).replace("How many are left", "How many pears are there now"), "answer": "1"}]
    path = written(tmp_path, "train.jsonl", train)
    for number, (rows, caught) in enumerate([(clean, set()), (clean + again, {"leak"}), (clean + reworded, {"near leak"})]):
        test = written(tmp_path, f"test{number}.jsonl", rows)
        checks = split.checks(from_file("fooled:good", path, test, 0, 0, {}, None, False), 0.01, 0.1)
        assert {check["check"] for check in checks if check["verdict"] == "fail"} == caught, checks


def test_without_the_other_side_a_leak_cannot_be_looked_for(tmp_path: Path) -> None:
    alone = from_file("fooled:good", written(tmp_path, "data.jsonl", rows()), None, 0, 0, {}, None, False)
    assert [check["verdict"] for check in split.checks(alone, 0.01, 0.1)] == ["skipped", "skipped", "told"]


# ---- puzzles


class Sums:
    """A puzzle that can be made bad in one way."""

    LEVELS: ClassVar[dict[str, Any]] = {}

    def __init__(self, bad: str = "") -> None:
        self.bad = bad

    def generate(self, rng: random.Random, **dials: Any) -> Problem:
        a, b = rng.randrange(3 if self.bad == "few" else 100), rng.randrange(3 if self.bad == "few" else 100)
        key = f"{a}+{b} {rng.random()}" if self.bad == "leaks" else f"{a}+{b}"
        return Problem("sums", f"{a} + {b}?", key, {"sum": a + b})

    def trace(self, problem: Problem, rng: random.Random, **quality: Any) -> Any:
        raise NotImplementedError

    def solve(self, problem: Problem) -> str | None:
        return None if self.bad == "mute" else str(problem.data["sum"])

    def verify(self, problem: Problem, answer: str) -> Verdict:
        if self.bad == "breaks" and "(" in answer:
            raise RecursionError
        if self.bad == "constant" and answer == "1*2*3*4":  # reasoning-gym's puzzle24
            return Verdict.RIGHT
        return Verdict.RIGHT if answer == str(problem.data["sum"]) else Verdict.WRONG


sums, few, leaks, mute, breaking, puzzle24 = (Sums(bad) for bad in ("", "few", "leaks", "mute", "breaks", "constant"))


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    puzzles.get.cache_clear()
    for name, puzzle in {"sums": sums, "few": few, "leaks": leaks, "mute": mute, "breaks": breaking, "puzzle24": puzzle24}.items():
        monkeypatch.setitem(puzzles.BUILT_IN, name, puzzle)


@pytest.mark.usefixtures("unprobed", "named")
@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("countdown", set[str]()),
        ("chain", set[str]()),
        ("sums", set[str]()),
        ("few", {"constant", "different prompts per 10,000"}),
        ("leaks", {"leak"}),
        ("mute", {"oracle", "oracle, no thought"}),
        ("breaks", {"hostile: raises"}),
        ("puzzle24", {"constant"}),
    ],
)
def test_a_bad_puzzle_is_caught_too(name: str, caught: set[str]) -> None:
    found = examine(from_puzzle(name, 50, 3000, 0, {}))
    assert failed(found) == caught, hygiene.table(found)


def test_the_dials_of_a_puzzle_are_turned() -> None:
    assert len(from_puzzle("chain", 0, 300, 0, {"modulo": 10, "steps": 2}).problems) < 300


# ---- the input


def test_hostile_answers_have_names_of_their_own_and_look_alikes_look_alike() -> None:
    names = [name for name, _ in texts()]
    assert len(set(names)) == len(names) > 40
    assert [int(text) for name, text in look_alikes("42") if "superscript" not in name] == [42] * 3
    assert not list(look_alikes("yes"))


def test_columns_get_the_names_that_the_verifier_wants(tmp_path: Path) -> None:
    path = written(tmp_path, "data.jsonl", [{"text": "2 + 2?", "sum": 4}])
    found = from_file("fooled:good", path, None, 0, 0, {"prompt": "text", "answer": "sum"}, None, False)
    assert found.problems == [Problem("data.jsonl", "2 + 2?", "2 + 2?", {"answer": 4}, "fooled:good")] and found.golds == ["4"]
    assert read(written(tmp_path, "e.jsonl", [{"a": 1}]), {"b": "a"}) == [{"b": 1}]


@pytest.mark.parametrize(
    ("line", "options", "why"),
    [
        ("", {}, "has no rows"),
        ("{", {}, "line 1 is not JSON"),
        ("[1]", {}, "line 1 is no JSON object, but list"),
        ('{"answer": "4"}', {}, "row 1 has no text in a column prompt, question, problem"),
        ('{"prompt": "2 + 2?"}', {}, "no column answer, .* with the right answers; name it with --oracle COLUMN, or say --form"),
        ('{"prompt": "2 + 2?", "answer": [4]}', {}, "the right answer in 'answer' must be a text or a number"),
        ('{"prompt": "2 + 2?", "answers": "4"}', {"columns": {"answer": "answer"}}, "no column 'answer'; did you mean 'answers'"),
        ('{"prompt": "2 + 2?", "answer": "4"}', {"dials": {"steps": 2}}, "--set turns a puzzle's dials"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tmp_path: Path, line: str, options: dict[str, Any], why: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line)
    with pytest.raises(BadInput, match=why):
        hygiene.check("fooled:good", path, quiet=True, **options)
    with pytest.raises(BadInput, match="belong to --data"):
        hygiene.check("chain", None, path, quiet=True)


# ---- the command line


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["pascaline", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.usefixtures("unprobed")
def test_the_exit_code_tells_whether_a_verifier_is_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path, "data.jsonl", rows())
    assert called(monkeypatch, "check", "fooled:good", "--data", data, "--json") == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert called(monkeypatch, "check", "fooled:pays_zero", "--data", data) == 1
    assert "pays_zero fails: constant." in capsys.readouterr().out
    assert called(monkeypatch, "check", "fooled:pays_zero", "--data", data, "--max-constant", 1, "--problems", 7, "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 7
    assert called(monkeypatch, "check", "chian") == 2
    assert "no puzzle 'chian'; did you mean 'chain'?" in capsys.readouterr().err
    assert called(monkeypatch, "list") == 0
    assert "pascaline.data.puzzles.chain" in capsys.readouterr().out
