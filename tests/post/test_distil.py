"""Distillation: whose word it is, that the student comes nearer, that a stop changes nothing, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from test_rollout import documents
from tiny import talker, tiny_folder, tiny_model, tiny_tokenizer

import pascaline
from pascaline.data import chats, logits
from pascaline.data.batch import Sample, collate
from pascaline.engine import Engine
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.post import distil
from pascaline.post.check import check
from pascaline.post.distil import Taught, most_probable
from pascaline.post.reference import Reference
from pascaline.post.sft import puzzle_chats
from pascaline.post.stage import Run
from pascaline.recipe import load
from pascaline.runs import Metrics, read_json
from pascaline.tables import Distil, Puzzle
from pascaline.tokenizer import Tokenizer, train
from pascaline.train.losses import Loss, compute, totals
from pascaline.train.parallel import ALONE

COIN = {"coin:puzzle": Puzzle(examples=20)}
RECIPE = """
seed = 1
dtype = "float32"
chain = ["distil"]

[puzzles."coin:puzzle"]
examples = 300

[model]
folder = "{student}"

[distil]
teacher = "{teacher}"
puzzles = ["coin:puzzle"]
steps = 25
prompts = 8
samples = 4
max_tokens = 12
sequence_length = 64
tokens_per_step = 512
epochs = 4.0
lr = 1e-2
warmup = 2
schedule = "constant"
weight_decay = 0.0
balance_rate = 0.0
save_every = 4

