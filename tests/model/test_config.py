"""Impossible shapes are one sentence that names the field; the presets have the published sizes."""

import pytest
import torch
from tiny import tiny_config

from pascaline.errors import BadInput
from pascaline.model.config import ModelConfig, Rope
from pascaline.model.presets import PRESETS, from_recipe
from pascaline.model.transformer import Model, parameter_counts


def refused(table: dict, *named: str) -> None:
    with pytest.raises(BadInput) as caught:
        from_recipe(table)
    said = str(caught.value)
    assert all(word in said for word in named) and "\n" not in said and len(said) < 300, said


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(num_experts_per_tok=9), ["num_experts_per_tok 9", "8"]),
        (dict(num_experts_per_tok=5, n_group=2), ["num_experts_per_tok 5", "4"]),
        (dict(num_experts_per_tok=7, n_group=4, topk_group=3), ["num_experts_per_tok 7", "6"]),
        (dict(qk_rope_head_dim=15), ["qk_rope_head_dim", "even"]),
        (dict(n_group=3), ["n_routed_experts 8", "n_group 3"]),
        (dict(n_group=8), ["n_group", "2"]),
        (dict(n_group=2, topk_group=3), ["topk_group 3", "n_group 2"]),
        (dict(first_k_dense_replace=5), ["first_k_dense_replace 5", "num_hidden_layers 4"]),
        (dict(first_k_dense_replace=-1), ["first_k_dense_replace"]),
        (dict(num_nextn_predict_layers=-1), ["num_nextn_predict_layers"]),
        (dict(n_shared_experts=-1), ["n_shared_experts"]),
        (dict(hidden_size=0), ["hidden_size"]),
        (dict(vocab_size=-3), ["vocab_size"]),
        (dict(num_hidden_layers=0), ["num_hidden_layers"]),
        (dict(q_lora_rank=0), ["q_lora_rank"]),
        (dict(kv_lora_rank=0), ["kv_lora_rank"]),
        (dict(v_head_dim=0), ["v_head_dim"]),
        (dict(hidden_size="wide"), ["hidden_size", "'wide'"]),
        (dict(hidden_size=1.5), ["hidden_size"]),
        (dict(rms_norm_eps=float("nan")), ["rms_norm_eps"]),
        (dict(hiden_size=64), ["hiden_size", "did you mean 'hidden_size'"]),
        (dict(n_expert_per_tok=2), ["n_expert_per_tok", "num_experts_per_tok"]),
        (dict(rope={"rope_type": "ntk"}), ["rope", "ntk", "yarn"]),
        (dict(rope={"rope_type": "yarn"}), ["rope", "factor"]),
        (dict(rope={"rope_type": "yarn", "factor": 0.0}), ["rope.factor"]),
        (dict(rope={"rope_theta": 0.0}), ["rope.rope_theta"]),
        (dict(rope={"rope_theta": 1e4, "facto": 2.0}), ["rope.facto"]),
    ],
)
def test_an_impossible_model_is_refused_by_name(changes, named):
    refused({"preset": "nano", **changes}, "model", *named)


def test_an_unknown_preset_names_the_nearest_and_all():
    refused({"preset": "nanoo"}, "nanoo", "did you mean 'nano'", "mini", "v3-671b")
    refused({"preset": "enormous"}, "enormous", "small")


def test_without_a_preset_the_sizes_are_needed():
    refused({"hidden_size": 64}, "model.", "missing")


@pytest.mark.parametrize("changes", [dict(n_group=4, topk_group=3, num_experts_per_tok=6), dict(first_k_dense_replace=0),
                                     dict(first_k_dense_replace=4), dict(n_shared_experts=0), dict(num_experts_per_tok=8)])  # fmt: skip
def test_the_last_possible_shape_is_possible(changes):
    model = Model(from_recipe({"preset": "nano", "vocab_size": 32, **changes})).init_(0)
    assert model(torch.arange(12)[None]).isfinite().all()


def test_an_override_leaves_the_rest_of_the_preset():
    config = from_recipe({"preset": "mini", "num_experts_per_tok": 2})
    assert config == ModelConfig(**{**PRESETS["mini"], "num_experts_per_tok": 2})


def test_a_config_cannot_be_changed_behind_a_models_back():
    with pytest.raises(Exception, match="frozen"):
        tiny_config().hidden_size = 3
    assert hash(Rope()) == hash(Rope())  # rotary frequencies are remembered by it


# ---- sizes (no memory is taken: parameters live on the meta device) --------------------------------------------------


