"""Latent attention: expanded, absorbed and cached agree; documents do not see each other; rotary angles are transformers'."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_error, tiny_config, tiny_model
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pascaline.engine.blocks import BLOCK
from pascaline.engine.cache import Batch, bytes_per_token
from pascaline.model import attention
from pascaline.model.attention import LatentAttention, attend, visible
from pascaline.model.config import Rope
from pascaline.model.fused import rms_norm, rms_norm_plain
from pascaline.model.rope import inverse_frequencies, rotate, turns

YARN = Rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=4.0, mscale=0.8, mscale_all_dim=1.0)
SHAPES = [dict(), dict(q_lora_rank=10), dict(rope=YARN, num_attention_heads=3), dict(q_lora_rank=7, rope=YARN, v_head_dim=10)]


def randint(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- absorbed, cached ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_absorbed_is_expanded(changes, rows):
    layer = tiny_model(**changes).model.layers[0].self_attn
    assert isinstance(layer, LatentAttention)
    c = layer.config
    q_nope = randn(rows, 11, c.num_attention_heads, c.qk_nope_head_dim)
    q_rope, entries = randn(rows, 11, c.num_attention_heads, c.qk_rope_head_dim, seed=1), randn(rows, 11, c.cache_width, seed=2)
    latent, k_rope = entries.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    mask = visible(None, rows, 11, entries.device, entries.dtype).expand(rows, -1, -1)
    expanded = layer._expanded(q_nope, q_rope, latent, k_rope.unsqueeze(2), mask)
    assert relative_error(layer._absorbed(q_nope, q_rope, entries, mask), expanded) < 1e-4


FAMILIES = [*SHAPES, dict(model_type="llama"), dict(model_type="qwen2", num_key_value_heads=1), dict(model_type="qwen3", head_dim=8)]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("changes", FAMILIES)
@torch.no_grad()
def test_steps_of_any_size_are_the_full_forward(changes, paged, monkeypatch):
    """Four texts on a pool of blocks, in random chunks and company; two share the blocks of their common beginning. paged: as where there
    is a kernel that reads the entries where they lie (here in its plain form)."""
    if paged:
        monkeypatch.setattr(attention, "lacking", lambda device: "")
    model, draw = tiny_model(**changes), random.Random(1)
    texts = [randint(61, 40, seed=i) for i in range(3)]
    texts.append(torch.cat((texts[1][:BLOCK], randint(61, 23, seed=9))))
    pool = torch.zeros(2, 20, BLOCK, model.config.cache_width)
    tables = np.array([[4, 2, 9], [1, 17, 3], [10, 11, 12], [1, 5, 6]], np.int32)
    full = [model.hidden(text[None])[0][0] for text in texts]
    at, sizes = [0, 0, 0, BLOCK], set()
    while any(a < len(t) for a, t in zip(at, texts, strict=True)):
        rows = [i for i in range(4) if at[i] < len(texts[i]) and (i < 3 or at[1] >= BLOCK) and draw.random() < 0.8]
        counts = [min(draw.choice([1, 1, 2, 5, 30]), len(texts[i]) - at[i]) for i in rows]
        if not rows:
            continue
        batch = Batch(pool, tables[rows], [at[i] for i in rows], counts)
        tokens = torch.cat([texts[i][at[i] : at[i] + n] for i, n in zip(rows, counts, strict=True)])
        hidden, _ = model.hidden(tokens[None], batch.position_n[None], cache=batch)
        for i, n, own in zip(rows, counts, hidden[0].split(counts), strict=True):
            assert relative_error(own, full[i][at[i] : at[i] + n]) < 1e-4
            at[i] += n
        sizes.add((len(batch.parts), batch.few))
    assert {few for _, few in sizes} == {True, False} and len({parts for parts, _ in sizes}) > 1
    assert not pool[:, [0, 7, 8, 13]].any()  # nobody's blocks


@torch.no_grad()
def test_a_long_part_attends_to_more_than_its_own_positions():
    """300 new tokens after 100 stored ones, more than a block of queries; rows of a part start at different positions."""
    model = tiny_model(max_position_embeddings=512)
    texts = randint(61, 2, 400)
    pool, tables = torch.zeros(2, 60, BLOCK, model.config.cache_width), np.arange(1, 53, dtype=np.int32).reshape(2, 26)
    for starts, counts in (([0, 0], [100, 10]), ([100, 10], [300, 390])):
        batch = Batch(pool, tables, starts, counts)
        tokens = torch.cat([text[a : a + n] for text, a, n in zip(texts, starts, counts, strict=True)])
        hidden, _ = model.hidden(tokens[None], batch.position_n[None], cache=batch)
    for own, text in zip(hidden[0].split([300, 390]), texts, strict=True):
        assert relative_error(own, model.hidden(text[None])[0][0, -len(own) :]) < 1e-4


@pytest.mark.parametrize("new, stored, absorbed", [(1, 500, True), (4, 500, True), (500, 500, False), (200, 500, False)])
def test_the_form_is_chosen_by_its_cost(new, stored, absorbed, monkeypatch):
    """DeepSeek-V3's proportions: one head of it."""
    c = tiny_config(num_attention_heads=1, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    layer, taken = LatentAttention(c, 0), []
    for name in ("_absorbed", "_expanded"):
        monkeypatch.setattr(layer, name, lambda *args, name=name, **kw: taken.append(name))
    layer._stored(torch.zeros(1, new, 1, 128), torch.zeros(1, new, 1, 64), torch.zeros(1, stored, 576), torch.zeros(1, new, stored))
    assert taken == ["_absorbed" if absorbed else "_expanded"]


def test_bytes_of_a_token_in_the_cache():
    """reference/serving.md B: DeepSeek-V3 and Qwen2.5-72B in bf16."""
    latent = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_hidden_layers=61)
    assert bytes_per_token(tiny_config(**latent), torch.bfloat16) == 70_272
    grouped = dict(model_type="qwen2", num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8)
    assert bytes_per_token(tiny_config(**grouped), torch.bfloat16) == 327_680