[eval]
puzzles = ["coin:puzzle"]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher with experts that soon closes its thoughts, and a dense student of another shape that is in no hurry."""
    folder = tmp_path_factory.mktemp("models")
    teacher = tiny_folder(folder / "teacher", seed=1, closes=20.0, ends=5.0)
    return teacher, tiny_folder(folder / "student", seed=2, model_type="qwen3", hidden_size=32, num_hidden_layers=1, head_dim=8)


def recipe(folder: Path, models: tuple[Path, Path]) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(teacher=models[0], student=models[1]))
    return path


def puzzle_samples(tables: dict[str, Puzzle], tokenizer: Tokenizer, seed: int) -> list[Sample]:
    found = chats.gather(puzzle_chats(tables, seed), tokenizer, ["assistant"], 1000)
    return [found.get(i) for i in range(len(found.lengths))]


def rows(out: Path) -> list[dict]:
    return Metrics.read(out / "02-distil" / "metrics.jsonl")


def mean(found: list[dict], key: str) -> float:
    return sum(row[key] for row in found) / len(found)


def bits(out: Path) -> bytes:
    return (out / "02-distil" / "model" / "model.safetensors").read_bytes()


# ---- on the student's own answers ------------------------------------------------------------------------------------


def source(models: tuple[Path, Path], folder: Path, **settings: object) -> Taught:
    student = hf.load(models[1])
    stage = Distil(teacher="", puzzles=list(COIN), prompts=4, samples=3, max_tokens=12, **settings)
    return Taught(Engine(student, Tokenizer.load(models[1])), stage, COIN, 3, Reference(student, models[0], folder, 0, 0))


def logprobs(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        return model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()


def test_the_advantage_of_a_token_is_what_the_teacher_gives_it_less_what_the_student_gave(models, tmp_path):
    taught = source(models, tmp_path)
    batches = taught.step(0)
    teacher, student = hf.load(models[0]), hf.load(models[1])
    found, sampled = documents(batches), 0
    assert len(found) == 12
    for document in found:
        own = document["rl"][1:] > 0
        expected = logprobs(teacher, document["tokens"]) - logprobs(student, document["tokens"])
        assert document["advantage"][1:][own] == pytest.approx(expected[own], abs=1e-4)
        assert np.abs(expected[own]).max() > 0.1 and not document["advantage"][1:][~own].any()
        assert set(document["rl"]) == {0.0, 1.0}
        sampled += int(own.sum())
    assert set(batches[0].streams) == {"rl", "old_logprob", "advantage"}
    facts, total = taught.facts, totals(batches)
    assert total["rl"] == sampled == facts["response_tokens"] * 12
    everything = np.concatenate([d["advantage"] for d in found]).sum()
    assert facts["reverse_kl"] == pytest.approx(-everything / sampled, rel=1e-4)
    logs = [compute(taught.engine.model, batch, total, Loss())[1] for batch in batches]
    assert sum(float(log["rl"]) for log in logs) == pytest.approx(facts["reverse_kl"], abs=1e-4)  # on-policy the ratio is 1


def test_a_step_follows_from_its_number_and_the_weights(models, tmp_path):
    one, other = source(models, tmp_path), source(models, tmp_path)
    one.step(0)
    for mine, theirs in zip(one.step(1), other.step(1), strict=True):
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.streams["advantage"], theirs.streams["advantage"])
    assert one.problems(1) != one.problems(2)


def test_its_own_teacher_teaches_nothing(models, tmp_path):
    batches = source((models[1], models[1]), tmp_path).step(0)
    assert max(float(batch.streams["advantage"].abs().max()) for batch in batches) < 1e-4


@pytest.fixture(scope="module")
def policy_run(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    pascaline.run(recipe(folder, models), folder / "out", stage="distil", quiet=True)
    return folder / "out"


def test_a_dense_student_comes_nearer_to_a_teacher_with_experts(models, policy_run):
    found = rows(policy_run)
    assert len(found) == 25 and all(row["mismatch"] < 1e-4 and row["entropy"] > 0 for row in found)
    before, after = mean(found[:3], "reverse_kl"), mean(found[-3:], "reverse_kl")
    assert after < 0.5 * before
    assert pascaline.load(policy_run / "02-distil" / "model").config.model_type == "qwen3"
    assert str(models[0]) in read_json(policy_run / "02-distil" / "lineage.json")["parents"]
    assert read_json(policy_run / "02-distil" / "distil.json")["teacher"]["model_type"] == "deepseek_v3"


class Killed(Exception):
    """In place of kill -9."""


def test_on_policy_a_killed_run_ends_with_the_same_bits(models, policy_run, tmp_path, monkeypatch):
    step = Taught.step

    def dying(self, i):
        if i == 6:
            raise Killed
        return step(self, i)

    monkeypatch.setattr(Taught, "step", dying)
    path = recipe(tmp_path, models)
    with pytest.raises(Killed):
        pascaline.run(path, tmp_path / "out", stage="distil", quiet=True)
    monkeypatch.undo()
    pascaline.run(path, tmp_path / "out", stage="distil", quiet=True)
    assert bits(tmp_path / "out") == bits(policy_run)
    assert [row["reverse_kl"] for row in rows(tmp_path / "out")] == [row["reverse_kl"] for row in rows(policy_run)]


# ---- on written answers ----------------------------------------------------------------------------------------------


def test_what_is_stored_is_what_the_teacher_said(models, tmp_path):
    """Each taught token's row against the teacher's own distribution there, whatever rows and micro-batches they were packed into."""
    tokenizer, teacher = Tokenizer.load(models[0]), hf.load(models[0])
    samples = puzzle_samples(COIN, tokenizer, 1)
    stage = Distil(teacher="", top=5, sequence_length=64, micro_tokens=128)
    parts = [samples[:13], samples[13:]]
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path, part in zip(paths, parts, strict=True):
        logits.write(path, part, most_probable(teacher, part, stage, tokenizer), tokenizer.vocab_size, {"seconds": 1.0})
    assert logits.facts(paths[0]) == {"seconds": 1.0} and logits.facts(tmp_path / "2.safetensors") is None
    assert {k: str(v.dtype) for k, v in load_file(paths[0]).items() if k in ("ids", "logprobs")} == {"ids": "uint16", "logprobs": "float32"}
    stored = logits.TopSamples(paths)
    assert stored.lengths.tolist() == [len(s.tokens) for s in samples]
    for i, sample in enumerate(samples):
        found = stored.get(i)
        assert found.tokens.tolist() == sample.tokens.tolist() and found.streams["soft"].tolist() == sample.streams["ce"].tolist()
        with torch.no_grad():
            values, ids = teacher(torch.from_numpy(sample.tokens)[None])[0].log_softmax(-1).topk(5)
        for t in logits.taught(sample):
            assert found.streams["top_ids"][t].tolist() == ids[t - 1].tolist()
            assert found.streams["top_logprobs"][t] == pytest.approx(values[t - 1].numpy(), abs=1e-5)
        assert not found.streams["top_logprobs"][sample.streams["ce"] == 0].any()


def test_with_the_whole_vocabulary_it_is_the_kl_between_the_two_models(models):
    tokenizer, teacher, student = Tokenizer.load(models[0]), hf.load(models[0]), hf.load(models[1])
    sample = puzzle_samples(COIN, tokenizer, 1)[0]
    ids, known = most_probable(teacher, [sample], Distil(teacher="", top=100_000), tokenizer)[0]
    assert ids.shape[1] == tokenizer.vocab_size
    places = logits.taught(sample)
    streams = {"soft": sample.streams["ce"], "top_ids": np.zeros((len(sample.tokens), ids.shape[1]), np.float32)}
    streams["top_logprobs"] = streams["top_ids"].copy()
    streams["top_ids"][places], streams["top_logprobs"][places] = ids, known
    batch = collate([[Sample(sample.tokens, streams)]], len(sample.tokens), 0)
    tokens = torch.from_numpy(sample.tokens)[None]
    with torch.no_grad():
        p, q = (model(tokens)[0, places - 1].log_softmax(-1) for model in (teacher, student))
    expected = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    assert compute(student, batch, totals([batch]), Loss())[0].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.fixture(scope="module")
def logits_run(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "PART", 64)
        pascaline.run(recipe(folder, models), folder / "out", {"distil.method": "logits", "distil.top": 8}, stage="distil", quiet=True)
    return folder / "out"


def test_the_student_learns_what_was_stored(models, logits_run):
    found = rows(logits_run)
    assert found[0]["soft"] == found[0]["loss"] > 0 and mean(found[-3:], "soft") < 0.3 * mean(found[:2], "soft")
    assert len(list((logits_run / "02-distil" / "teacher").iterdir())) == 5  # 300 chats, 64 in a part


def test_a_run_killed_while_the_teacher_speaks_and_while_the_student_learns_ends_with_the_same_bits(
    models, logits_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(distil, "PART", 64)
    path, out, settings = recipe(tmp_path, models), tmp_path / "out", {"distil.method": "logits", "distil.top": 8}
    write, get, calls = logits.write, logits.TopSamples.get, []

    def dying(self, *given):
        calls.append(1)
        if len(calls) > 600:
            raise Killed
        return get(self, *given)

    def full(place, *given):
        if place.name == "000128-000192.safetensors":
            raise Killed
        write(place, *given)

    for target, name, function in [(logits, "write", full), (logits.TopSamples, "get", dying)]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(target, name, function)
            pascaline.run(path, out, settings, stage="distil", quiet=True)
        if name == "write":
            kept = {p: p.stat().st_mtime_ns for p in (out / "02-distil" / "teacher").iterdir()}
            assert len(kept) == 2
    pascaline.run(path, out, settings, stage="distil", quiet=True)
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())  # not asked again
    assert bits(out) == bits(logits_run)


def test_chats_of_a_file_teach_with_what_the_assistant_said(models, tmp_path):
    path = tmp_path / "chats.jsonl"
    asked = [{"role": "user", "content": "Coin 3?"}]
    first = [*asked, {"role": "assistant", "reasoning_content": "toss", "content": "4"}]
    second = [{"role": "system", "content": "Be brief."}, *asked, {"role": "assistant", "content": "6"}]
    path.write_text("".join(json.dumps({"messages": m, "puzzle": "coin"}) + "\n" for m in (first, second)))
    settings = {"distil.method": "logits", "distil.data": [str(path)], "distil.epochs": 100.0}
    pascaline.run(recipe(tmp_path, models), tmp_path / "out", settings, stage="distil", quiet=True)
    stored, tokenizer = logits.TopSamples([tmp_path / "out/02-distil/teacher/000000-000002.safetensors"]), Tokenizer.load(models[1])
    found = [stored.get(i) for i in range(2)]
    assert tokenizer.decode(found[0].tokens[found[0].streams["soft"] > 0].tolist(), special=True) == "toss</think>4<|end|>"
    assert "Be brief." in tokenizer.decode(found[1].tokens.tolist())


def test_one_rank_teaches_with_all_rows_while_others_wait(logits_run, monkeypatch):
    """A loader on the run's ranks would give the first its half of each step."""
    parsed = load(logits_run / "recipe.toml")
    monkeypatch.setattr(distil, "PART", 64)
    monkeypatch.setattr(distil, "train", lambda run, name, model, rows, steps: {"ranks": rows.ranks, "steps": steps})
    two = replace(ALONE, size=2)
    run = Run(parsed, logits_run, torch.device("cpu"), torch.float32, quiet=True, ranks=two)
    assert distil.distil(run, "distil") == {"ranks": 1, "steps": len(rows(logits_run))}


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_teacher_with_another_vocabulary_is_refused_with_the_way_out(models, tmp_path):
    other = tmp_path / "other"
    tokenizer = train(["other words make other merges, zebra zebra zebra"] * 4, 300)
    talker(tokenizer).save(other)
    tokenizer.save(other)
    for method in ("policy", "logits"):
        with pytest.raises(BadInput, match=r"another vocabulary.*\d+ the same.*reject.*sft"):
            check(load(recipe(tmp_path, (other, models[1])), {"distil.method": method}))
    assert tiny_tokenizer().vocabulary == Tokenizer.load(models[0]).vocabulary


