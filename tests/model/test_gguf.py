"""GGUF files: llama.cpp is the oracle for logits and text, from the file alone; what it cannot compute is refused."""

import errno
import json
import random
from pathlib import Path

import pytest
import torch
from tiny import randomize_, relative_error

from pascaline.engine import Engine, Sampling
from pascaline.errors import BadInput
from pascaline.model import gguf, hf
from pascaline.model.config import ModelConfig, Rope
from pascaline.model.transformer import Model
from pascaline.model.weights import Weights
from pascaline.tokenizer import Tokenizer

gguf_package = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
from llamacpp import trained  # noqa: E402

VOCAB = 420

YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16)
ROPES = [
    dict(rope_theta=10000.0),
    dict(rope_theta=500.0, **YARN, mscale=1.0, mscale_all_dim=1.0),
    dict(**YARN, mscale=0.707, mscale_all_dim=1.0),
    dict(**YARN),
    dict(**YARN, mscale_all_dim=0.8),
]


def latent(number: int) -> dict:
    """Configuration `number` of a covering design, as in test_hf_parity."""
    draw = random.Random(number)
    groups = (1, 2, 4)[number % 3]
    topk_group = draw.randint(1, groups)
    return dict(
        vocab_size=VOCAB, hidden_size=draw.choice([32, 40]), num_hidden_layers=3, num_attention_heads=draw.randint(1, 3),
        intermediate_size=draw.choice([24, 40]), moe_intermediate_size=draw.choice([8, 12]), n_routed_experts=8,
        num_experts_per_tok=draw.randint(1, min(4, 8 // groups * topk_group)), n_group=groups, topk_group=topk_group,
        n_shared_experts=(1, 2, 0)[number // 2 % 3], first_k_dense_replace=(0, 1, 2)[number // 3 % 3], norm_topk_prob=number // 4 % 2 == 0,
        tie_word_embeddings=number // 5 % 2 == 1, routed_scaling_factor=draw.choice([1.0, 2.5]), q_lora_rank=(None, 10)[number % 2],
        kv_lora_rank=draw.choice([8, 12]), qk_nope_head_dim=draw.choice([4, 10]), qk_rope_head_dim=draw.choice([4, 8]),
        v_head_dim=draw.choice([4, 6]), max_position_embeddings=128, rms_norm_eps=draw.choice([1e-6, 1e-5]),
        num_nextn_predict_layers=number % 2, rope=Rope(**ROPES[number % len(ROPES)]),
    )  # fmt: skip


DENSE_ROPES = [
    dict(rope_theta=10000.0),
    dict(rope_theta=500.0, rope_type="llama3", factor=8.0, original_max_position_embeddings=32),
    dict(rope_theta=500.0, **YARN, attention_factor=0.7),
    dict(rope_theta=100.0, **YARN),
    dict(rope_theta=10000.0, **YARN, beta_fast=4.0, truncate=False),
]


def grouped(family: str, number: int) -> dict:
    """What llama.cpp has of each family: llama's biases and frequencies of any kind, qwen2 and qwen3 with YaRN's own constants."""
    kv_heads = (1, 2, 4)[number % 3]
    heads = kv_heads * (1, 2, 3)[number // 2 % 3]
    rope = number % len(DENSE_ROPES)
    own = {"head_dim": 12 if number % 2 else 8} if family != "qwen2" else {}
    biases = dict(attention_bias=number % 2 == 0, mlp_bias=number // 2 % 2 == 0) if family == "llama" else {}
    return dict(
        model_type=family, vocab_size=VOCAB, hidden_size=heads * 8, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=24, max_position_embeddings=128, rms_norm_eps=(1e-6, 1e-5)[number % 2],
        tie_word_embeddings=number % 4 < 2, rope=Rope(**DENSE_ROPES[rope if family == "llama" or rope in (0, 2, 3) else 0]),
        **own, **biases,
    )  # fmt: skip


CASES = [("deepseek_v3", n) for n in range(12)] + [(family, n) for family in ("llama", "qwen2", "qwen3") for n in range(6)]


def folder_of(path: Path, fields: dict, seed: int = 0) -> Model:
    model = Model(ModelConfig(**fields))
    randomize_(model, seed)
    model.eval().save(path)
    trained().save(path)
    return model


def shape(family: str, number: int) -> dict:
    return latent(number) if family == "deepseek_v3" else grouped(family, number)


# Of whole blocks of 32 in every row; dense layers only, where a rounded router picks no other expert.
BLOCKS = dict(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, moe_intermediate_size=32,
    n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=2, max_position_embeddings=128,
)  # fmt: skip


def tokens(seed: int, length: int = 48) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


# ---- weights


@pytest.mark.parametrize("family, number", CASES)
@torch.no_grad()
def test_float32_gives_our_logits_there(family, number, tmp_path, llama):
    model = folder_of(tmp_path, shape(family, number), number)
    gguf.export(tmp_path, tmp_path / "a.gguf", "f32", quiet=True)
    batch = tokens(number)
    assert relative_error(llama(tmp_path / "a.gguf").logits(batch[0].tolist()), model(batch)[0]) < 1e-4


def test_the_covering_design_covers():
    shapes = [latent(n) for n in range(12)]
    for name, values in dict(q_lora_rank={None, 10}, n_group={1, 2, 4}, n_shared_experts={0, 1, 2}, norm_topk_prob={True, False},
                             tie_word_embeddings={True, False}, first_k_dense_replace={0, 1, 2}, 
                             num_nextn_predict_layers={0, 1}).items():  # fmt: skip
        assert {s[name] for s in shapes} == values, name
    assert any(s["topk_group"] < s["n_group"] for s in shapes)
    assert {s["rope"].rope_type for s in (grouped("llama", n) for n in range(6))} == {"default", "llama3", "yarn"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3"])
def test_greedy_text_is_the_same(family, tmp_path, llama):
    folder_of(tmp_path, shape(family, 2 if family == "deepseek_v3" else 0), 3)
    gguf.export(tmp_path, tmp_path / "a.gguf", "f32", quiet=True)
    engine, there = Engine(tmp_path, device="cpu"), llama(tmp_path / "a.gguf")
    for prompt in ("What is 2 + 2?", "Make 12 from 6, 6, 13.", "日本語"):
        ids = engine.tokenizer.prompt_ids(prompt)
        (out,) = engine.generate([ids], Sampling(temperature=0, max_tokens=64))[0]
        assert len(out.token_ids) == 64 and there.greedy(ids, 64) == out.token_ids, prompt


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen2", "qwen3"])
def test_rounded_types_run_and_are_near(kind, family, tmp_path, llama):
    experts = {"moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "first_k_dense_replace"}
    fields = {k: v for k, v in BLOCKS.items() if family == "deepseek_v3" or k not in experts}
    model = folder_of(tmp_path, {**fields, "model_type": family})
    told = gguf.export(tmp_path, tmp_path / "a.gguf", kind, quiet=True)
    assert told["unfit"] == 0
    batch = tokens(1)
    there, here = llama(tmp_path / "a.gguf").logits(batch[0].tolist()), model(batch)[0]
    assert 1e-4 < (there - here).norm() / here.norm() < 0.1  # it rounds activations too
    gguf.load_into(model, tmp_path / "a.gguf")
    rounded = model(batch)[0]
    assert relative_error(rounded, here) > 1e-5  # what was put back is what the file holds, and it lies nearer
    assert (there - rounded).norm() < (there - here).norm()


@torch.no_grad()
def test_experts_are_rounded_and_routers_are_not(tmp_path, llama):
    model = folder_of(tmp_path, {**BLOCKS, "first_k_dense_replace": 1})
    gguf.export(tmp_path, tmp_path / "a.gguf", "q8_0", quiet=True)
    types = {t.name: t.tensor_type.name for t in gguf_package.GGUFReader(tmp_path / "a.gguf").tensors}
    assert types["blk.1.ffn_down_exps.weight"] == types["blk.1.attn_k_b.weight"] == types["token_embd.weight"] == "Q8_0"
    kept = {name for name, kind in types.items() if kind == "F32"}
    assert {name.split(".")[-2] for name in kept} == {
        "attn_norm", "ffn_norm", "attn_kv_a_norm", "output_norm", "ffn_gate_inp", "exp_probs_b"
    }  # fmt: skip
    batch = tokens(1)
    far = llama(tmp_path / "a.gguf").logits(batch[0].tolist()) - model(batch)[0]
    # Here and there another expert is chosen; most positions see the same ones.
    assert float((far.norm(dim=-1) / model(batch)[0].norm(dim=-1)).median()) < 0.1


def test_rows_that_do_not_fit_the_blocks_are_kept_and_counted(tmp_path, llama):
    folder_of(tmp_path, {**BLOCKS, "kv_lora_rank": 24, "first_k_dense_replace": 1})
    told = gguf.export(tmp_path, tmp_path / "a.gguf", "q8_0", quiet=True)
    types = {t.name: t.tensor_type.name for t in gguf_package.GGUFReader(tmp_path / "a.gguf").tensors}
    assert told["unfit"] == 2 and types["blk.0.attn_v_b.weight"] == types["blk.1.attn_v_b.weight"] == "F32"
    llama(tmp_path / "a.gguf").logits([1, 2, 3])


@torch.no_grad()
def test_bfloat16_loses_nothing_of_a_bfloat16_folder(tmp_path):
    model = Model(ModelConfig(**latent(1)))
    randomize_(model, 0)
    model.cast_(torch.bfloat16).save(tmp_path)
    trained().save(tmp_path)
    gguf.export(tmp_path, tmp_path / "a.gguf", "bf16", quiet=True)
    again, before = hf.load(tmp_path), hf.load(tmp_path)
    for parameter in again.parameters():
        parameter.zero_()
    gguf.load_into(again, tmp_path / "a.gguf")
    mtp = f"model.layers.{model.config.num_hidden_layers}."
    for name, parameter in again.named_parameters():
        assert name.startswith(mtp) or torch.equal(parameter, before.state_dict()[name]), name


def test_shards_are_read_one_matrix_at_a_time(tmp_path, monkeypatch):
    """The same bytes from a folder in many shards, and no tensor is asked for twice but kv_b, which becomes two."""
    folder_of(tmp_path / "one", latent(3))
    gguf.export(tmp_path / "one", tmp_path / "one.gguf", "bf16", quiet=True)
    monkeypatch.setattr(hf, "SHARD_BYTES", 10_000)
    folder_of(tmp_path / "many", latent(3))
    taken: list[str] = []
    take = Weights.take
    monkeypatch.setattr(Weights, "take", lambda self, name, dtype=None: (taken.append(name), take(self, name, dtype))[1])
    gguf.export(tmp_path / "many", tmp_path / "many.gguf", "bf16", quiet=True)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    taken = taken[taken.index("model.layers.0.input_layernorm.weight") :]  # before that its copies are compared
    assert {name for name in taken if taken.count(name) > 1} == {name for name in taken if "kv_b_proj" in name}


def test_every_preset_can_be_written():
    from pascaline.model.presets import PRESETS

    for name, fields in PRESETS.items():
        config = ModelConfig(**fields)
        gguf._check(config)
        keys = gguf.keys(config)
        expected = {"q_lora_rank": config.q_lora_rank or 0} if config.latent else {"head_count_kv": config.kv_heads}
        assert {name: keys[f"attention.{name}"] for name in expected} == expected, name


# ---- the command line


def test_the_command_line_writes_a_file_that_chats(tiny_run, tmp_path):
    """A trained model without q_lora_rank, as a user exports it and talks to it; greedy, the answer is the engine's."""
    import forked
    import llama_cpp

    file = tmp_path / "tiny.gguf"
    code, out, err = forked.call(tmp_path, "export", tiny_run / "model", "--gguf", file, "--type", "f32")
    assert code == 0 and out.startswith(f"{file}: f32, ") and "MTP" in out and "Perplexity" not in out, err
    there = llama_cpp.Llama(str(file), n_ctx=256, verbose=False, n_threads=1)
    asked = "Make 12 from 6, 6, 13."
    answer = there.create_chat_completion([{"role": "user", "content": asked}], temperature=0, max_tokens=40)
    (own,) = Engine(tiny_run / "model", device="cpu").generate([asked], Sampling(temperature=0, max_tokens=40))[0]
    said = Tokenizer.load(tiny_run / "model").decode(own.token_ids)
    assert answer["choices"][0]["message"]["content"].replace("</think>", "") == said and said
    assert answer["choices"][0]["finish_reason"] == own.finish_reason


def test_the_command_line_says_what_a_rounded_type_costs(tiny_run, tmp_path):
    import forked

    file, text = tmp_path / "tiny.gguf", tmp_path / "some.txt"
    text.write_text("A sentence of words, and another one. " * 50)
    command = ("export", tiny_run / "model", "--gguf", file, "--type", "q8_0")
    code, out, err = forked.call(tmp_path, *command, "--text", text, "--json")
    told = json.loads(out)
    assert code == 0 and told["bytes"] == file.stat().st_size and told["file"] == str(file), err
    lost = told["perplexity"]
    assert lost["text"] == str(text) and 100 < lost["tokens"] < 2000
    assert lost["before"] != lost["after"] == pytest.approx(lost["before"], rel=0.05)
    file.unlink()
    code, out, err = forked.call(tmp_path, *command, "--text", tmp_path / "none.txt")
    assert code == 2 and err.count("\n") == 1 and "none.txt" in err and not file.exists()
    code, out, err = forked.call(tmp_path, *command, "--no-measure")
    assert code == 0 and "Perplexity" not in out and f"{told['unfit']} of them are float32" in out, err


# ---- refusals


def refused(folder: Path, *named: str, file: str = "a.gguf", kind: str = "f32") -> None:
    """One sentence that names what is wrong, and no file."""
    with pytest.raises(BadInput) as caught:
        gguf.export(folder, folder / file, kind, quiet=True)
    said = str(caught.value)
    assert all(name in said for name in named), said
    assert "\n" not in said and len(said) < 400 and not list(folder.glob("*.gguf*")) and not list(folder.glob(".*")), said


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(num_hidden_layers=27, q_lora_rank=8), "27 layers"),
        (dict(rms_norm_eps=1e-3), "rms_norm_eps"),
        (dict(rope=Rope(rope_type="yarn", factor=2.0, beta_fast=4.0)), "beta_fast"),
        (dict(rope=Rope(rope_type="llama3", factor=2.0)), "llama3"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(fields, named, tmp_path):
    folder_of(tmp_path, {**BLOCKS, "hidden_size": 32, **fields})
    refused(tmp_path, named)


def test_biases_that_qwen3_has_no_place_for_are_refused(tmp_path):
    folder_of(tmp_path, {**grouped("qwen3", 0), "attention_bias": True})
    refused(tmp_path, "attention_bias")


def edit_tokenizer(folder: Path, **changes) -> None:
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    for place, value in changes.items():
        inner, *rest = place.split("__")
        if rest:
            definition[inner][rest[0]] = value
        else:
            definition[inner] = value
    path.write_text(json.dumps(definition))


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer"),
        (dict(pre_tokenizer=None), "pre-tokenizer"),
        (dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}), "pre-tokenizer"),
        (dict(normalizer={"type": "Lowercase"}), "Lowercase"),
        (dict(model__ignore_merges=True), "ignore_merges"),
        (dict(model__byte_fallback=True), "byte_fallback"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(changes, named, tmp_path):
    folder_of(tmp_path, BLOCKS)
    edit_tokenizer(tmp_path, **changes)
    refused(tmp_path, named, "tokenizer.json")


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    folder_of(tmp_path, {**BLOCKS, "vocab_size": 300})
    refused(tmp_path, "300")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_is_no_model_is_refused(missing, tmp_path):
    folder_of(tmp_path, BLOCKS)
    (tmp_path / missing).unlink()
    refused(tmp_path, missing)


def test_types_and_places_that_make_no_sense_are_refused(tmp_path):
    folder_of(tmp_path, BLOCKS)
    refused(tmp_path, "q4", "q8_0", kind="q4")
    (tmp_path / "sub").mkdir()
    refused(tmp_path, "sub", file="sub")


def test_tensors_that_are_missing_or_left_over_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder_of(tmp_path, BLOCKS)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, "model.extra.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    refused(tmp_path, "model.extra.weight")
    stored.pop("model.layers.1.self_attn.kv_b_proj.weight")
    save_file(stored, tmp_path / "model.safetensors")
    refused(tmp_path, "kv_b_proj")


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    import sys

    folder_of(tmp_path, BLOCKS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path, "pip install 'pascaline[gguf]'")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_ctrl_c_leave_the_older_file(error, tmp_path, monkeypatch):
    folder_of(tmp_path, BLOCKS)
    gguf.export(tmp_path, tmp_path / "a.gguf", "f32", quiet=True)
    before, take = (tmp_path / "a.gguf").read_bytes(), Weights.take

    def fails(self, name, dtype=None):
        if "layers.1" in name:
            raise error
        return take(self, name, dtype)

    monkeypatch.setattr(Weights, "take", fails)
    with pytest.raises(type(error)):
        gguf.export(tmp_path, tmp_path / "a.gguf", "q8_0", quiet=True)
    assert (tmp_path / "a.gguf").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    folder_of(tmp_path, BLOCKS)
    for name in ("a.gguf", "b.gguf"):
        gguf.export(tmp_path, tmp_path / name, "q8_0", quiet=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_device_that_is_full_says_so(tmp_path):
    """Not numpy's own "requested and written" counts: the command line knows a full disk by its number."""
    entry = gguf.entries(ModelConfig(**BLOCKS))[0]
    weights = type("Zeros", (), {"take": lambda self, name, dtype: torch.zeros(entry.shape)})()
    stream = gguf._Stream(gguf.package(), entry, weights, gguf_package.GGMLQuantizationType.F32)
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as full:
        stream.tofile(full)
    assert caught.value.errno == errno.ENOSPC
