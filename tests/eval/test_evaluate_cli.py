"""Suites put to models: what is measured, with engines whose answers are known; and `pascaline eval` on a real, random one."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_folder, tiny_tokenizer

from pascaline import cli
from pascaline.data.puzzles import Problem
from pascaline.engine import Engine, Output, Sampling
from pascaline.eval import harness, passk, questions, suite
from pascaline.eval.plan import Plan
from pascaline.eval.questions import read_plain
from pascaline.post.verifiers import closed

TOKENIZER = tiny_tokenizer()
Answer = Callable[[str, int], Output]  # of a rendered prompt and a sample's number


def judged(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """A verifier: the answer is the column `answer`, word for word; "?" cannot be judged."""
    said = [c.rpartition("</think>")[2].strip() for c in completions]
    return [None if s == "?" else float(s == a) for s, a in zip(said, answer, strict=True)]


class Fake:
    """An engine whose answers are a function of the prompt and the sample's number."""

    def __init__(self, answer: Answer, context: int = 400) -> None:
        self.answer, self.asked, self.tokenizer = answer, list[str](), TOKENIZER
        config = SimpleNamespace(max_position_embeddings=context, model_type="fake")
        self.model = SimpleNamespace(config=config, device=torch.device("cpu"), parameters=lambda: [torch.zeros(3)])
        self.stats = SimpleNamespace(generated=0, prefilled=0)

    def add(self, ids: list[int], sampling: Sampling) -> list[Any]:
        self.asked.append(TOKENIZER.decode(ids))
        outputs = [self.answer(self.asked[-1], i) for i in range(sampling.n)]
        self.stats.generated += sum(len(o.token_ids) for o in outputs)
        return [SimpleNamespace(output=o, finish_reason=o.finish_reason) for o in outputs]

    def step(self) -> list[Any]:
        return []

    def cancel(self, request: Any) -> None:
        pass

    def flush(self) -> None:
        pass


def said(text: str, thought: str | None = "t", finish: str = "stop", tokens: int = 3) -> Output:
    return Output([0] * tokens, [0.0] * tokens, finish, text, thought)


def table(folder: Path, answers: list[str], name: str = "q.jsonl") -> Path:
    lines = (json.dumps({"question": f"Say {i}.", "answer": a}) + "\n" for i, a in enumerate(answers))
    (folder / name).write_text("".join(lines))
    return folder / name


def plan(path: Path, **more: Any) -> Plan:
    return Plan(task=f"file:{path}", dials={"verifier": "test_evaluate_cli:judged"}, **more)


def measure(answer: Answer, asked: Plan, context: int = 400) -> dict[str, Any]:
    return questions.questions(Fake(answer, context), asked, lambda done, total: None)  # type: ignore[arg-type]


def number(prompt: str) -> int:
    return int(prompt.rpartition("Say ")[2].partition(".")[0])


# ---- what is measured


def test_pass_at_1_of_64_samples_is_their_mean(tmp_path: Path) -> None:
    """open-r1's pass@1:64 came out at 5 % where the mean was ten times that."""
    asked = plan(table(tmp_path, ["yes"] * 8), samples=64)
    found = measure(lambda prompt, i: said("yes" if i % 8 < number(prompt) else f"no {i}"), asked)
    means = {f"say {n}.": n / 8 for n in range(8)}
    assert dict(zip(found["keys"], found["values"], strict=True)) == means
    assert (found["score"], found["low"], found["high"]) == pytest.approx(passk.mean_interval(list(means.values())))
    assert found["by_k"][0]["pass"] == pytest.approx(found["score"]) and found["by_k"][0]["k"] == 1
    assert found["by_k"][0]["majority"] == pytest.approx(found["score"])
    assert [row["k"] for row in found["by_k"]] == [1, 2, 4, 8, 16, 32, 64]
    for row in found["by_k"]:
        assert row["pass"] == pytest.approx(passk.pass_at_k(64, [8 * n for n in range(8)], row["k"]).mean())
        assert row["pass_low"] <= row["pass"] <= row["pass_high"] and row["majority_low"] <= row["majority"] <= row["majority_high"]
    assert found["by_k"][-1]["pass"] == 7 / 8 and found["by_k"][-1]["majority"] == 7 / 8  # the wrong ones all say something else


