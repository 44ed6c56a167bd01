"""Rejection sampling: what is kept, what is left out and counted, and that a stop changes nothing. The engine says what a script has."""

import json
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem
from pascaline.engine import Output, Sampling
from pascaline.engine.stats import Stats
from pascaline.errors import BadInput
from pascaline.post import reject
from pascaline.post.check import check
from pascaline.post.reject import Answer, balanced, drawn
from pascaline.post.stage import Run, needed
from pascaline.post.verifiers import base
from pascaline.recipe import Recipe, load
from pascaline.runs import read_json
from pascaline.stopping import Stopped
from pascaline.tables import Puzzle, Reject
from pascaline.train.loop import active_parameters

COIN = Path(__file__).parent.parent / "coin.toml"
CUT = object()  # said to the length limit
Said = tuple[Any, Any]  # thought, answer; None: none


def number(problem: Problem | str) -> int:
    return int(re.findall(r"\d+", problem.prompt if isinstance(problem, Problem) else problem)[0])


def even(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> list[float | None]:
    """Right for an even digit; "?" cannot be judged."""
    said = [(a or "").split() for a in base.answers(completions)]
    return [None if "?" in words else float(bool(words) and words[-1] in "02468") for words in said]


def calm(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> list[float | None]:
    """A check: no shouting; "hm" it cannot judge."""
    return [None if "hm" in c else float("!" not in c) for c in completions]


class Scripted:
    """Stands where the engine does. script: (prompt, i) -> what answer i to the prompt is."""

    def __init__(self, script: Callable[[str, int], Said]) -> None:
        self.tokenizer, self.model, self.stats, self.script = tiny_tokenizer(), tiny_model(), Stats(), script
        self.asked: list[tuple[list[str], Sampling]] = []
        self.released = 0

    def generate(self, prompts: list[str], sampling: Sampling) -> list[list[Output]]:
        self.asked.append((prompts, sampling))
        outputs = [[self.output(p, *self.script(p, i)) for i in range(sampling.n)] for p in prompts]
        self.stats.generated += sum(len(o.token_ids) for group in outputs for o in group)
        return outputs

    def output(self, prompt: str, thought: Any, answer: Any) -> Output:
        if answer is CUT:
            ids = self.tokenizer.encode(thought)
            return Output(ids, [0.0] * len(ids), "length", "", thought)
        ids = self.tokenizer.chat_ids(prompt, thought or "", answer or "")[1]
        return Output(ids, [0.0] * len(ids), "stop", answer or "", thought)

    def release(self) -> None:
        self.released += 1


def run(out: Path, **settings: Any) -> Run:
    table = {"puzzles": ["coin:puzzle"], "prompts": 8, "samples": 8, "keep": 8, "balance": False, **settings}
    given = {f"reject.{key}": value for key, value in table.items()}
    recipe = load(COIN, {"chain": ["sft", "reject"], "puzzles.coin:puzzle.verifier": f"{__name__}:even", **given})
    return Run(recipe, out, torch.device("cpu"), torch.float32, quiet=True)


@pytest.fixture
def rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Scripted]]:
    def work(script: Callable[[str, int], Said], out: str = "run", score: Any = None, **settings: Any) -> tuple[Path, Scripted]:
        engine = Scripted(script)
        monkeypatch.setattr(
            reject, "_models", lambda *_: (engine, score and SimpleNamespace(scores=score, model=tiny_model(3, model_type="qwen3")))
        )
        current = run(tmp_path / out, **settings)
        reject.reject(current, "reject")
        return current.folder("reject"), engine

    return work


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told(folder: Path) -> dict[str, Any]:
    return read_json(folder / "reject.json") or {}


EIGHT = [("ünter", "2"), (" ünter\n", "2 "), ("other", "2"), ("toss", "3"), ("toss", CUT), ("toss", None), ("toss", "?"), ("\ufffd", "4")]


def test_right_answers_are_kept_once_and_all_others_counted(rejected: Any) -> None:
    folder, engine = rejected(lambda prompt, i: EIGHT[i])
    chats = lines(folder / "chats.jsonl")
    assert len(chats) == 16
    prompt = engine.asked[0][0][0]
    assert chats[0] == {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "reasoning_content": "ünter", "content": "2"},
        ],
        "puzzle": "coin:puzzle", "key": f"coin {number(prompt)}", "rate": 4 / 7,
    }  # fmt: skip
    assert {c["messages"][1]["reasoning_content"] for c in chats} == {"ünter", "other"}
    found = told(folder)
    assert found["answers"] == {
        "sampled": 64, "wrong": 24, "truncated": 8, "unclosed": 16, "abstain": 0, "unjudged": 8,
        "right": 32, "refused": 8, "duplicates": 8, "surplus": 0, "unbalanced": 0,
    }  # fmt: skip
    assert found["refused"] == {"unreadable": 8} and found["kept"] == found["exact"] == 16
    assert "gave no score" in found["trouble"]