# ---- documents -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 1000))
def test_packed_documents_give_the_logits_of_each_alone(lengths, padding, seed):
    model = tiny_model(**SHAPES[seed % 2])
    documents = [randint(61, n, seed=seed + i) for i, n in enumerate(lengths)]
    pad = torch.full((padding,), 2)
    tokens = torch.cat([*documents, pad])[None]
    ids = torch.cat([*(torch.full((n,), i) for i, n in enumerate(lengths)), torch.full((padding,), -1)])[None]
    positions = torch.cat([*(torch.arange(n) for n in lengths), torch.zeros(padding, dtype=torch.long)])[None]
    with torch.no_grad():
        packed = model(tokens, positions, ids)[0]
        assert packed.isfinite().all()
        for document, part in zip(documents, packed[: sum(lengths)].split(lengths), strict=True):
            assert relative_error(part, model(document[None])[0]) < 1e-4


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_another_document_is_another_world(changed):
    """Changing one document leaves logits and gradients of the others alone, under grad (the trainer's paths)."""
    model = tiny_model()
    ids = torch.arange(3).repeat_interleave(8)[None]
    positions = torch.arange(8).repeat(3)[None]
    tokens = randint(61, 1, 24)
    other = torch.where(ids == changed, (tokens + 1) % 61, tokens)
    logits = [model(t, positions, ids)[0] for t in (tokens, other)]
    for document in range(3):
        span = slice(8 * document, 8 * document + 8)
        difference = (logits[0][span] - logits[1][span]).abs().max()
        assert difference > 0.1 if document == changed else difference < 1e-5
    embedded = model.model.embed_tokens.weight
    (slope,) = torch.autograd.grad(logits[0][8:16].sum(), embedded)
    outside = set(tokens[0, :8].tolist() + tokens[0, 16:].tolist()) - set(tokens[0, 8:16].tolist())
    assert outside and not slope[sorted(outside)].any()


def test_tokens_do_not_see_the_future():
    model = tiny_model()
    tokens = randint(61, 1, 20)
    other = tokens.clone()
    other[0, 12:] = (other[0, 12:] + 5) % 61
    with torch.no_grad():
        before, after = model(tokens)[0], model(other)[0]
    assert (before[:12] - after[:12]).abs().max() < 1e-5 < 0.1 < (before[12] - after[12]).abs().max()


# ---- the CPU's blocks against PyTorch's kernel -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 31, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_of_queries_against_pytorch(length, packed, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    check_attend(length, packed)


@pytest.mark.parametrize("length", [127, 128, 300])
def test_the_real_block_size_against_pytorch(length):
    assert attention.QUERY_BLOCK < 300
    check_attend(length, packed=True)