def test_counts_that_are_no_power_of_two_end_with_all_samples(tmp_path: Path) -> None:
    found = measure(lambda prompt, i: said("yes"), plan(table(tmp_path, ["yes"]), samples=6))
    assert [row["k"] for row in found["by_k"]] == [1, 2, 4, 6]


def test_every_bad_end_is_wrong_and_told_apart(tmp_path: Path) -> None:
    kinds = [said("yes", tokens=10), said("no", tokens=2), said("yes", "t", "length", 4), said("", "never closed", "stop", 6), said("?")]
    found = measure(lambda prompt, i: kinds[number(prompt)], plan(table(tmp_path, ["yes"] * 5)))
    assert found["score"] == 1 / 4 and found["n"] == 4 and sorted(v for v in found["values"] if v is not None) == [0, 0, 0, 1]
    shares = (found["truncated"], found["unclosed"], found["unjudged"], found["false_claim"])
    assert shares == pytest.approx((1 / 5, 1 / 5, 1 / 5, 2 / 5))
    assert (found["tokens"], found["tokens_right"], found["tokens_wrong"]) == (5.0, 10.0, 4.0)
    assert "gave no score" in found["trouble"]


def test_the_thought_is_no_answer(tmp_path: Path) -> None:
    found = measure(lambda prompt, i: said("no", "yes" if i else "no, yes"), plan(table(tmp_path, ["yes"]), samples=2))
    assert found["score"] == 0 and [e["thought"] for e in found["examples"]] == ["no, yes"]


def test_what_a_constant_answer_would_earn_is_told(tmp_path: Path) -> None:
    found = measure(lambda prompt, i: said("x"), plan(table(tmp_path, ["a", "b", "b", "c"])))
    assert found["constant"] == {"answer": "b", "score": 0.5} and found["score"] == 0
    assert questions.constant([Problem("file", "q", "q", {"tests": "x"}, "test_evaluate_cli:judged")]) is None  # no right answer is known
    chain = questions.constant(suite.problems(Plan(task="chain", problems=50)))
    assert chain is not None and 1 / 50 <= chain["score"] < 0.2