def test_the_card_says_what_the_numbers_say(rejected: Any) -> None:
    folder, _ = rejected(lambda prompt, i: EIGHT[i], keep=1)
    card, found = (folder / "card.md").read_text(), told(folder)
    assert card.startswith("# reject: 8 chats\n\nSampled from `sft`: 8 answers to each of 8 problems; temperature 1,")
    for row in (
        "| sampled | 64 | |", "| wrong | 24 | 37.5% |", "| of these cut off at max_tokens | 8 | 12.5% |",
        "| could not be judged | 8 | 12.5% |",
        "| right, but refused by unreadable | 8 | 12.5% |", "| right, but said already | 8 | 12.5% |",
        "| more than 1 of a problem | 8 | 12.5% |",
        "| **kept** | 8 | 12.5% |", "| coin:puzzle | 8 | 8 | 32 | 8 | 8 |", "| 50 to 75 % | 8 | 8 | 32 | 8 | 8 |",
    ):  # fmt: skip
        assert row in card.splitlines(), row
    assert found["model"] == "sft" and found["seed"] == 1 and found["samples"] == 8


def test_pairs_hold_a_right_and_a_wrong_answer_of_the_same_problem(rejected: Any) -> None:
    """Not what was cut off, gave no answer, or could not be judged."""
    folder, engine = rejected(lambda prompt, i: EIGHT[i] if number(prompt) % 2 else ("toss", "4"))
    odd = [prompt for prompt in engine.asked[0][0] if number(prompt) % 2]
    assert 0 < len(odd) < 8
    said = {"role": "assistant", "reasoning_content": "ünter", "content": "2"}
    expected = [
        {"prompt": [{"role": "user", "content": p}], "chosen": [said], "rejected": [{**said, "reasoning_content": "toss", "content": "3"}]}
        for p in odd
    ]
    assert lines(folder / "pairs.jsonl") == expected and told(folder)["pairs"] == len(odd)


def test_a_model_without_thoughts_gives_chats_without_them(rejected: Any) -> None:
    folder, _ = rejected(lambda prompt, i: (None, str(i)))
    assert lines(folder / "chats.jsonl")[0]["messages"][1] == {"role": "assistant", "content": "0"}


def test_the_chats_are_rendered_as_they_were_sampled(rejected: Any) -> None:
    """Against the chat template: the same ids from the messages as from the prompt and what was said."""
    folder, engine = rejected(lambda prompt, i: ("to ss\n ü", f"the answer:\n {i}"))
    chats = lines(folder / "chats.jsonl")
    assert len(chats) == 8 * 4
    for chat in chats:
        user, assistant = chat["messages"]
        prompt, said = engine.tokenizer.chat_ids(user["content"], assistant["reasoning_content"], assistant["content"])
        assert engine.tokenizer.encode(engine.tokenizer.render(chat["messages"]), special=True) == [*prompt, *said]


def test_checks_must_pass_too(rejected: Any) -> None:
    said = [("so", "2"), ("so!", "4"), ("hm", "6"), ("", "8"), ("we can да", "0"), ("so!", "1"), ("so", "3"), ("x", "5")]
    folder, _ = rejected(lambda prompt, i: said[i], checks=["format", "language", f"{__name__}:calm"])
    assert [c["messages"][1]["content"] for c in lines(folder / "chats.jsonl")] == ["2"] * 8
    found = told(folder)
    assert found["refused"] == {"format": 8, "language": 8, f"{__name__}:calm": 8}
    assert found["answers"]["unjudged"] == 8 and found["answers"]["right"] == 32 and found["answers"]["wrong"] == 24