def test_ids_are_compared_and_not_only_sizes(models, tmp_path):
    own = Tokenizer.load(models[0])
    swapped = json.loads((models[0] / "tokenizer.json").read_text())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = Tokenizer(json.dumps(swapped), own.config, own.template)
    other.save(tmp_path)
    with pytest.raises(BadInput, match=rf"{own.vocab_size} tokens, {own.vocab_size} here, {own.vocab_size - 2} the same"):
        distil.check_shared(own, tmp_path, "distil")


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"distil.teacher": "nobody"}, r"distil\.teacher = 'nobody' is neither an earlier stage with a model \(none\) nor a model folder"),
        ({"distil.teacher": "tokenizer"}, "is neither"),
        ({"distil.compile": True}, r"distil\.compile"),
        ({"distil.puzzles": ["zebra"]}, r"distil\.puzzles = \['zebra'\] must name puzzles"),
        ({"distil.method": "logits", "puzzles": {"coin:puzzle": {}}}, r"distil has no chats.*distil\.data"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(models, tmp_path, settings, told):
    with pytest.raises(BadInput, match=told):
        check(load(recipe(tmp_path, models), settings))


def test_a_student_cannot_be_its_own_teacher(tmp_path):
    text = (Path(__file__).parent.parent / "coin.toml").read_text()
    path = tmp_path / "recipe.toml"
    path.write_text('chain = ["sft", "rl", "distil"]\n' + text + '\n[distil]\nteacher = "rl"\npuzzles = ["coin:puzzle"]\n')
    with pytest.raises(BadInput, match="nothing to learn"):
        check(load(path))
    check(load(path, {"distil.start": "sft"}))


def test_a_head_with_rows_that_the_teacher_lacks_is_refused_on_policy(models, tmp_path):
    vocab = Tokenizer.load(models[0]).vocab_size
    wide = tmp_path / "wide"
    tiny_model(model_type="llama", vocab_size=vocab + 8).save(wide)
    Tokenizer.load(models[0]).save(wide)
    with pytest.raises(BadInput, match=rf"head has {vocab + 8} rows and the teacher's only {vocab}"):
        pascaline.run(recipe(tmp_path, (models[0], wide)), tmp_path / "out", stage="distil", quiet=True)


def test_an_answer_beyond_the_teachers_positions_is_refused(models, tmp_path):
    short = tiny_folder(tmp_path / "short", max_position_embeddings=12)
    with pytest.raises(BadInput, match="the teacher has 12 positions"):
        source((short, models[1]), tmp_path).step(0)
    tokenizer = Tokenizer.load(models[1])
    with pytest.raises(BadInput, match="the teacher's 12 positions"):
        most_probable(hf.load(short), puzzle_samples(COIN, tokenizer, 1), Distil(teacher=""), tokenizer)