def test_a_problem_that_does_not_fit_is_cut_off_and_the_others_are_asked(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": q, "answer": "yes"}) + "\n" for q in ("Say " + "xq" * 300, "Say 1.")))
    found = measure(lambda prompt, i: said("yes"), plan(tmp_path / "q.jsonl", samples=2))
    assert (found["score"], found["too_long"], found["truncated"], found["n"]) == (0.5, 0.5, 0.5, 2)


def test_a_system_message_goes_before_each_problem(tmp_path: Path) -> None:
    engine = Fake(lambda prompt, i: said("yes"))
    asked = plan(table(tmp_path, ["yes"]), system="Be brief.")
    questions.questions(engine, asked, lambda done, total: None)  # type: ignore[arg-type]
    (chat,) = engine.asked
    assert "Be brief." in chat and chat.index("Be brief.") < chat.index("Say 0.")
    questions.questions(engine, asked.model_copy(update={"plain": True}), lambda done, total: None)  # type: ignore[arg-type]
    assert engine.asked[-1] == "Be brief.\nSay 0.\n"


def test_a_base_model_is_read_behind_its_last_answer(tmp_path: Path) -> None:
    text = {0: "2+2=4\nAnswer: yes", 1: "yes", 2: "\nAnswer: no\nAnswer: yes", 3: "Answer: yes"}
    asked = plan(table(tmp_path, ["yes"] * 4), plain=True)
    found = measure(lambda prompt, i: said(text[number(prompt)], None), asked)
    assert dict(zip(found["keys"], found["values"], strict=True)) == {"say 0.": 1, "say 1.": 0, "say 2.": 1, "say 3.": 0}
    assert found["unclosed"] == 0.5 and not closed(read_plain(said("yes", None)))


def test_votes_are_of_what_was_said_without_the_space_around_it(tmp_path: Path) -> None:
    answers = ["yes", " yes\n", "no", "maybe"]
    found = measure(lambda prompt, i: said(answers[i]), plan(table(tmp_path, ["yes"]), samples=4))
    assert found["by_k"][-1]["majority"] == 1.0


def test_numbers_vote_by_their_value(tmp_path: Path) -> None:
    answers = ["12", "The answer is 12.", "12.0", "5", "5"]
    for verifier in ("integer", "expression"):
        asked = Plan(task=f"file:{table(tmp_path, ['12'])}", dials={"verifier": verifier}, samples=5)
        found = measure(lambda prompt, i: said(answers[i]), asked)
        assert found["score"] == 0.6 and found["by_k"][-1]["majority"] == 1.0, verifier


# ---- a real model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    tiny_folder(place / "a")
    tiny_folder(place / "b", seed=1)
    (place / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"The cat sat on {n} mats, and so it is. " * n}) + "\n" for n in range(1, 6))
    )
    return place


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`pascaline eval ARGUMENTS` -> exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pascaline", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def numbers(result: dict[str, Any]) -> list[Any]:
    """All of a result but the time it took."""
    return [
        {**m, "tasks": {t: {k: v for k, v in told.items() if k != "seconds"} for t, told in m["tasks"].items()}} for m in result["models"]
    ]


QUICK = ("--k", 2, "--problems", 6, "--max-tokens", 24)


def test_a_result_is_made_again_by_its_file(folder: Path, tmp_path: Path, call: Call) -> None:
    code, out, _ = call(folder / "a", folder / "b", "--tasks", f"countdown,chain,ppl:{folder / 'text.jsonl'}", *QUICK, "--json",
                        "--out", tmp_path / "r.json")  # fmt: skip
    first = json.loads(out)
    assert code == 0 and [m["name"] for m in first["models"]] == [str(folder / "a"), str(folder / "b")]
    code, out, _ = call(folder / "a", folder / "b", "--suite", tmp_path / "r.json", "--json")
    again = json.loads(out)
    assert code == 0 and numbers(again) == numbers(first) == numbers(json.loads((tmp_path / "r.json").read_text()))
    assert again["comparison"] == first["comparison"] and first["comparison"]["pairs"][0]["tasks"]
    # Saved results alone are compared without a model, also where it is gone.
    code, out, err = call(tmp_path / "r.json", "--json")
    assert code == 0 and json.loads(out)["comparison"]["pairs"][0]["tasks"] == first["comparison"]["pairs"][0]["tasks"] and not err


def test_a_result_says_what_was_measured(folder: Path, call: Call) -> None:
    code, out, _ = call(folder / "a", "--tasks", "countdown", *QUICK, "--json")
    told = json.loads(out)
    (model,), task = told["models"], told["models"][0]["tasks"]["countdown"]
    assert code == 0 and model["config"] == {"model_type": "deepseek_v3", "parameters": 27_840} and model["dtype"] == "float32"
    assert (
        set(model["sha256"]) >= {"weights", "config.json", "tokenizer.json", "chat_template.jinja"}
        and len(model["sha256"]["weights"]) == 64
    )
    assert told["versions"]["torch"] and told["machine"]["cores"]
    assert len(task["values"]) == len(task["keys"]) == 6 and task["plan"]["samples"] == 2 and task["plan"]["seed"] == 1_000_003
    assert task["generated_and_read"] > 0 and task["seconds"] > 0 and told["comparison"] is None