def test_a_reward_model_says_which_right_answers_are_the_best(rejected: Any) -> None:
    """It is given the tokens that were sampled, of right answers only."""
    seen: list[list[int]] = []

    def score(ids: list[list[int]]) -> list[float]:
        seen.extend(ids)
        return [float(engine_of(row)) for row in ids]

    tokenizer = tiny_tokenizer()

    def engine_of(row: list[int]) -> float:
        digit = int(re.findall(r"\d", tokenizer.decode(row))[-1])
        return {0: 0.1, 2: -3.0, 4: float("nan"), 6: 2.5}[digit]

    folder, engine = rejected(lambda prompt, i: ("toss", str(i)), score=score, keep=3)
    assert [c["messages"][1]["content"] for c in lines(folder / "chats.jsonl")] == ["6", "0", "2"] * 8  # NaN is no score
    first = engine.asked[0][0][0]
    assert seen[0] == [*engine.tokenizer.prompt_ids(first), *engine.tokenizer.chat_ids(first, "toss", "0")[1]]
    assert len(seen) == 8 * 4
    part = read_json(folder / "parts" / "000.json") or {}
    scorer = sum(p.numel() for p in tiny_model(3, model_type="qwen3").parameters()) - 61 * 24  # all but the embedding's lookup
    policy, read = part["tokens"] * 2 * active_parameters(engine.model), sum(map(len, seen)) * 2 * scorer
    assert part["tokens"] == engine.stats.generated and part["flops"] == policy + read > policy
    folder, _ = rejected(lambda prompt, i: ("toss", str(i)), out="plain", keep=3)
    assert [c["messages"][1]["content"] for c in lines(folder / "chats.jsonl")] == ["0", "2", "4"] * 8


# ---- balance


def answers(*counts: int) -> list[list[Answer]]:
    return [[Answer(None, f"{p} {i}", "right", 1, False, True, True) for i in range(n)] for p, n in enumerate(counts)]


def test_no_band_has_more_than_an_equal_share_of_what_was_accepted() -> None:
    accepted, bands = answers(*[2] * 10, 2, 1, 1), [4] * 10 + [1, 2, 2]  # 20, 2 and 2 of 24
    kept = balanced(accepted, bands)
    assert [len(own) for own in kept] == [1] * 8 + [0, 0, 2, 1, 1]  # a third of 24, and one of each problem before a second
    assert all(own == there[: len(own)] for own, there in zip(kept, accepted, strict=True))


def test_a_second_answer_comes_after_everyones_first() -> None:
    assert [len(own) for own in balanced(answers(3, 3, 3, 3), [4, 4, 4, 1])] == [2, 2, 2, 3]


@pytest.mark.parametrize(("counts", "bands"), [([2, 2, 2], [4, 4, 4]), ([1, 1, 0], [1, 4, 0]), ([], [])])
def test_equal_bands_and_a_single_one_lose_nothing(counts: list[int], bands: list[int]) -> None:
    accepted = answers(*counts)
    assert balanced(accepted, bands) == accepted


def test_easy_problems_do_not_flood_the_set(rejected: Any) -> None:
    """Every tenth problem is hard: one right answer in eight."""

    def script(prompt: str, i: int) -> Said:
        return f"toss {i}", "2" if i == 0 or number(prompt) % 10 else "3"

    folder, _ = rejected(script, prompts=60, keep=2, balance=True)
    found = told(folder)
    easy, hard = found["bands"]["over 75 %"], found["bands"]["up to 25 %"]
    assert hard["accepted"] == hard["kept"] == hard["problems"] > 2 and easy["accepted"] == 2 * easy["problems"]
    assert easy["kept"] == -(-(easy["accepted"] + hard["accepted"]) // 2) < easy["accepted"]
    assert found["answers"]["unbalanced"] == easy["accepted"] - easy["kept"]
    folder, _ = rejected(script, out="all", prompts=60, keep=2, balance=False)
    assert told(folder)["bands"]["over 75 %"]["kept"] == easy["accepted"]


# ---- problems


def test_problems_are_of_the_training_side_and_different() -> None:
    stage = Reject(puzzles=["coin:puzzle", "arithmetic"], prompts=1001)
    found = drawn("reject", stage, {"coin:puzzle": Puzzle(), "arithmetic": Puzzle()}, 1)
    assert len(found) == len({p.key for p in found}) == 1001 and not any(puzzles.held_out(p.key) for p in found)
    coins = [p.puzzle == "coin:puzzle" for p in found]
    assert sum(coins) == 501 and 20 < sum(coins[:100]) < 80  # mixed
    assert found == drawn("reject", stage, {"coin:puzzle": Puzzle(), "arithmetic": Puzzle()}, 1)
    assert found != drawn("reject-2", stage, {"coin:puzzle": Puzzle(), "arithmetic": Puzzle()}, 1)


def test_a_small_file_gives_each_of_its_problems_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}", "answer": str(i)} for i in range(20)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = Puzzle(file=str(tmp_path / "p.jsonl"), verifier="integer")
    found = drawn("reject", Reject(puzzles=["a", "b"], prompts=100), {"a": table, "b": table}, 1)
    training = [row["prompt"] for row in rows if not puzzles.held_out(row["prompt"].casefold())]
    assert sorted(p.prompt for p in found) == sorted(training)  # also not once for each of two names


