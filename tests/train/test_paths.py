"""The fast paths beside their plain forms: the same losses and gradients, and a line that says which one runs."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import relative_error, tiny_model
from torch import nn

from pascaline.data.batch import Batch
from pascaline.device import choose
from pascaline.model.attention import attend, visible, visible_blocks
from pascaline.model.fp8 import dequantise_blocks, dequantise_rows, quantise_blocks, quantise_rows
from pascaline.model.fp8_linear import Blocks, Fp8Linear, Rows, lacking, multiply, multiply_by_hardware, to_fp8_
from pascaline.model.transformer import Model
from pascaline.tables import Stage
from pascaline.train import losses, paths

DENSE = dict(model_type="qwen3", num_key_value_heads=1, head_dim=16)
KINDS = [dict(num_nextn_predict_layers=1, q_lora_rank=10), DENSE]


def batch(vocab_size: int = 61) -> Batch:
    """Rows of several documents and of padding."""
    tokens = torch.randint(0, vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 17 + [1] * 23, [0] * 5 + [1] * 9 + [2] * 20 + [-1] * 6])
    weights = (documents >= 0).float()
    return Batch(tokens, torch.arange(40).expand(2, 40), documents, {"ce": weights})


def learnt(model: Model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradients of one step."""
    packed = batch()
    loss, *_ = losses.compute(model, packed, losses.totals([packed]), losses.Loss(mtp=0.3 * bool(model.config.num_nextn_predict_layers)))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(found: tuple, expected: tuple, tolerance: float) -> None:
    assert relative_error(found[0], expected[0]) < tolerance
    assert set(found[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        assert relative_error(found[1][name], gradient) < tolerance, name


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_learn_the_same(kind, recomputed, monkeypatch):
    """Traced but not made into kernels, which takes a while; the next test does."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, fast = tiny_model(**kind).train(), tiny_model(**kind).train()
    told = paths.take(fast, Stage(compile=True), torch.float32)
    assert f"{2 + kind.get('num_nextn_predict_layers', 0)} layers compiled" in told[-1]
    plain.activation_checkpointing = fast.activation_checkpointing = recomputed
    close(learnt(fast), learnt(plain), 1e-4)


def test_compiled_kernels_learn_the_same():
    torch.compiler.reset()
    plain, fast = tiny_model(num_hidden_layers=1).train(), tiny_model(num_hidden_layers=1).train()
    paths.take(fast, Stage(compile=True), torch.float32)
    close(learnt(fast), learnt(plain), 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# ---- the document mask as blocks --------------------------------------------------------------------------------------


@torch.no_grad()
def test_blocks_of_the_mask_hide_what_the_mask_hides():
    documents = batch().document_ids
    q, k, v = (torch.randn(2, 3, 40, size, generator=torch.Generator().manual_seed(size)) for size in (24, 24, 16))
    for ids in (documents, None):
        mask = visible(ids, 2, 40, q.device, q.dtype)
        blocks = visible_blocks(ids, 2, 40, q.device)
        assert relative_error(attend(q, k, v, blocks, 0.2), attend(q, k, v, mask, 0.2)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_blocks_says_the_same(kind):
    model, packed = tiny_model(**kind), batch()
    expected = model(packed.tokens, packed.positions, packed.document_ids)
    model.flex = True
    assert relative_error(model(packed.tokens, packed.positions, packed.document_ids), expected) < 1e-4


# ---- fp8 -------------------------------------------------------------------------------------------------------------


def test_the_three_products_are_those_of_the_quantised_tensors():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 200, generator=draw).requires_grad_()
    layer = Fp8Linear(200, 150)
    y = layer(x)
    slope = torch.randn(3, 50, 150, generator=draw)
    y.backward(slope)
    q_x, q_w = dequantise_rows(*quantise_rows(x.detach())), dequantise_blocks(*quantise_blocks(layer.weight.detach()))
    assert torch.allclose(y, F.linear(q_x, q_w) + layer.bias, atol=1e-5)
    q_slope = dequantise_rows(*quantise_rows(slope))
    assert torch.allclose(x.grad, q_slope @ q_w, atol=1e-5)
    flat, tall = slope.flatten(0, 1), q_x.flatten(0, 1)
    along = dequantise_rows(*quantise_rows(flat.t())), dequantise_rows(*quantise_rows(tall.t()))
    assert torch.allclose(layer.weight.grad, along[0] @ along[1].t(), atol=1e-4)
    assert torch.allclose(layer.bias.grad, flat.sum(0), atol=1e-4)


def test_fp8_is_near_the_exact_product_and_not_equal():
    x, layer = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), nn.Linear(256, 128)
    exact = layer(x)
    layer.__class__ = Fp8Linear
    assert 1e-4 < relative_error(layer(x), exact) < 0.05


@pytest.mark.parametrize(
    "kind", [dict(q_lora_rank=10, first_k_dense_replace=2), DENSE]
)  # a router would choose other experts here and there
def test_a_model_in_fp8_has_nearly_the_same_loss_and_gradients(kind):
    plain, rough = tiny_model(**kind).train(), tiny_model(**kind).train()
    names = [n for n, _ in rough.named_parameters()]
    told = paths.take(rough, Stage(fp8=True), torch.float32)
    assert "emulated" in told[-1] and "cpu has no such product" in told[-1] and [n for n, _ in rough.named_parameters()] == names
    kinds = {name: type(m) for name, m in rough.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("lm_head") is nn.Linear and set(kinds.values()) == {Fp8Linear}
    (loss, gradients), (exact, expected) = learnt(rough), learnt(plain)
    assert 0 < abs(float(loss - exact)) < 0.05 * float(exact)
    a, b = (torch.cat([g[name].flatten() for name in sorted(expected)]) for g in (gradients, expected))
    assert F.cosine_similarity(a, b, 0) > 0.9


def test_fp8_learns():
    """The same fall of the loss as without, on one batch."""
    ends = []
    for fp8 in (False, True):
        model = tiny_model(initializer_range=0.1).init_(1).train()
        if fp8:
            to_fp8_(model)
        adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            loss, _ = learnt(model)
            adamw.step()
            adamw.zero_grad()
        ends.append(float(loss))
    assert ends[1] < 0.6 * 4.5 and abs(ends[1] - ends[0]) < 0.15 * 4.5


def test_what_runs_is_said():
    (told,) = paths.take(tiny_model(), Stage(), torch.bfloat16)
    assert told.startswith("bfloat16 on cpu") and "segment" in told and "blocks of queries" in told
    assert "experts" not in paths.take(tiny_model(**DENSE), Stage(), torch.float32)[0]


# ---- on an accelerator --------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_compiled_flex_attention_learns_the_same(kind):
    torch.compiler.reset()
    sizes = dict(kind) | (dict(qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16) if "model_type" not in kind else {})
    device = choose("cuda")
    plain, fast = tiny_model(**sizes).to(device).train(), tiny_model(**sizes).to(device).train()
    told = paths.take(fast, Stage(compile=True), torch.float32)
    assert "FlexAttention" in told[0]
    close(learnt(fast), learnt(plain), 5e-3)


@pytest.mark.gpu
@gpu
def test_cuda_fp8_products_are_the_emulated_ones():
    device = choose("cuda")
    if why := lacking(device):
        pytest.skip(why)
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, 384, generator=draw, device=device) for size in (512, 256))
    left = Rows(*quantise_rows(a))
    for right in (Rows(*quantise_rows(b)), Blocks(*quantise_blocks(b))):
        expected = F.linear(left.exact(), right.exact())
        assert relative_error(multiply_by_hardware(left, right, torch.bfloat16).float(), expected) < 0.02
        assert relative_error(multiply(left, right, torch.bfloat16).float(), expected) < 0.02