def check_attend(length: int, packed: bool) -> None:
    q, k, v = randn(2, 3, length, 10), randn(2, 3, length, 10, seed=1), randn(2, 3, length, 6, seed=2)
    ids = randint(3, 2, length, seed=length).sort(-1).values if packed else None
    mask = visible(ids, 2, length, q.device, q.dtype)
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None]
    if ids is not None:
        seen = seen & (ids[:, :, None] == ids[:, None, :])
    ours, theirs = ([t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2))
    found = attend(*ours, mask, 0.37)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=seen.unsqueeze(1), scale=0.37)
    assert found.shape == expected.shape and relative_error(found, expected) < 1e-5
    slope = randn(*found.shape, seed=3)
    found.backward(slope)
    expected.backward(slope)
    for one, other in zip(ours, theirs, strict=True):
        # One token attends to itself alone: queries and keys get no gradient but rounding.
        assert (one.grad - other.grad).abs().max() < 1e-5 * max(1.0, float(other.grad.abs().max()))


# ---- rotary positions ------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 32), st.sampled_from([100.0, 10000.0, 500000.0]), st.floats(1.0, 64.0), st.sampled_from([16, 300, 4096]),
    st.sampled_from([8.0, 32.0]), st.sampled_from([1.0, 2.0]),
    st.sampled_from([(None, None), (1.0, 1.0), (0.707, 1.0), (1.0, None), (None, 0.707)]),
)  # fmt: skip
def test_yarn_is_transformers_yarn(half, theta, factor, original, fast, slow, mscales):
    mscale, all_dim = mscales
    fields = dict(rope_type="yarn", rope_theta=theta, factor=factor, original_max_position_embeddings=original)
    fields |= {"beta_fast": fast, "beta_slow": slow}
    fields |= {k: v for k, v in (("mscale", mscale), ("mscale_all_dim", all_dim)) if v is not None}
    theirs = DeepseekV3Config(qk_rope_head_dim=2 * half, rope_parameters=dict(fields))
    expected, amplitude = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    rope = Rope(**fields)
    assert rope.amplitude == pytest.approx(amplitude, rel=1e-6)
    assert torch.allclose(inverse_frequencies(rope, 2 * half, torch.device("cpu")), expected, rtol=1e-5, atol=0)


def test_rotation_is_a_complex_product_of_interleaved_pairs():
    x, positions = randn(2, 5, 3, 8), torch.tensor([[0, 1, 2, 3, 4], [9, 0, 500, 1, 1]])
    rope = Rope(rope_theta=100.0)
    found = rotate(x, turns(rope, 8, positions))
    angle = positions[..., None].double() * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
    spin = torch.polar(torch.ones_like(angle), angle).unsqueeze(2)
    expected = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (4, 2)).contiguous()) * spin).flatten(-2)
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(found[0, 0], x[0, 0])  # position 0 is not turned


def test_only_distances_count():
    """Shifting all positions changes no logit (default RoPE is relative)."""
    model = tiny_model()
    tokens, positions = randint(61, 1, 10), torch.arange(10)[None]
    with torch.no_grad():
        assert relative_error(model(tokens, positions + 37), model(tokens, positions)) < 1e-4
        assert relative_error(model(tokens, positions * 2), model(tokens, positions)) > 1e-2


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, scale", [((4, 9, 24), 1.0), ((1, 1, 5), 1.0), ((2, 3, 64), 1e-3), ((2, 3, 64), 1e3), ((0, 8), 1.0)])
def test_rms_norm_and_its_gradient_are_pytorchs(shape, scale):
    x, weight, slope = scale * randn(*shape), 1 + 0.3 * randn(shape[-1], seed=1), randn(*shape, seed=2)
    found = gradients(rms_norm, x, weight, slope)
    for one, other in zip(found, gradients(rms_norm_plain, x.double(), weight.double(), slope.double()), strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert x.numel() == 0 or relative_error(one, other) < 1e-5


def test_rms_norm_in_bf16_is_near_the_exact_one():
    x, weight, slope = randn(4, 9, 64), 1 + 0.3 * randn(64, seed=1), randn(4, 9, 64, seed=2)
    rounded = [t.bfloat16() for t in (x, weight, slope)]
    exact = gradients(rms_norm_plain, *(t.double() for t in rounded))
    for one, other in zip(gradients(rms_norm, *rounded), exact, strict=True):
        assert one.dtype == torch.bfloat16 and relative_error(one, other) < 2e-2


def gradients(norm, x, weight, slope):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = norm(x, weight, 1e-6)
    y.backward(slope)
    return y.detach(), x.grad, weight.grad


def test_training_and_decoding_norms_agree():
    """With gradients and without: law 1 rests on it."""
    x, weight = randn(50, 24), 1 + 0.3 * randn(24, seed=1)
    with torch.no_grad():
        off = rms_norm(x, weight, 1e-6)
    assert relative_error(rms_norm(x, weight.requires_grad_(), 1e-6), off) < 1e-6