def test_v3_has_the_published_sizes():
    """671B in total, 37B active with embeddings, one MTP module of 11.5B (arXiv 2412.19437 and the model card)."""
    counts = parameter_counts(ModelConfig(**PRESETS["v3-671b"]))
    assert counts["total"] == pytest.approx(671e9, rel=0.005)
    assert counts["active"] == pytest.approx(37.55e9, rel=0.005) and counts["active"] == pytest.approx(37e9, rel=0.02)
    assert counts["mtp"] == pytest.approx(11.5e9, rel=0.01)


def test_v3_by_hand():
    """The same number from the shapes in the paper's section 4.2, without our modules."""
    hidden, heads, q_rank, kv_rank, nope, rope, value = 7168, 128, 1536, 512, 128, 64, 128
    attention = hidden * q_rank + q_rank + q_rank * heads * (nope + rope)
    attention += hidden * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value) + heads * value * hidden
    expert = 3 * hidden * 2048
    moe = 256 * expert + expert + 256 * hidden
    total = 2 * 129280 * hidden + 61 * (attention + 2 * hidden) + 3 * 3 * hidden * 18432 + 58 * moe + hidden
    counts = parameter_counts(ModelConfig(**PRESETS["v3-671b"]))
    assert counts["total"] == total
    assert counts["active"] == total - 58 * (256 - 8) * expert
    assert counts["mtp"] == attention + moe + 2 * hidden + 2 * hidden * hidden + 3 * hidden


@pytest.mark.parametrize("name, total", [("mini", 15e6), ("small", 100e6), ("v3-16b", 16e9)])
def test_presets_have_the_sizes_they_are_named_for(name, total):
    assert parameter_counts(ModelConfig(**PRESETS[name]))["total"] == pytest.approx(total, rel=0.15)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_possible_and_counts_what_it_holds(name):
    config = ModelConfig(**PRESETS[name])
    counts = parameter_counts(config)
    with torch.device("meta"):
        model = Model(config)
    assert sum(p.numel() for p in model.parameters()) == counts["total"] + counts["mtp"]
    assert 0 < counts["active"] < counts["total"] if config.latent else counts["active"] == counts["total"]


@pytest.mark.parametrize("mtp", [0, 2])
def test_counts_of_a_small_model_by_its_tensors(mtp):
    config = tiny_config(num_nextn_predict_layers=mtp, num_hidden_layers=3)
    counts = parameter_counts(config)
    model = Model(config)
    own = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("model.layers.3.", "model.layers.4.")))
    idle = 2 * (config.n_routed_experts - config.num_experts_per_tok) * 3 * config.moe_intermediate_size * config.hidden_size
    assert counts["mtp"] == own and (own > 0) == (mtp > 0)
    assert counts["total"] - counts["active"] == idle


# ---- initialisation --------------------------------------------------------------------------------------------------


def test_init_is_a_normal_of_the_configured_range_and_repeats():
    config = from_recipe({"preset": "nano", "initializer_range": 0.05, "num_nextn_predict_layers": 1})
    model, again, other = Model(config).init_(3), Model(config).init_(3), Model(config).init_(4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), name
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert not torch.equal(parameter, dict(other.named_parameters())[name]), name
            assert float(parameter.detach().mean().abs()) < 0.01 and float(parameter.detach().std()) == pytest.approx(0.05, rel=0.1), name
    assert all(not r.e_score_correction_bias.any() for r in model.routers())


def test_an_extended_model_has_yarn_from_its_own_length():
    config = tiny_config(rope=Rope(rope_theta=500.0)).extended(320)
    assert config.max_position_embeddings == 320
    constants = dict(mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=128)
    assert config.rope == Rope(rope_type="yarn", rope_theta=500.0, factor=2.5, **constants)
    assert (config.rope.beta_fast, config.rope.beta_slow, config.rope.amplitude) == (32.0, 1.0, 1.0)
    assert config.attention_scale == pytest.approx(config.qk_head_dim**-0.5 * (0.1 * torch.tensor(2.5).log().item() + 1) ** 2)


def test_v3_before_its_extension_becomes_v3():
    v3 = from_recipe({"preset": "v3-671b"})
    assert v3.model_copy(update={"rope": Rope(), "max_position_embeddings": 4096}).extended(163840) == v3


def test_extending_again_starts_from_the_original_length_and_keeps_the_constants():
    once = tiny_config().extended(512)
    assert once.extended(1024) == tiny_config().extended(1024)
    own = tiny_config(rope=Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8.0, mscale=0.7))
    assert own.extended(256).rope == own.rope.model_copy(update={"factor": 8.0})
