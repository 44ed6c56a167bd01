"""Suites: from files, from the command line, from results; what is wrong in one is said before a model is loaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pascaline.data import puzzles
from pascaline.errors import BadInput
from pascaline.eval import suite
from pascaline.eval.plan import SEED, Plan

SUITES = Path(__file__).parent.parent.parent / "suites"
GOOD = """
name = "mine"
[defaults]
samples = 4
problems = 20
[[tasks]]
task = "countdown"
system = "Be brief."
[[tasks]]
task = "chain"
name = "hard"
samples = 2
dials = { steps = 5 }
"""


def same(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """A verifier: the answer is the column `answer`, word for word."""
    return [float(c.rpartition("</think>")[2].strip() == a) for c, a in zip(completions, answer, strict=True)]


def write(folder: Path, text: str, name: str = "suite.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def rows(folder: Path, count: int = 30) -> Path:
    return write(
        folder, "".join(json.dumps({"question": f"What is {i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(count)), "q.jsonl"
    )


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(BadInput) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_hold_where_a_task_says_nothing(tmp_path: Path) -> None:
    found = suite.load(write(tmp_path, GOOD))
    first, second = found.plans
    assert found.name == "mine" and (first.label, second.label) == ("countdown", "hard")
    assert (first.samples, second.samples, second.problems, first.system, second.system) == (4, 2, 20, "Be brief.", "")
    assert second.dials == {"steps": 5} and first.seed == SEED


def test_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    found = suite.load(write(tmp_path, GOOD), {"samples": 8, "seed": 3})
    assert [(p.samples, p.seed, p.problems) for p in found.plans] == [(8, 3, 20)] * 2
    assert [p.task for p in suite.named("countdown, chain", {"samples": 2}).plans] == ["countdown", "chain"]


def test_a_suite_is_read_back_from_a_result(tmp_path: Path) -> None:
    found = suite.load(write(tmp_path, GOOD))
    again = suite.load(write(tmp_path, json.dumps({"suite": found.told(), "models": []}), "result.json"))
    assert again == found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("samples = 2", "sampels = 2"), "task 2 (chain): sampels is not a known key; did you mean 'samples'?"),
        (("problems = 20", "problem = 20"), "defaults.problem is not a known key; did you mean 'problems'?"),
        (("[defaults]", "[default]"), "default is not a known key; did you mean 'defaults'?"),
        (("samples = 2", "samples = 0"), "task 2 (chain): samples = 0 is wrong"),
        (("samples = 2", 'samples = "2"'), "task 2 (chain): samples = '2' is wrong"),
        (("samples = 2", "temperature = 0.0"), "temperature 0 is greedy, so that 4 samples are 4 times the same; take one"),
        (('task = "chain"\nname = "hard"', 'task = "countdown"'), "two tasks are called countdown; give one of them a name"),
        (('task = "chain"', "tesk = 1"), "task 2"),
        (("[[tasks]]", "[[tasks]"), "is not valid TOML"),
    ],
)
def test_a_mistake_in_a_suite_is_named(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    said = refusal(suite.load, write(tmp_path, GOOD.replace(*change)))
    assert words in said and "suite.toml" in said


def test_files_that_are_no_suite(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert "did you mean" in refusal(suite.load, tmp_path / "suit.toml")
    assert "holds no suite" in refusal(suite.load, write(tmp_path, '{"a": 1}', "r.json"))
    assert "no JSON object" in refusal(suite.load, write(tmp_path, "[1]", "r.json"))
    assert "names no task" in refusal(suite.load, write(tmp_path, 'name = "x"', "e.toml"))
    assert "names no task" in refusal(suite.named, " , ", {})


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("cuntdown", "there is no task 'cuntdown'; did you mean 'countdown'?"),
        ("gms8k:q.jsonl", "did you mean 'gsm8k'?"),
        ("nothing", "There are countdown, chain"),
        (":", "there is no task ':'"),
        ("json:nothing", "puzzle 'json:nothing' cannot be loaded"),
    ],
)
def test_an_unknown_task_is_told_with_the_nearest_one(task: str, words: str) -> None:
    (plan,) = suite.named(task, {}).plans
    assert words in refusal(suite.task_of, plan)


def test_dials_are_tried_before_a_model_is_loaded(tmp_path: Path) -> None:
    assert "has no dial 'numers'" in refusal(suite.task_of, Plan(task="countdown", dials={"numers": 4}))
    path = rows(tmp_path)
    assert "no verifier" in refusal(suite.task_of, Plan(task=f"file:{path}"))
    assert "no dial 'verifer'" in refusal(suite.task_of, Plan(task=f"file:{path}", dials={"verifer": "test_suite:same"}))
    assert "no verifier 'same'" in refusal(suite.task_of, Plan(task=f"file:{path}", dials={"verifier": "same"}))
    suite.task_of(Plan(task=f"gsm8k:{path}", dials={"verifier": "test_suite:same"}))


def test_a_file_must_be_there_and_hold_something(tmp_path: Path) -> None:
    assert "needs a file" in refusal(suite.named, "gsm8k", {})
    assert "there is no file nowhere.txt" in refusal(suite.named, "ppl:nowhere.txt", {})
    assert "is empty" in refusal(suite.named, f"ppl:{write(tmp_path, '', 'e.txt')}", {})


def test_a_file_that_has_changed_is_refused(tmp_path: Path) -> None:
    path = rows(tmp_path)
    told = suite.named(f"ppl:{path}", {}).told()
    again = write(tmp_path, json.dumps({"suite": told}), "r.json")
    assert suite.load(again).told() == told and len(told["tasks"][0]["sha256"]) == 64
    rows(tmp_path, 31)
    assert "is not the file that the suite was made with" in refusal(suite.load, again)


def test_all_rows_of_a_file_count_in_a_seeded_order(tmp_path: Path) -> None:
    plan = Plan(task=f"file:{rows(tmp_path)}", dials={"verifier": "test_suite:same"}, problems=100)
    found = suite.problems(plan)
    assert {p.prompt for p in found} == {f"What is {i} + 1?" for i in range(30)} and len(found) == 30
    assert suite.problems(plan.model_copy(update={"problems": 7})) == found[:7]
    assert suite.problems(plan.model_copy(update={"seed": 1})) != found


def test_a_small_space_gives_what_it_has() -> None:
    found = suite.problems(Plan(task="countdown", problems=500, dials={"largest": 4}))
    assert 0 < len(found) < 500 and len({p.key for p in found}) == len(found) and all(puzzles.held_out(p.key) for p in found)


def test_a_puzzles_problems_are_those_of_the_reports() -> None:
    assert suite.problems(Plan(task="chain", problems=40)) == puzzles.problems("chain", 40, SEED, held_out=True)


def test_a_task_that_this_version_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suite.TASKS, "later", "pascaline.eval.later:later")
    assert "task 'later' is not in this version" in refusal(suite.task_of, Plan(task="later"))


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_suites_of_the_repository_can_be_read(path: Path) -> None:
    for plan in suite.load(path).plans:
        if plan.kind not in suite.TASKS:
            suite.task_of(plan)


def test_a_typo_is_told_without_torch() -> None:
    code = (
        "import sys; import pascaline.eval.harness, pascaline.eval.compare, pascaline.eval.tables\n"
        "from pascaline.eval import suite\n"
        "try: suite.task_of(suite.named('cuntdown', {}).plans[0])\n"
        "except ValueError as e: assert 'countdown' in str(e); sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