def test_answers_do_not_depend_on_the_other_problems(folder: Path) -> None:
    engine = Engine(folder / "a", device="cpu")
    few, many = (
        questions.ask(engine, suite.problems(p), p, lambda done, total: None)
        for p in (Plan(task="chain", problems=n, samples=2, max_tokens=16) for n in (3, 9))
    )
    assert [[o.token_ids for o in group] for group in few] == [[o.token_ids for o in group] for group in many[:3]]
    assert many[0][0].token_ids != many[1][0].token_ids
    asked = Plan(task="chain", problems=3, samples=2, max_tokens=16)
    turned = questions.ask(engine, suite.problems(asked)[::-1], asked, lambda done, total: None)
    assert [[o.token_ids for o in group] for group in turned[::-1]] == [[o.token_ids for o in group] for group in few]


def test_bits_per_byte_are_the_cross_entropy_of_the_text(folder: Path) -> None:
    engine = Engine(folder / "a", device="cpu")
    (asked,) = suite.named(f"ppl:{folder / 'text.jsonl'}", {}).plans
    found = suite.task_of(asked)(engine, asked, lambda done, total: None)
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    nats, tokens = 0.0, 0
    by_key = {}
    for number, text in enumerate(texts, 1):
        assert engine.tokenizer is not None
        ids = torch.tensor([*engine.tokenizer.prefix, *engine.tokenizer.encode(text)])
        with torch.no_grad():
            loss = float(F.cross_entropy(engine.model(ids[None])[0, :-1].double(), ids[1:], reduction="sum"))
        nats, tokens = nats + loss, tokens + len(ids) - 1
        by_key[number] = loss / torch.log(torch.tensor(2.0, dtype=torch.float64)).item() / len(text.encode())
    assert sorted(found["values"]) == pytest.approx(sorted(by_key.values()), rel=1e-4) and found["better"] == "lower"
    assert found["nats"] == pytest.approx(nats / tokens, rel=1e-4) and len(set(found["keys"])) == 5


def test_a_long_text_is_read_in_windows_that_leave_out_no_token(folder: Path) -> None:
    from pascaline.eval.perplexity import document_nats

    model = Engine(folder / "a", device="cpu").model
    ids = torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        windows = [torch.tensor(ids[start : start + 16]) for start in (0, 15, 30)]
        expected = sum(float(F.cross_entropy(model(w[None])[0, :-1], w[1:], reduction="sum")) for w in windows)
    assert sum(len(w) - 1 for w in windows) == 39 and document_nats(model, ids, 16) == pytest.approx(expected, rel=1e-4)


# ---- stopping and going on


@pytest.fixture
def fakes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """Known answers instead of the models in `folder`; the engines that were opened, by folder."""
    opened: dict[str, Fake] = {}

    def engine(place: Path, device: str, dtype: str) -> Fake:
        return opened.setdefault(place.name, Fake(lambda prompt, i: said("12")))

    monkeypatch.setattr(harness, "_engine", engine)
    return opened


def test_stopped_and_gone_on_is_as_never_stopped(
    folder: Path, tmp_path: Path, call: Call, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (folder / "a", "--tasks", "countdown,chain", *QUICK)
    code, _, _ = call(*arguments, "--out", tmp_path / "whole.json")
    assert code == 0
    add, fakes["a"].asked = fakes["a"].add, []

    def interrupted(ids: list[int], sampling: Sampling) -> list[Any]:
        if len(fakes["a"].asked) == 8:  # in the second task
            os.kill(os.getpid(), signal.SIGINT)
        return add(ids, sampling)

    monkeypatch.setattr(fakes["a"], "add", interrupted)
    code, out, err = call(*arguments, "--out", tmp_path / "r.json")
    assert (code, out) == (130, "") and err.splitlines()[-1].endswith(
        f"stopped in task chain; finished tasks are in {tmp_path / 'r.json'}; run the same command to go on."
    )
    assert list(json.loads((tmp_path / "r.json").read_text())["models"][0]["tasks"]) == ["countdown"]
    monkeypatch.setattr(fakes["a"], "add", add)
    fakes["a"].asked = []
    code, _, _ = call(*arguments, "--out", tmp_path / "r.json")
    assert code == 0 and len(fakes["a"].asked) == 6  # only the second task
    whole, resumed = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "r.json"))
    assert numbers(whole) == numbers(resumed) and whole["suite"] == resumed["suite"]
    fakes["a"].asked = []
    assert call(*arguments, "--out", tmp_path / "r.json")[0] == 0 and not fakes["a"].asked


