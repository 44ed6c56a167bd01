"""The stage: a tiny model learns to like a letter, and is judged on prompts that it has not seen; whatever stops it changes no bit."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LETTERS, talker, tiny_folder, tiny_tokenizer

from pascaline.data.loader import Loader
from pascaline.data.pairs import Pair, documents, sample
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.model.transformer import RewardHead
from pascaline.post.chain import _work
from pascaline.post.check import check
from pascaline.post.prefer import FILE, REFERENCE, calibration_error, judge, logprobs, note
from pascaline.post.reward import RewardModel
from pascaline.post.stage import Run
from pascaline.recipe import load, parse
from pascaline.runs import read_json

TINY = Path(__file__).parent.parent.parent / "recipes" / "tiny.toml"
COMMON = {"lr": 3e-3, "warmup": 2, "sequence_length": 64, "tokens_per_step": 1024, "held_out": 0.2, "save_every": 7, "weight_decay": 0.0}


def pairs(count: int, seed: int = 0) -> list[dict]:
    """The better answer is the one with a z."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        chosen, rejected = ([draw.choice(LETTERS[:25]) for _ in range(draw.randint(3, 6))] for _ in "ab")
        chosen[draw.randrange(len(chosen))] = "z"
        rows.append({"prompt": f"say {i}", "chosen": "".join(chosen), "rejected": "".join(rejected)})
    return rows


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model folder, and 160 pairs beside it."""
    folder = tmp_path_factory.mktemp("start")
    tiny_folder(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in pairs(160)))
    return folder


def stage(start: Path, out: Path, name: str = "prefer", dtype: torch.dtype = torch.float32, **changes) -> Run:
    """Run it as the chain does."""
    table = {**COMMON, "data": [str(start / "pairs.jsonl")], **changes}
    chain = ["sft", name]
    run = Run(
        parse({"seed": 1, "model": {"folder": str(start / "model")}, "chain": chain, "sft": {}, name: table}, "test"),
        out, torch.device("cpu"), dtype, quiet=True,
    )  # fmt: skip
    if not run.folder("sft").exists():
        shutil.copytree(start / "model", run.folder("sft") / "model")
        tiny_tokenizer().save(run.folder("tokenizer"))
    run.folder(name).mkdir(exist_ok=True)
    _work(name)(run, name)
    return run


def _chat(*said: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=False)]


def rows(run: Run, name: str = "prefer") -> list[dict]:
    return [json.loads(line) for line in (run.folder(name) / "metrics.jsonl").read_text().splitlines()]


# ---- it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sigmoid", "ipo", "norm"])
def test_it_learns_to_prefer_a_letter(start: Path, tmp_path: Path, method: str) -> None:
    run = stage(start, tmp_path, method=method, epochs=5.0)
    found = read_json(run.folder("prefer") / FILE)
    judged = found["held_out"]
    assert judged["accuracy"] > 0.8 and judged["accuracy_low"] > 0.65 and 20 <= judged["pairs"] == judged["prompts"] <= 50
    assert found["pairs"] == {"learnt_from": 160 - judged["pairs"], "held_out": judged["pairs"], "left_out": {}}
    assert judged["margin_low"] > 0 and judged["chosen_change"] > judged["rejected_change"] and 0 <= judged["both_fell"] <= 1
    told = rows(run)
    assert told[0]["margin"] == pytest.approx(0, abs=1e-4) and told[-1]["accuracy"] > 0.8
    first = {"sigmoid": np.log(2), "norm": np.log(2), "ipo": 25.0}[method]  # (1 / (2 * 0.1))^2
    assert told[0]["loss"] == pytest.approx(first, rel=1e-3) and told[0]["pair"] == told[0]["loss"]
    assert {"chosen_logprob", "rejected_logprob", "chosen_change", "both_fell"} <= told[-1].keys()
    assert hf.load(run.folder("prefer") / "model").config.vocab_size == talker(tiny_tokenizer()).config.vocab_size


def test_a_reward_model_learns_to_score_a_letter(start: Path, tmp_path: Path) -> None:
    run = stage(start, tmp_path, "prefer-reward", method="reward", epochs=8.0)
    folder = run.folder("prefer-reward")
    judged = read_json(folder / FILE)["held_out"]
    assert judged["accuracy"] > 0.75 and judged["accuracy_low"] > 0.6 and judged["chosen_score"] > judged["rejected_score"]
    assert rows(run, "prefer-reward")[0]["score"] == pytest.approx(np.log(2)) and "beta" not in read_json(folder / FILE)
    hf.opened(folder / "model")  # all that stands there has a place
    model = RewardModel.load(folder)
    fresh = pairs(100, seed=7)
    chats = [_chat(row["prompt"], row[side]) for row in fresh for side in ("chosen", "rejected")]
    score = model.scores(chats)
    assert score.shape == (200,) and (score[0::2] > score[1::2]).mean() > 0.7
    alone = np.array([float(model.scores([chat])[0]) for chat in chats[:20]])
    assert np.abs(score[:20] - alone).max() < 1e-4 and np.abs(model.scores(chats[::-1])[::-1] - score).max() < 1e-4
    packed = model.scores([_chat("a long one " * 9, "z"), *chats])[1:]  # several share its row
    assert np.abs(packed - score).max() < 1e-4
    ids = [model.ids(chat) for chat in chats[:3]]
    assert model.scores(ids).tolist() == pytest.approx(alone[:3], abs=1e-4) and model.scores([]).shape == (0,)
    hidden, _ = model.model.hidden(torch.tensor([ids[0]]))
    assert alone[0] == pytest.approx(float((hidden[0, -1] @ model.model.reward_head.weight).detach()), abs=1e-4)


def test_a_reward_model_in_bf16_has_a_head_in_float32(start: Path, tmp_path: Path) -> None:
    run = stage(start, tmp_path, "prefer-reward", torch.bfloat16, method="reward", epochs=1.0)
    model = RewardModel.load(run.folder("prefer-reward"), torch.bfloat16)
    weight = model.model.reward_head.weight
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float()) and model.model.dtype == torch.bfloat16
    assert read_json(run.folder("prefer-reward") / "reward.json")["dtype"] == "bfloat16"
    chat = [*model.tokenizer.prompt_ids("say 3"), 5, 6, 7]
    exact = RewardModel.load(run.folder("prefer-reward")).scores([chat])
    assert model.scores([chat]) == pytest.approx(exact, abs=0.1)


# ---- it goes on ------------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


@pytest.mark.parametrize("method", ["sigmoid", "reward"])
def test_a_killed_stage_ends_with_the_same_bits(start: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"prefer-{method}"
    settings = {"method": method, "epochs": 3.0, "save_every": 2, "tokens_per_step": 256}
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps(row) for row in pairs(40)))
    settings["data"] = [str(few)]
    whole = stage(start, tmp_path / "whole", name, **settings)
    step = Loader.step

    def crashing(self, number: int):
        if number == 5:
            raise Crash
        return step(self, number)

    with monkeypatch.context() as m:
        m.setattr(Loader, "step", crashing)
        with pytest.raises(Crash):
            stage(start, tmp_path / "killed", name, **settings)
    if method != "reward":  # the reference stays as it was computed: a mark in it survives
        reference = tmp_path / "killed" / "03-prefer-sigmoid" / REFERENCE
        before = reference.read_bytes()
        with monkeypatch.context() as m:
            m.setattr("pascaline.post.prefer.atomic_path", None)
            killed = stage(start, tmp_path / "killed", name, **settings)
        assert reference.read_bytes() == before == (whole.folder(name) / REFERENCE).read_bytes()
    else:
        killed = stage(start, tmp_path / "killed", name, **settings)
    names = ["model/model.safetensors", FILE, *(["reward_head.safetensors", "reward.json"] if method == "reward" else [])]
    assert 8 <= len(rows(whole, name)) < 20
    for file in names:
        assert (killed.folder(name) / file).read_bytes() == (whole.folder(name) / file).read_bytes(), file


def test_other_pairs_than_it_began_with_are_refused(start: Path, tmp_path: Path) -> None:
    mine = tmp_path / "pairs.jsonl"
    mine.write_text("\n".join(json.dumps(row) for row in pairs(20)))
    stage(start, tmp_path / "run", data=[str(mine)], epochs=1.0)
    mine.write_text("\n".join(json.dumps(row) for row in pairs(20, seed=1)))
    with pytest.raises(BadInput, match="the pairs of prefer are others than when it began"):
        stage(start, tmp_path / "run", data=[str(mine)], epochs=1.0)


# ---- what it learns from ---------------------------------------------------------------------------------------------


def test_pairs_that_cannot_be_learnt_from_are_counted_and_named(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mine = tmp_path / "pairs.jsonl"
    odd = [{"prompt": "a", "chosen": "same", "rejected": "same"}, {"prompt": "b", "chosen": "z" * 600, "rejected": "y"}]
    mine.write_text("\n".join(json.dumps(row) for row in [*pairs(20), *odd]))
    run = stage(start, tmp_path / "run", data=[str(mine)], epochs=1.0)
    left = read_json(run.folder("prefer") / FILE)["pairs"]["left_out"]
    assert left == {"the same answer twice": 1, "longer than the model's 512 positions": 1}
    shutil.rmtree(run.folder("prefer"))
    run.quiet = False
    run.folder("prefer").mkdir()
    _work("prefer")(run, "prefer")
    said = capsys.readouterr().err
    assert f"1 of 22 pairs left out: the same answer twice (the first: {mine}:21)" in said
    assert said.count("held-out pairs of") == 1 and "0.25 knows nothing" in said


def test_pairs_of_an_earlier_stage(start: Path, tmp_path: Path) -> None:
    table = {**COMMON, "data": ["reject"], "epochs": 1.0}
    raw = {"model": {"folder": str(start / "model")}, "chain": ["sft", "reject", "prefer"], "sft": {}, "reject": {}, "prefer": table}
    run = Run(parse(raw, "test"), tmp_path, torch.device("cpu"), torch.float32, quiet=True)
    shutil.copytree(start / "model", run.folder("sft") / "model")
    tiny_tokenizer().save(run.folder("tokenizer"))
    run.folder("reject").mkdir()
    shutil.copy(start / "pairs.jsonl", run.folder("reject"))
    run.folder("prefer").mkdir()
    assert _work("prefer")(run, "prefer")["pairs"] > 100


def test_mistakes_are_said_before_anything_starts(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}')
    chain = {"chain": ["sft", "rl", "prefer"]}
    for data, said in (([], "has nothing to learn from"), (["none.jsonl"], "cannot be read"), ([str(bad)], "bad.jsonl:1 is no pair"),
                       (["sft"], "'sft' is no earlier stage that writes pairs")):  # fmt: skip
        with pytest.raises(BadInput, match=said):
            check(load(TINY, {**chain, "prefer.data": data}))


def test_each_method_has_its_own_beta() -> None:
    table = {"data": ["x"]}
    betas = {m: parse({"chain": ["sft", "prefer"], "prefer": {**table, "method": m}}, "").prefer.beta for m in ("sigmoid", "ipo", "norm")}
    assert betas == {"sigmoid": 0.1, "ipo": 0.1, "norm": 5.0}
    assert parse({"chain": ["sft", "prefer"], "prefer": {**table, "method": "norm", "beta": 1.0}}, "").prefer.beta == 1.0


# ---- measures --------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_in_the_order_of_the_samples() -> None:
    tokenizer = tiny_tokenizer()
    model = talker(tokenizer)
    both = [(r["prompt"], r["chosen"], r["rejected"]) for r in pairs(9)]
    made = [
        sample(Pair(_chat(prompt), _chat(prompt, one)[1], _chat(prompt, other)[1], ""), tokenizer, "mean") for prompt, one, other in both
    ]
    seen = []
    found = logprobs(model, made, 80, 2, tokenizer.pad, seen.append)
    assert seen[-1] == 9 and seen == sorted(seen)
    for own, values in zip(made, found, strict=True):
        alone = []
        for document in documents([own]):
            ids = torch.from_numpy(document)
            alone += [0.0, *model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].tolist()]
        assert values == pytest.approx(np.where(own.streams["pair"] != 0, alone, 0), abs=1e-4)


def test_the_measures_by_hand() -> None:
    draw = np.random.default_rng(0)
    margin = draw.normal(0.5, 2, 400)
    found = judge(margin, [str(i) for i in range(400)])
    probability = 1 / (1 + np.exp(-margin))
    assert found["brier"] == pytest.approx(np.square(1 - probability).mean())
    assert found["accuracy"] == (margin > 0).mean() and found["margin"] == pytest.approx(margin.mean())
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    by_hand = 0.0
    for low in np.arange(0.5, 1, 0.05):
        sure = np.maximum(probability, 1 - probability)
        inside = (sure >= low) & (sure < low + 0.05)
        if inside.any():
            by_hand += inside.mean() * abs(sure[inside].mean() - (margin[inside] > 0).mean())
    assert found["calibration_error"] == pytest.approx(by_hand, abs=1e-9)
    assert judge(np.zeros(4), list("abcd"))["accuracy"] == 0.5 and judge(np.zeros(4), list("abcd"))["brier"] == 0.25


def test_calibration_tells_the_honest_from_the_sure() -> None:
    """Margins whose sigmoid is how often they are right, and the same ones four times as large."""
    draw = np.random.default_rng(1)
    size = np.abs(draw.normal(0, 1.5, 5000))
    margin = np.where(draw.random(5000) < 1 / (1 + np.exp(-size)), size, -size)
    assert calibration_error(margin, np.ones(5000)) < 0.03 and calibration_error(4 * margin, np.ones(5000)) > 0.15


def test_a_prompt_counts_once() -> None:
    """A hundred copies of one prompt's pair are no evidence."""
    many = judge(np.array([1.0] * 100 + [-1.0]), ["a"] * 100 + ["b"])
    few = judge(np.array([1.0, -1.0]), ["a", "b"])
    assert many.pop("pairs") == 101 and few.pop("pairs") == 2
    assert all(many[key] == pytest.approx(few[key]) for key in few)


