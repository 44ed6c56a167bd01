"""Every way to run the experts gives the same sum; the router at its edges; the balancing bias."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_error, tiny_config, tiny_model

from pascaline.model.moe import Experts, MoE, Router

E, K, D = 8, 2, 24


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experts(dtype=torch.float32) -> Experts:
    return tiny_model().model.layers[1].mlp.experts.to(dtype)


def routing(kind: str, n: int, seed: int = 0) -> torch.Tensor:
    """Expert indices [n, K], distinct in a row."""
    if kind == "random":
        return torch.rand(n, E, generator=torch.Generator().manual_seed(seed)).topk(K).indices
    if kind == "one gets all":  # expert 3 is in every row; half of the others get nothing
        return torch.stack((torch.full((n,), 3), torch.arange(n) % 3), 1)
    return torch.tensor([[6, 1]]).expand(n, K).contiguous()  # two experts get all, six none


def run(experts: Experts, path: str, x, weight, index):
    return getattr(experts, path)(x, weight, index)


PATHS = ["forward", *sorted(name for name in vars(Experts) if name.startswith("by_") and name != "by_loop")]
INFERENCE = ["by_all"]  # multiplies in place: no gradient is asked of it
KINDS = ["random", "one gets all", "two get all"]
SIZES = [1, 2, 5, 16, 40]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_every_path_is_the_loop(path, kind, n):
    layer = experts()
    x, index = randn(n, D), routing(kind, n)
    weight = randn(n, K, seed=1).sigmoid()
    assert relative_error(run(layer, path, x, weight, index), layer.by_loop(x, weight, index)) < 1e-5


@pytest.mark.parametrize("n", [1, 5, 9, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [p for p in PATHS if p not in INFERENCE])
def test_every_path_has_the_gradients_of_the_loop(path, kind, n):
    layer = experts()
    index, slope = routing(kind, n), randn(n, D, seed=2)

    def gradients(path):
        x, weight = randn(n, D).requires_grad_(), randn(n, K, seed=1).sigmoid().requires_grad_()
        run(layer, path, x, weight, index).backward(slope)
        found = [x.grad, weight.grad, layer.gate_up_proj.grad, layer.down_proj.grad]
        layer.zero_grad(set_to_none=True)
        return found

    for one, other in zip(gradients(path), gradients("by_loop"), strict=True):
        assert relative_error(one, other) < 1e-4
    idle = torch.bincount(index.flatten(), minlength=E) == 0
    assert not gradients(path)[2][idle].any()


def test_padding_passes_gradcheck():
    """Its hand-written gathers, in float64, against finite differences; an idle expert included."""
    layer = experts(torch.float64)
    index = routing("one gets all", 9)
    x = randn(9, D).double().requires_grad_()
    weight = randn(9, K, seed=1).sigmoid().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: layer.by_segment(a, b, index), (x, weight), fast_mode=True)


@pytest.mark.parametrize("n", [3, 40])
@torch.no_grad()
def test_paths_agree_in_bf16(n):
    layer = experts(torch.bfloat16)
    x, index = randn(n, D).bfloat16(), routing("random", n)
    weight = randn(n, K, seed=1).sigmoid()
    exact = experts().by_loop(x.float(), weight, index)
    for path in ("by_loop", *(p for p in PATHS if p != "by_grouped_mm")):  # grouped_mm is for CUDA
        found = run(layer, path, x, weight, index)
        assert found.dtype == torch.bfloat16 and relative_error(found.float(), exact) < 4e-2, path


# ---- router ----------------------------------------------------------------------------------------------------------


def router(seed: int = 0, **changes) -> Router:
    found = Router(tiny_config(**changes))
    with torch.no_grad():
        found.weight.copy_(randn(*found.weight.shape, seed=seed))
    return found


def by_hand(router: Router, x: torch.Tensor):
    """Chosen sets and weights by DeepSeek-V3's text (section 2.1.2), token by token, in plain Python."""
    c = router.config
    size = c.n_routed_experts // c.n_group
    out = []
    for row in (x.double() @ router.weight.double().T).sigmoid().tolist():
        biased = [s + b for s, b in zip(row, router.e_score_correction_bias.tolist(), strict=True)]
        groups = sorted(range(c.n_group), key=lambda g: -sum(sorted(biased[g * size : (g + 1) * size])[-2:]))[: c.topk_group]
        open_ = [e for e in range(c.n_routed_experts) if e // size in groups]
        chosen = sorted(open_, key=lambda e: -biased[e])[: c.num_experts_per_tok]
        total = sum(row[e] for e in chosen) if c.norm_topk_prob else 1.0
        out.append({e: row[e] / total * c.routed_scaling_factor for e in chosen})
    return out


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 3)]), st.booleans(), st.sampled_from([0.0, -0.8, -3.0, 2.0]),
       st.data())  # fmt: skip
