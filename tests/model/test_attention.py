"""Latent attention: expanded, absorbed and cached agree; documents do not see each other; rotary angles are transformers'."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_error, tiny_config, tiny_model
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pascaline.engine import cache as cache_module
from pascaline.engine.cache import PrefillCache, TokenCache
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


class Everything:
    """A cache that holds exactly the new tokens but is not fresh, so that attention takes the absorbed form."""

    fresh = False

    def append(self, layer, entries_BTC):
        return entries_BTC, visible(None, 1, entries_BTC.shape[1], entries_BTC.device, entries_BTC.dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_absorbed_is_expanded(changes, rows):
    config = tiny_config(**changes)
    layer = tiny_model(**changes).model.layers[0].self_attn
    assert isinstance(layer, LatentAttention)
    x = randn(rows, 11, config.hidden_size)
    turn = turns(config.rope, config.qk_rope_head_dim, torch.arange(11).expand(rows, 11))
    mask = visible(None, rows, 11, x.device, x.dtype)
    assert relative_error(layer(x, turn, mask, Everything()), layer(x, turn, mask)) < 1e-4


@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_decoding_token_by_token_is_the_full_forward(changes, monkeypatch):
    """Ragged prompts, rows that share a prompt, a cache that grows several times."""
    monkeypatch.setattr(cache_module, "BLOCK", 4)
    model = tiny_model(**changes)
    texts = [randint(61, 19, seed=i) for i in range(3)]
    texts.append(torch.cat((texts[1][:7], randint(61, 12, seed=9))))  # the same prompt as row 1, another continuation
    lengths, which = [3, 7, 5, 7], [0, 1, 2, 1]
    prefill = PrefillCache()
    padded = torch.stack([F.pad(texts[i][: lengths[i]], (0, 7 - lengths[i])) for i in range(3)])
    model.hidden(padded, cache=prefill)
    cache = TokenCache(model.config, 4, torch.float32, torch.device("cpu"))
    cache.put(torch.arange(4), torch.tensor(which), prefill, torch.tensor(lengths))
    full = [model.hidden(text[None])[0][0] for text in texts]
    at = list(lengths)
    for _ in range(12):
        cache.begin(4, max(at))
        tokens = torch.stack([text[i] for text, i in zip(texts, at, strict=True)]).unsqueeze(1)
        hidden, _ = model.hidden(tokens, cache.lengths.unsqueeze(1), cache=cache)
        cache.advance(cache.rows)
        for row in range(4):
            assert relative_error(hidden[row, 0], full[row][at[row]]) < 1e-4
        at = [i + 1 for i in at]
        assert cache.lengths.tolist() == at


@torch.no_grad()
def test_moved_rows_go_on_as_before():
    model = tiny_model()
    texts = randint(61, 3, 9)
    prefill = PrefillCache()
    model.hidden(texts[:, :6], cache=prefill)
    cache = TokenCache(model.config, 3, torch.float32, torch.device("cpu"))
    cache.put(torch.arange(3), torch.arange(3), prefill, torch.tensor([6, 4, 5]))
    cache.move(torch.tensor([2]), torch.tensor([0]))  # row 0 ended; its place goes to row 2
    cache.begin(2, 5)
    hidden, _ = model.hidden(texts[[2, 1], [5, 4]].unsqueeze(1), cache.lengths[:2].unsqueeze(1), cache=cache)
    assert relative_error(hidden[0, 0], model.hidden(texts[2:, :6])[0][0, 5]) < 1e-4
    assert relative_error(hidden[1, 0], model.hidden(texts[1:2, :5])[0][0, 4]) < 1e-4


def test_the_cache_holds_the_latent_and_one_rotary_key():
    config = tiny_config()
    cache = TokenCache(config, 5, torch.bfloat16, torch.device("cpu"))
    assert cache.width == config.kv_lora_rank + config.qk_rope_head_dim
    assert cache.bytes_per_token() == config.num_hidden_layers * cache.width * 2


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