# ---- stopped


def test_a_stopped_stage_goes_on_with_the_same_bits(rejected: Any, tmp_path: Path) -> None:
    def script(prompt: str, i: int) -> Said:
        return "toss", str((number(prompt) + i) % 10)

    straight, engine = rejected(script, prompts=130)
    assert len(engine.asked) == engine.released == 3 and [len(p) for p, _ in engine.asked] == [64, 64, 2]
    assert len({s.seed for _, s in engine.asked}) == 3
    calls = []

    def torn(prompt: str, i: int) -> Said:
        calls.append(prompt)
        if len(calls) == 64 * 8 + 100:
            raise KeyboardInterrupt
        return script(prompt, i)

    with pytest.raises(KeyboardInterrupt):
        rejected(torn, out="stopped", prompts=130)
    folder, engine_2 = rejected(script, out="stopped", prompts=130)
    assert engine_2.asked == engine.asked[1:]
    for name in ("chats.jsonl", "pairs.jsonl", "card.md", "reject.json"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes(), name


def test_ctrl_c_ends_with_the_part(rejected: Any) -> None:
    def script(prompt: str, i: int) -> Said:
        if not said:
            signal.raise_signal(signal.SIGINT)
        said.append(prompt)
        return "toss", "2"

    said: list[str] = []
    with pytest.raises(Stopped, match="stopped after part 1 of 2 of reject"):
        rejected(script, prompts=70)
    assert len(said) == 64 * 8


# ---- mistakes


def refusal(rejected: Any, script: Callable[[str, int], Said], **settings: Any) -> str:
    with pytest.raises(BadInput) as error:
        rejected(script, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nothing_accepted_is_said_with_advice(rejected: Any) -> None:
    wrong = refusal(rejected, lambda prompt, i: ("toss", "3"))
    assert "reject: none of the 64 answers of sft was accepted (64 wrong); train sft longer" in wrong
    cut = refusal(rejected, lambda prompt, i: ("toss", CUT), out="cut")
    assert "64 of these cut off at max_tokens" in cut and "raise reject.max_tokens (200)" in cut
    blind = refusal(rejected, lambda prompt, i: ("toss", "?"), out="blind")
    assert "64 could not be judged" in blind and "mend the verifier" in blind and "gave no score" in blind
    strict = refusal(rejected, lambda prompt, i: ("!", "2"), out="strict", checks=[f"{__name__}:calm"])
    assert "64 right but refused" in strict and "reject.checks" in strict


def recipe(folder: Path, **settings: Any) -> Recipe:
    pair = {"prompt": "Coin 1?", "chosen": "2", "rejected": "3"}
    (folder / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n{json.dumps({**pair, 'prompt': 'Coin 2?'})}\n")
    given = {f"reject.{key}": value for key, value in settings.items()}
    score = {"prefer-score.method": "reward", "prefer-score.data": [str(folder / "pairs.jsonl")]}
    return load(COIN, {"chain": ["sft", "prefer-score", "reject"], **score, "reject.puzzles": ["coin:puzzle"], **given})


def test_what_the_stage_asks_must_be_there(tmp_path: Path) -> None:
    check(recipe(tmp_path, reward="prefer-score", checks=["format"]))
    assert needed(recipe(tmp_path, reward="prefer-score"), "reject") == ["sft", "prefer-score"]
    with pytest.raises(BadInput, match=r"reject\.reward = 'prefer-scores' is no earlier stage .*\(prefer-score\); did you mean"):
        check(recipe(tmp_path, reward="prefer-scores"))
    with pytest.raises(BadInput, match=r"reject\.reward = 'sft' is no earlier stage"):
        check(recipe(tmp_path, reward="sft"))
    with pytest.raises(BadInput, match="no verifier 'formt'; did you mean 'format'"):
        check(recipe(tmp_path, checks=["formt"]))
    with pytest.raises(BadInput, match=r"reject\.puzzles = \['chess'\] must name puzzles of the recipe"):
        check(recipe(tmp_path, puzzles=["chess"]))