def test_without_out_nothing_is_promised(folder: Path, call: Call, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str, i: int) -> Output:
        os.kill(os.getpid(), signal.SIGINT)
        return said("12")

    fakes["a"] = Fake(interrupted)
    code, out, err = call(folder / "a", "--tasks", "countdown", *QUICK)
    assert (code, out) == (130, "") and err.splitlines()[-1].endswith("stopped in task countdown, and nothing is kept without --out FILE.")


def test_a_result_of_something_else_is_not_mixed_in(folder: Path, tmp_path: Path, call: Call, fakes: dict[str, Fake]) -> None:
    out = tmp_path / "r.json"
    assert call(folder / "a", "--tasks", "chain", *QUICK, "--out", out)[0] == 0
    code, _, err = call(folder / "a", "--tasks", "chain", *QUICK, "--seed", 3, "--out", out)
    assert code == 2 and "results of another suite (tasks.chain.seed differ)" in err
    code, _, err = call(folder / "a", "--tasks", "chain", *QUICK, "--dtype", "bfloat16", "--out", out)
    assert code == 2 and "another dtype" in err
    told = json.loads(out.read_text())
    told["models"][0]["sha256"]["weights"] = "0" * 64
    out.write_text(json.dumps(told))
    code, _, err = call(folder / "a", "--tasks", "chain", *QUICK, "--out", out)
    assert code == 2 and "with other weights or files" in err
    out.write_text('{"my": "notes"}')
    code, _, err = call(folder / "a", "--tasks", "chain", *QUICK, "--out", out)
    assert code == 2 and "is not the result of an evaluation" in err and out.read_text() == '{"my": "notes"}'


# ---- which models


