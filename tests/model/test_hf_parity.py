"""transformers' DeepseekV3ForCausalLM is the oracle: same logits, same gradients, same files, both ways."""

import json
import os
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import randomize_, relative_error, tiny_config, tiny_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3PreTrainedModel
from transformers.modeling_layers import MtpModel

from pascaline.data.batch import Batch
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.model.config import ModelConfig, Rope
from pascaline.model.transformer import Model
from pascaline.train import losses

transformers.utils.logging.disable_progress_bar()

YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0)
ROPES = [
    dict(rope_theta=10000.0),
    dict(rope_theta=500.0, **YARN, mscale=1.0, mscale_all_dim=1.0),
    dict(rope_theta=10000.0, **YARN, mscale=0.707, mscale_all_dim=1.0),
    dict(rope_theta=10000.0, **YARN),
    dict(rope_theta=10000.0, **YARN, mscale_all_dim=0.8),
    dict(rope_theta=10000.0, **YARN, mscale=0.8),
    dict(rope_theta=10000.0, **YARN, attention_factor=0.7, truncate=False),
]


def shape(number: int) -> dict:
    """Configuration `number` of a covering design: every axis cycles with a period of its own, sizes are random."""
    draw = random.Random(number)
    groups = (1, 2, 4)[number % 3]
    topk_group = draw.randint(1, groups)
    return dict(
        vocab_size=draw.randint(40, 70), hidden_size=draw.choice([16, 20, 32]), num_hidden_layers=3,
        num_attention_heads=draw.randint(1, 3), intermediate_size=draw.choice([24, 40]), moe_intermediate_size=draw.choice([8, 12]),
        n_routed_experts=8, num_experts_per_tok=draw.randint(1, min(4, 8 // groups * topk_group)), n_group=groups, topk_group=topk_group,
        n_shared_experts=(1, 2)[number // 2 % 2], first_k_dense_replace=(0, 1, 2)[number // 3 % 3], norm_topk_prob=number // 4 % 2 == 0,
        tie_word_embeddings=number // 5 % 2 == 1, routed_scaling_factor=draw.choice([1.0, 2.5]), q_lora_rank=(None, 10)[number % 2],
        kv_lora_rank=draw.choice([8, 12]), qk_nope_head_dim=draw.choice([4, 10]), qk_rope_head_dim=draw.choice([4, 8]),
        v_head_dim=draw.choice([4, 6]), max_position_embeddings=128, rms_norm_eps=draw.choice([1e-6, 1e-5]),
    )  # fmt: skip


def ours(number: int, **changes) -> Model:
    config = ModelConfig(**{**shape(number), "rope": Rope(**ROPES[number % len(ROPES)]), **changes})
    model = Model(config)
    randomize_(model, number)
    return model.eval()


def theirs(number: int, **changes) -> DeepseekV3ForCausalLM:
    rope = {"rope_type": "default", **ROPES[number % len(ROPES)]}
    fields = {**shape(number), "num_mtp_layers": 0, "rope_parameters": rope, **changes}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(num_key_value_heads=fields["num_attention_heads"], **fields))
    randomize_(model, number)
    return model.eval()


def tokens(number: int, vocab_size: int, length: int = 48) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(number))


def load_theirs(folder) -> DeepseekV3ForCausalLM:
    """Load with transformers; nothing may be missing or left over but the MTP modules."""
    model, report = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    depth = model.config.num_hidden_layers
    unexpected = [n for n in report["unexpected_keys"] if not (n.startswith("model.layers.") and int(n.split(".")[2]) >= depth)]
    assert not unexpected and not report["missing_keys"] and not report["mismatched_keys"]
    return model.eval()


def files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def edit(folder, **changes) -> None:
    """Change fields of config.json; a value of ... removes the field."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


# ---- logits, files, gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(24))
@torch.no_grad()
def test_their_folder_gives_their_logits_here(number, tmp_path):
    model = theirs(number)
    model.save_pretrained(tmp_path)
    batch = tokens(number, model.config.vocab_size)
    assert relative_error(hf.load(tmp_path)(batch), model(batch).logits) < 1e-4


@pytest.mark.parametrize("number", range(24))
@torch.no_grad()
def test_our_folder_gives_our_logits_there_and_comes_back_to_the_byte(number, tmp_path):
    model = ours(number)
    model.save(tmp_path / "a")
    batch = tokens(number, model.config.vocab_size)
    assert relative_error(load_theirs(tmp_path / "a")(batch).logits, model(batch)) < 1e-4
    again = hf.load(tmp_path / "a")
    assert again.config == model.config and not again.training
    assert torch.equal(again(batch), model(batch))
    again.save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_covering_design_covers():
    """The parity tests above are worth what their configurations span."""
    shapes = [shape(i) for i in range(24)]
    for name, values in dict(q_lora_rank={None, 10}, n_group={1, 2, 4}, n_shared_experts={1, 2}, norm_topk_prob={True, False},
                             tie_word_embeddings={True, False}, first_k_dense_replace={0, 1, 2}).items():  # fmt: skip
        assert {s[name] for s in shapes} == values, name
    assert any(s["topk_group"] < s["n_group"] for s in shapes)


def test_a_random_model_routes_differently_with_other_biases():
    """The biases of these tests matter: without them the logits differ."""
    model = ours(2)
    batch = tokens(2, model.config.vocab_size)
    before = model(batch)
    for router in model.routers():
        router.e_score_correction_bias.zero_()
    assert relative_error(model(batch), before) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_save_load_save_in_half_precision(dtype, tmp_path):
    model = ours(5, num_nextn_predict_layers=1).cast_(dtype)
    model.save(tmp_path / "a")
    again = hf.load(tmp_path / "a", dtype=dtype)
    assert again.dtype == dtype and {r.weight.dtype for r in again.routers()} == {torch.float32}
    again.save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    stored = hf.Weights(tmp_path / "a")
    kinds = {name: entry.dtype for name, entry in stored.entries.items()}
    biases = {name for name in kinds if name.endswith("e_score_correction_bias")}
    assert biases and {kinds[n] for n in biases} == {"F32"}
    assert {kinds[n] for n in kinds if n not in biases} == {"BF16" if dtype == torch.bfloat16 else "F16"}
    assert load_theirs(tmp_path / "a").dtype == dtype


@torch.no_grad()
def test_a_half_precision_folder_gives_their_logits_in_float32(tmp_path):
    ours(4).cast_(torch.bfloat16).save(tmp_path)
    batch = tokens(4, shape(4)["vocab_size"])
    reference, _ = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert relative_error(hf.load(tmp_path)(batch), reference(batch).logits) < 1e-4


@pytest.mark.parametrize("number", [0, 1, 4, 8, 11, 15])
def test_one_step_of_cross_entropy_has_their_loss_and_gradients(number, tmp_path):
    """Our loss as the trainer computes it: chunked head, hand-written RMSNorm gradient, padded experts."""
    reference = theirs(number)
    reference.save_pretrained(tmp_path)
    model = hf.load(tmp_path).train()
    batch = tokens(number, model.config.vocab_size)
    expected = reference(batch, labels=batch).loss
    expected.backward()
    positions = torch.arange(batch.shape[1]).expand_as(batch)
    ours_batch = Batch(batch, positions, torch.zeros_like(batch), {"ce": torch.ones(batch.shape)})
    loss, _, _ = losses.compute(model, ours_batch, losses.totals([ours_batch]), losses.Loss())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    for one in [name for name, _ in model.named_parameters() if name not in wanted]:  # theirs stand apart where ours are one
        halves = {"qkv_a_proj": ["q_proj", "q_a_proj", "kv_a_proj_with_mqa"], "gate_up_proj": ["gate_proj", "up_proj"]}[one.split(".")[-2]]
        names = [".".join([*one.split(".")[:-2], half, "weight"]) for half in halves]
        wanted[one] = torch.cat([wanted.pop(name) for name in names if name in wanted])
    assert wanted.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # The floor is for a router of one expert a token: its normed weight is 1, its gradient 0 up to rounding.
        assert (parameter.grad - wanted[name]).abs().max() < 1e-4 * wanted[name].abs().max() + 1e-8, name


# ---- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(ROPES)))
def test_both_rope_spellings_load_to_the_same_config(number, tmp_path):
    model = ours(number)
    model.save(tmp_path / "old")
    theirs(number).save_pretrained(tmp_path / "new")
    old, new = (json.loads((tmp_path / which / "config.json").read_text()) for which in ("old", "new"))
    assert "rope_theta" in old and "rope_scaling" in old and "rope_parameters" not in old
    assert "rope_parameters" in new and "rope_scaling" not in new
    found = [hf.read_config(tmp_path / which) for which in ("old", "new")]
    assert found[0].rope == found[1].rope == model.config.rope
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    assert found[0].model_copy(update=special) == found[1].model_copy(update=special) == model.config.model_copy(update=special)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(320,), (256, 512)], ids=["once", "twice"])
def test_an_extended_model_is_transformers_extended_model(tmp_path, lengths):
    """At positions past its first length, and not by luck: the model as it was says something else there."""
    model = tiny_model()
    seen = tokens(1, model.config.vocab_size, lengths[-1])
    with torch.no_grad():
        before = model(seen)
        for length in lengths:
            model.reposition_(model.config.extended(length))
        after = model(seen)
        model.save(tmp_path)
        expected = load_theirs(tmp_path)(seen).logits
    assert relative_error(after[:, 128:], expected[:, 128:]) < 1e-4 and relative_error(after[:, :128], expected[:, :128]) < 1e-4
    assert relative_error(before[:, 128:], expected[:, 128:]) > 0.01
    assert hf.load(tmp_path).config == model.config


def test_yarn_without_an_original_length_takes_the_models_own(tmp_path):
    """As transformers does."""
    ours(1).save(tmp_path)
    edit(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0}, max_position_embeddings=64)
    assert hf.read_config(tmp_path).rope.original_max_position_embeddings == 64
    batch = tokens(1, shape(1)["vocab_size"])
    assert relative_error(hf.load(tmp_path)(batch), load_theirs(tmp_path)(batch).logits) < 1e-4


@pytest.mark.parametrize(
    "field, value",
    [
        ("attention_bias", True), ("hidden_act", "gelu"), ("scoring_func", "softmax"), ("rope_interleave", False),
        ("topk_method", "greedy"), ("quantization_config", {"quant_method": "fp8"}), ("sliding_window", 128), ("num_key_value_heads", 7),
        ("moe_layer_freq", 2), ("attention_dropout", 0.1), ("model_type", "deepseek_v2"), ("n_group", None), ("rope_theta", None),
    ],
)  # fmt: skip
def test_a_field_that_is_not_honoured_is_refused_by_name(field, value, tmp_path):
    ours(0).save(tmp_path)
    edit(tmp_path, **{field: value})
    refused(tmp_path, field)


@pytest.mark.parametrize("field", ["n_group", "topk_group", "first_k_dense_replace", "routed_scaling_factor", "hidden_size", "q_lora_rank"])
def test_a_missing_field_is_not_guessed(field, tmp_path):
    """transformers' defaults are those of the 671B model; ours are other numbers: neither may be taken silently."""
    ours(0).save(tmp_path)
    edit(tmp_path, **{field: ...})
    refused(tmp_path, field)


@pytest.mark.parametrize(
    "scaling, named",
    [
        ({"type": "linear", "factor": 2.0}, "linear"),
        ({"type": "longrope", "factor": 2.0}, "longrope"),
        ({"type": "yarn"}, "factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rope_scaling_that_is_not_honoured_is_refused_by_name(scaling, named, tmp_path):
    ours(0).save(tmp_path)
    edit(tmp_path, rope_scaling=scaling)
    refused(tmp_path, named)


def refused(folder, *named: str) -> None:
    """Loading is BadInput: one sentence that names what is wrong."""
    with pytest.raises(BadInput) as caught:
        hf.load(folder)
    said = str(caught.value)
    assert all(name in said for name in named), said
    assert "\n" not in said and said.endswith(".") and len(said) < 400, said


# ---- MTP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 7, 11])
@torch.no_grad()
def test_mtp_states_are_those_of_transformers(number, tmp_path, monkeypatch):
    """Its MtpModel, filled from our files by its own conversion."""
    model = ours(number, num_nextn_predict_layers=2)
    model.save(tmp_path)
    # The class knows the MTP layer of the 61-layer model only.
    monkeypatch.setattr(DeepseekV3PreTrainedModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\..*", r"model\.layers\.4\..*"])
    main = load_theirs(tmp_path)
    oracle = MtpModel.from_pretrained(main).eval()
    batch = tokens(number, model.config.vocab_size, 24)
    positions = torch.arange(24).expand(2, 24)
    states = main.model(batch).last_hidden_state
    hidden, _ = model.hidden(batch)
    assert relative_error(hidden, states) < 1e-4
    shifted = batch
    for depth, (found, routing) in enumerate(model.mtp_hidden(hidden, batch)):
        shifted = shifted.roll(-1, 1)
        states = oracle.forward_layer(depth, states, positions, None, input_ids=shifted)
        sound = slice(0, 24 - depth - 1)  # later positions see tokens from the other end
        assert relative_error(found[:, sound], states[:, sound]) < 1e-4
        assert relative_error(model.head(found[:, sound]), oracle._project_to_logits(states[:, sound])) < 1e-4
        assert routing.load().sum() == batch.numel() * model.config.num_experts_per_tok


@torch.no_grad()
def test_mtp_modules_are_stored_as_v3_stores_them(tmp_path):
    model = ours(1, num_nextn_predict_layers=2, tie_word_embeddings=False)
    model.save(tmp_path)
    stored = hf.Weights(tmp_path)
    for layer in (3, 4):
        own = {n.removeprefix(f"model.layers.{layer}.") for n in stored.entries if n.startswith(f"model.layers.{layer}.")}
        mtp = {"enorm", "hnorm", "eh_proj", "shared_head.norm", "embed_tokens", "shared_head.head"}
        assert {f"{name}.weight" for name in mtp} <= own
        block = {n.removeprefix("model.layers.2.") for n in stored.entries if n.startswith("model.layers.2.")}
        assert own - {f"{name}.weight" for name in mtp} == block
        assert torch.equal(stored.take(f"model.layers.{layer}.shared_head.head.weight"), model.lm_head.weight)
        assert torch.equal(stored.take(f"model.layers.{layer}.embed_tokens.weight"), model.model.embed_tokens.weight)
    again = hf.load(tmp_path)
    batch = tokens(1, model.config.vocab_size)
    for (found, _), (expected, _) in zip(again.mtp_hidden(*half(again, batch)), model.mtp_hidden(*half(model, batch)), strict=True):
        assert torch.equal(found, expected)


def half(model, batch):
    return model.hidden(batch)[0], batch


def test_promised_but_absent_mtp_modules_are_left_out(tmp_path):
    """transformers drops the modules and keeps the number in config.json."""
    reference = theirs(3, num_mtp_layers=1)
    reference.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert hf.load(tmp_path).config.num_nextn_predict_layers == 0


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_an_mtp_copy_that_differs_is_refused(copy, tmp_path):
    ours(0, num_nextn_predict_layers=1).save(tmp_path)
    rewrite(tmp_path, **{f"model.layers.3.{copy}.weight": lambda t: t + 1})
    refused(tmp_path, f"model.layers.3.{copy}.weight")


def test_half_of_the_promised_mtp_modules_is_refused(tmp_path):
    ours(0, num_nextn_predict_layers=2).save(tmp_path)
    rewrite(tmp_path, **{name: None for name in hf.Weights(tmp_path).entries if name.startswith("model.layers.4.")})
    refused(tmp_path, "model.layers.4.")


# ---- shards ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_shards(tmp_path, monkeypatch):
    model = ours(3, num_nextn_predict_layers=1)
    monkeypatch.setattr(hf, "SHARD_BYTES", 10_000)
    model.save(tmp_path / "a")
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 2 and shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert set(index["weight_map"].values()) == set(shards)
    largest = max(p.numel() * 4 for p in [model.model.embed_tokens.weight])
    assert all((tmp_path / "a" / s).stat().st_size < max(10_000, largest) + 4096 for s in shards)
    again = hf.load(tmp_path / "a")
    batch = tokens(3, model.config.vocab_size)
    assert torch.equal(again(batch), model(batch))
    again.save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert relative_error(load_theirs(tmp_path / "a")(batch).logits, model(batch)) < 1e-4


@torch.no_grad()
def test_their_shards(tmp_path):
    model = theirs(7)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    batch = tokens(7, model.config.vocab_size)
    assert relative_error(hf.load(tmp_path)(batch), model(batch).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("first, second", [(10_000, 10**9), (10**9, 10_000), (10_000, 20_000)])
def test_saving_over_an_older_model_leaves_only_the_new_one(first, second, tmp_path, monkeypatch):
    """A folder sharded in another way must not be read in place of, or beside, the one just written."""
    monkeypatch.setattr(hf, "SHARD_BYTES", first)
    ours(0).save(tmp_path / "a")
    monkeypatch.setattr(hf, "SHARD_BYTES", second)
    other = ours(0)
    randomize_(other, 99)
    other.save(tmp_path / "a")
    other.save(tmp_path / "fresh")
    batch = tokens(0, other.config.vocab_size)
    assert torch.equal(hf.load(tmp_path / "a")(batch), other(batch))
    assert files(tmp_path / "a") == files(tmp_path / "fresh")


@torch.no_grad()
def test_a_full_disk_leaves_the_older_model(tmp_path, monkeypatch):
    """The last of several shards does not fit: nothing of the new model is there, all of the old one is."""
    monkeypatch.setattr(hf, "SHARD_BYTES", 10_000)
    ours(0).save(tmp_path)
    before = files(tmp_path)
    written = 0

    def full(fd, data, offset):
        nonlocal written
        written += len(data)
        if written > 25_000:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, offset)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    other = ours(0)
    randomize_(other, 99)
    with pytest.raises(OSError, match="No space"):
        other.save(tmp_path)
    assert files(tmp_path) == before


# ---- hostile folders -------------------------------------------------------------------------------------------------


def rewrite(folder, **changes) -> None:
    """Change tensors of model.safetensors: name -> function of the old one (None where there was none), or None to drop it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        old = tensors.pop(name, None)
        if change is not None:
            tensors[name] = change(old)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change, named",
    [
        ({NORM: None}, NORM),
        ({"model.layers.1.mlp.experts.3.up_proj.weight": None}, "model.layers.1.mlp.experts.3.up_proj.weight"),
        ({"model.extra.weight": lambda _: torch.zeros(3)}, "model.extra.weight"),
        ({"model.layers.2.mlp.experts.8.up_proj.weight": lambda _: torch.zeros(3)}, "experts.8.up_proj"),
        ({NORM: lambda t: t[:-1].clone()}, NORM),
        ({NORM: lambda t: t[None].clone()}, NORM),
        ({NORM: lambda t: t.to(torch.int32)}, NORM),
        ({NORM: lambda t: t.to(torch.float8_e4m3fn)}, NORM),
        ({"lm_head.weight": None}, "lm_head.weight"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change, named, tmp_path):
    ours(0).save(tmp_path)
    rewrite(tmp_path, **change)
    refused(tmp_path, named)


def test_an_untied_head_in_a_tied_folder_is_refused(tmp_path):
    """Ignoring it would change the model silently."""
    ours(0, tie_word_embeddings=True).save(tmp_path)
    rewrite(tmp_path, **{"lm_head.weight": lambda _: torch.zeros(shape(0)["vocab_size"], shape(0)["hidden_size"])})
    refused(tmp_path, "lm_head.weight")


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1])
def test_a_truncated_file_is_refused(keep, tmp_path):
    ours(0).save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "model.safetensors")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    ours(0).save(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"a": NaN', b'{"vocab_size": "many"}'])
def test_a_broken_config_is_refused(content, tmp_path):
    ours(0).save(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    ours(0).save(tmp_path)
    (tmp_path / name).unlink()
    refused(tmp_path, name)


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere")


def test_a_directory_in_place_of_a_file_is_refused(tmp_path):
    ours(0).save(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    refused(tmp_path, "config.json")


@pytest.mark.parametrize(
    "weight_map",
    [
        {NORM: "../model.safetensors"}, {NORM: "/etc/passwd"}, {NORM: "sub/model.safetensors"}, {NORM: ".."}, {NORM: ""}, {NORM: 3},
        [NORM], None,
        {NORM: "absent.safetensors"}, {"model.promised.weight": "model.safetensors"},
    ],
)  # fmt: skip
def test_a_hostile_index_is_refused(weight_map, tmp_path):
    ours(0).save(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path)


@torch.no_grad()
def test_document_mask_and_positions_default_to_one_document():
    """What the parity above compares is the plain forward."""
    model = tiny_model()
    batch = tokens(0, 61, 10)
    explicit = model(batch, torch.arange(10).expand(2, 10), torch.zeros(2, 10, dtype=torch.long))
    assert torch.equal(model(batch), explicit)
    assert F.softmax(explicit, -1).isfinite().all() and tiny_config() == model.config