def test_the_known_failure_is_said() -> None:
    found = judge(np.array([1.0, 2.0]), ["a", "b"])
    assert "less probable" not in note(found | {"chosen_change": 0.5, "rejected_change": -3.0})
    assert "the chosen answers became less probable too (-0.5 nats" in note(found | {"chosen_change": -0.5, "rejected_change": -3.0})


def test_what_is_no_reward_model_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no reward model"):
        RewardModel.load(start)
    model = talker(tiny_tokenizer())
    model.reward_head = RewardHead(24)
    own = RewardModel(model, tiny_tokenizer())
    for bad, said in (([[]], "has 0 tokens"), ([[3] * 600], "has 600 tokens; the reward model reads 1 to 512"),
                      ([[{"role": "user", "content": "x"}]], "must end with the assistant's answer")):  # fmt: skip
        with pytest.raises(BadInput, match=said):
            own.scores(bad)
    shutil.copytree(start / "model", tmp_path / "model")
    own.save_head(tmp_path, {})
    assert RewardModel.load(tmp_path).scores([[3, 4]]).tolist() == [0.0]
    model.reward_head = RewardHead(25)
    own.save_head(tmp_path, {})
    with pytest.raises(BadInput, match="does not fit the model"):
        RewardModel.load(tmp_path)