def test_the_stages_of_a_run_are_told_against_the_one_before(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    skill = {"03-pretrain": "a\nAnswer: yes", "04-sft": "yes", "05-rl": "no"}
    for stage in skill:
        tiny_folder(tmp_path / "run" / stage / "model")
    monkeypatch.setattr(harness, "_engine", lambda place, *_: Fake(lambda prompt, i: said(skill[place.parent.name], None)))
    (tmp_path / "s.toml").write_text(
        f'[[tasks]]\ntask = "file:{table(tmp_path, ["yes"] * 4)}"\nname = "q"\ndials = {{ verifier = "test_evaluate_cli:judged" }}'
    )
    code, out, _ = call(tmp_path / "run", "--stages", "--suite", tmp_path / "s.toml", "--json")
    told = json.loads(out)
    assert code == 0 and [m["plain"] for m in told["models"]] == [True, False, False]
    assert [m["tasks"]["q"]["score"] for m in told["models"]] == [1, 1, 0]
    first, second = told["comparison"]["pairs"]
    assert first["tasks"][0]["asked"] == ["plain"] and (second["tasks"][0]["lost"], second["tasks"][0]["p"]) == (4, 0.125)
    assert second["before"].endswith("04-sft") and second["after"].endswith("05-rl")
    code, out, _ = call(tmp_path / "run", "--stages", "--suite", tmp_path / "s.toml")
    assert code == 0 and "asked as plain text" in out and "4 (100.0%)" in out


def test_a_run_folder_names_its_model_and_a_result_its_suite(folder: Path, tmp_path: Path, call: Call, fakes: dict[str, Fake]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(folder / "b")
    assert call(folder / "a", "--tasks", "chain", *QUICK, "--out", tmp_path / "r.json")[0] == 0
    code, out, _ = call(tmp_path / "r.json", tmp_path / "run", "--json")
    told = json.loads(out)
    assert code == 0 and [m["name"] for m in told["models"]] == [str(tmp_path / "r.json"), str(tmp_path / "run")]
    assert told["models"][1]["tasks"]["chain"]["plan"] == told["models"][0]["tasks"]["chain"]["plan"]


def test_a_model_without_a_chat_template_is_asked_plainly_or_not_at_all(folder: Path, tmp_path: Path, call: Call) -> None:
    tiny_folder(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    code, out, err = call(tmp_path / "base", "--tasks", "chain", *QUICK)
    assert (code, out) == (2, "") and "has no chat template" in err and "--plain asks it in plain text" in err and err.count("\n") == 1
    assert call(tmp_path / "base", "--tasks", "chain", *QUICK, "--plain")[0] == 0
    assert call(tmp_path / "base", "--tasks", f"ppl:{folder / 'text.jsonl'}")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--tasks", "chain"], "there is no model nowhere"),
        (["{folder}", "--tasks", "chain"], "is neither a model's folder nor a run's"),
        (["{folder}/c", "--tasks", "chain"], "did you mean"),
        (["{folder}/a", "--tasks", "chian"], "there is no task 'chian'; did you mean 'chain'?"),
        (["{folder}/a"], "say what to ask"),
        (["{folder}/a", "--tasks", "chain", "--suite", "x.toml"], "give one of them"),
        (["{folder}/a", "--suite", "x.toml"], "there is no suite x.toml"),
        (["{folder}/a", "{folder}/a", "--tasks", "chain"], "is named twice"),
        (["{folder}/a", "--tasks", "chain", "--k", "0"], "samples = 0 is wrong"),
        (["{folder}/a", "--tasks", "chain", "--dtype", "int8"], "--dtype int8 is not known"),
        (["{folder}/a", "--stages", "--tasks", "chain"], "is no run's folder with models of its stages"),
        (["nowhere.json"], "there is no file nowhere.json"),
        (["{folder}/text.jsonl", "--tasks", "chain"], "is neither a model's folder nor a run's"),
        (["{folder}/a/config.json"], "is not the result of an evaluation"),
    ],
)
def test_a_mistake_is_one_sentence(folder: Path, call: Call, arguments: list[str], words: str) -> None:
    code, out, err = call(*(word.format(folder=folder) for word in arguments))
    assert (code, out) == (2, "") and words in err and err.startswith("pascaline: ") and err.count("\n") == 1


def test_the_page_has_the_tables_a_heat_map_and_answers_and_runs_nothing(folder: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "s.toml").write_text(
        '[defaults]\nproblems = 4\nmax_tokens = 8\n[[tasks]]\ntask = "chain"\n[[tasks]]\ntask = "niah:1"\n'
        "dials = { lengths = [450], depths = [0, 1] }\n"
    )
    code, out, err = call(folder / "a", folder / "b", "--suite", tmp_path / "s.toml", "--html", tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2 and "450" in page and "<script" not in page
    assert "most lost first" in out and "most lost first" in page and "Without each task in turn" in page
    assert page.count('<pre class="prompt">Start with ') == 6


def test_what_a_model_says_cannot_act_on_the_page() -> None:
    from pascaline.eval import tables

    told = {"prompt": "<b>", "thought": "", "answer": "<img src=x onerror=alert(1)>", "verdict": "wrong", "closed": True}
    measured = {"score": 0.0, "low": 0.0, "high": 0.5, "n": 1, "better": "higher", "keys": ["a"], "values": [0.0], "examples": [told]}
    result = {"suite": {"name": "<i>"}, "models": [{"name": "m", "tasks": {"t": measured}}], "machine": {}, "versions": {}}
    page = tables.page_html(result)
    assert "<img" not in page and "&lt;img src=x" in page and "<i>" not in page