def test_choices_and_weights_are_the_papers(groups, norm, level, data):
    n_group, topk_group = groups
    k = data.draw(st.integers(1, E // n_group * topk_group))
    found = router(data.draw(st.integers(0, 99)), n_group=n_group, topk_group=topk_group, num_experts_per_tok=k, norm_topk_prob=norm,
                   routed_scaling_factor=2.5)  # fmt: skip
    found.e_score_correction_bias.copy_(level + 0.5 * randn(E, seed=5))
    x = randn(13, D, seed=7)
    weight, (_, index, _) = found(x)
    assert weight.dtype == torch.float32 and index.shape == weight.shape == (13, k)
    for expected, weights, indices in zip(by_hand(found, x), weight.tolist(), index.tolist(), strict=True):
        assert dict(zip(indices, weights, strict=True)) == pytest.approx(expected, rel=1e-4)
        if norm:
            assert sum(weights) == pytest.approx(2.5, rel=1e-5)


def test_a_closed_group_is_never_chosen_however_negative_the_open_one():
    """With zeros in place of -inf (older transformers, litgpt) the closed group would win here."""
    found = router(n_group=2, topk_group=1, num_experts_per_tok=4)
    found.e_score_correction_bias.copy_(torch.tensor([-5.0] * 4 + [-6.0] * 4))
    _, (_, index, _) = found(randn(50, D))
    assert (index < 4).all()


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_ties_still_choose_k_different_experts(groups):
    found = router(n_group=groups[0], topk_group=groups[1], num_experts_per_tok=3)
    with torch.no_grad():
        found.weight.zero_()
    weight, (_, index, _) = found(randn(20, D))
    assert all(len(set(row)) == 3 for row in index.tolist())
    assert torch.allclose(weight, torch.full_like(weight, 1 / 3))
    size = E // groups[0]
    assert all(len({e // size for e in row}) <= groups[1] for row in index.tolist())


def test_scores_that_underflow_do_not_divide_by_zero():
    found = router()
    with torch.no_grad():
        found.weight.fill_(-1e4)
    weight, _ = found(torch.ones(3, D))
    assert weight.isfinite().all()


def test_the_bias_moves_the_choice_and_not_the_weights():
    found = router(num_experts_per_tok=1, norm_topk_prob=False)
    x = randn(30, D)
    scores = (x @ found.weight.detach().T).sigmoid()
    found.e_score_correction_bias[5] = 10.0
    weight, (_, index, _) = found(x)
    assert (index == 5).all() and torch.allclose(weight, scores[:, 5:6])
    found.e_score_correction_bias[5] = -10.0
    assert not (found(x)[1].chosen == 5).any()


def test_no_gradient_reaches_the_bias_and_all_scores_chosen_get_one():
    found = router(num_experts_per_tok=3)
    assert "e_score_correction_bias" in dict(found.named_buffers()) and "e_score_correction_bias" not in dict(found.named_parameters())
    found.e_score_correction_bias.requires_grad_()
    weight, (_, index, _) = found(0.2 * randn(4, D))
    (weight * randn(4, 3, seed=3)).sum().backward()
    assert found.e_score_correction_bias.grad is None
    chosen = torch.bincount(index.flatten(), minlength=E) > 0
    assert found.weight.grad.abs().sum(1)[chosen].gt(0).all() and not found.weight.grad[~chosen].any()


def test_the_router_scores_in_float32_whatever_comes_in():
    found = router()
    x = randn(40, D).bfloat16()
    weight, (_, index, _) = found(x)
    exact_weight, (_, exact_index, _) = found(x.float())
    assert weight.dtype == torch.float32 and torch.equal(index, exact_index) and torch.equal(weight, exact_weight)


def test_cast_leaves_routers_in_float32():
    model = tiny_model(num_nextn_predict_layers=1)
    before = [r.weight.clone() for r in model.routers()]
    model.cast_(torch.bfloat16)
    assert len(before) == 2 and all(torch.equal(a, r.weight) for a, r in zip(before, model.routers(), strict=True))
    assert {r.e_score_correction_bias.dtype for r in model.routers()} == {torch.float32}
    others = {p.dtype for n, p in model.named_parameters() if ".gate.weight" not in n}
    assert others == {torch.bfloat16} and model.dtype == torch.bfloat16


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 60])
@torch.no_grad()
def test_the_layer_is_routed_plus_shared_and_counts_its_load(n):
    layer = tiny_model(n_shared_experts=2).model.layers[1].mlp
    assert isinstance(layer, MoE)
    x = randn(2, n, D)
    y, routing = layer(x)
    load = routing.load()
    flat = x.flatten(0, 1)
    weight, (_, index, _) = layer.gate(flat)
    expected = layer.experts.by_loop(flat, weight, index) + layer.shared_experts(flat)
    assert relative_error(y.flatten(0, 1), expected) < 1e-5
    assert load.tolist() == torch.bincount(index.flatten(), minlength=E).tolist() and load.sum() == 2 * n * K


def test_without_shared_experts():
    layer = tiny_model(n_shared_experts=0).model.layers[1].mlp
    assert layer.shared_experts is None and not any("shared" in n for n, _ in layer.named_parameters())
    assert layer(randn(1, 3, D))[0].shape == (1, 3, D)


def test_loads_of_the_whole_model_count_every_token_once_per_layer():
    model = tiny_model(num_hidden_layers=4, first_k_dense_replace=1)
    _, routings = model.hidden(torch.zeros(3, 7, dtype=torch.long))
    assert [routing.load().sum() for routing in routings] == [3 * 7 * K] * 3
    dense = tiny_model(num_hidden_layers=2, first_k_dense_replace=2)
    assert dense.hidden(torch.zeros(1, 4, dtype=torch.long))[1] == []


# ---- balancing -------------------------------------------------------------------------------------------------------


def test_balance_moves_by_the_sign_and_centres():
    found = router()
    found.e_score_correction_bias.copy_(randn(E, seed=4))
    before = found.e_score_correction_bias.clone()
    load = torch.tensor([10, 0, 5, 5, 5, 5, 5, 5])
    found.balance(load, 0.01)
    step = 0.01 * torch.tensor([-1.0, 1.0, 0, 0, 0, 0, 0, 0])
    expected = before + step
    assert torch.allclose(found.e_score_correction_bias, expected - expected.mean(), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=E, max_size=E))
def test_overloaded_experts_go_down_against_idle_ones(load):
    found = router()
    found.balance(torch.tensor(load), 0.001)
    bias = found.e_score_correction_bias
    mean = sum(load) / E
    assert abs(float(bias.mean())) < 1e-6 and bias.isfinite().all()
    over = [b for b, c in zip(bias.tolist(), load, strict=True) if c > mean]
    under = [b for b, c in zip(bias.tolist(), load, strict=True) if c < mean]
    assert not over or max(over) < min(under)


@torch.no_grad()
def test_balancing_evens_out_a_collapsed_router():
    found = router()
    found.weight[0] += 0.5  # expert 0 is liked too much by tokens with a positive sum
    x = randn(400, D).abs()

    def violation() -> float:
        load = torch.bincount(found(x)[1].chosen.flatten(), minlength=E)
        return float(load.max() / load.float().mean())

    before = violation()
    for _ in range(300):
        found.balance(torch.bincount(found(x)[1].chosen.flatten(), minlength=E), 0.01)
    assert before > 2.5 and violation() < 1.5


def test_padding_is_not_counted_and_does_not_crowd_an_expert():
    model = tiny_model()
    tokens = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    tokens[:, 20:] = 2
    documents = torch.zeros(2, 40, dtype=torch.long)
    documents[:, 20:] = -1
    hidden, routings = model.hidden(tokens, document_ids_BT=documents)
    alone, routings_alone = model.hidden(tokens[:, :20])
    assert torch.allclose(hidden[:, :20], alone, atol=1e-5)
    for routing, routing_alone in zip(routings, routings_alone, strict=True):
        assert torch.equal(routing.load(documents >= 0), routing_alone.load())
