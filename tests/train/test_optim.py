"""The optimizer against PyTorch's AdamW and against Muon written out; float32 masters under bf16 copies."""

import pytest
import torch
from tiny import relative_error, tiny_model

from pascaline.tables import Optim
from pascaline.train.optim import Optimizer, orthogonalise

F32, BF16 = torch.float32, torch.bfloat16


def optim(**changes) -> Optim:
    return Optim(**{"lr": 0.01, "weight_decay": 0.1, "clip": 1e9, **changes})


def set_gradients(model, seed: int, scale: float = 1.0, skip: str = "-") -> dict[str, torch.Tensor]:
    """Random gradients on the working copies, as a backward pass would leave them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(skip):
            found[name] = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
            parameter.grad = found[name].clone()
    return {n: g.float() for n, g in found.items()}


def update(optimizer: Optimizer, lr: float) -> float:
    norm = optimizer.norm()
    optimizer.step(lr, norm)
    return float(norm)


def masters(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {n: m.detach().clone() for n, m in optimizer.masters.items()}


# ---- AdamW -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("clip", [1e9, 0.5])
def test_steps_are_pytorchs_adamw(dtype, clip):
    """Matrices of the layers decay, the rest does not; the rate changes from step to step; clipping by the global norm."""
    model = tiny_model()
    plain = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, optim(clip=clip, beta1=0.8, beta2=0.9, eps=1e-6), dtype)
    decays = [p for n, p in plain.items() if p.dim() > 1 and n not in ("lm_head.weight", "model.embed_tokens.weight")]
    rest = [p for n, p in plain.items() if not any(p is d for d in decays)]
    assert len(rest) > 2 and len(decays) > 10
    reference = torch.optim.AdamW([dict(params=decays, weight_decay=0.1), dict(params=rest, weight_decay=0.0)], betas=(0.8, 0.9), eps=1e-6)
    for step, lr in enumerate((0.01, 0.003, 0.02)):
        gradients = set_gradients(model, step)
        optimizer.collect()
        for name, p in plain.items():
            p.grad = gradients[name]
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.values(), clip)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        assert update(optimizer, lr) == pytest.approx(float(expected_norm), rel=1e-5)
        for name, master in optimizer.masters.items():
            assert torch.allclose(master, plain[name], rtol=1e-5, atol=1e-6), name
    assert expected_norm > 10


def test_clipping_is_by_the_global_norm():
    model = tiny_model()
    optimizer = Optimizer(model, optim(clip=1.0), F32)
    gradients = set_gradients(model, 0, scale=3.0)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    optimizer.collect()
    seen = {}
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.update({n: m.grad.clone() for n, m in optimizer.masters.items()}))
    assert update(optimizer, 0.01) == pytest.approx(float(norm), rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(seen[name], gradient / norm, rtol=1e-4), name


def test_small_gradients_are_not_scaled_up():
    model = tiny_model()
    optimizer = Optimizer(model, optim(clip=1e6), F32)
    gradients = set_gradients(model, 0, scale=1e-3)
    optimizer.collect()
    seen = {}
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.update({n: m.grad.clone() for n, m in optimizer.masters.items()}))
    update(optimizer, 0.01)
    assert all(torch.equal(seen[n], g) for n, g in gradients.items())


def test_micro_batches_add_up_in_float32():
    """256 + 1 is 256 in bf16; the sum of two micro-batches must not lose the 1."""
    model = tiny_model()
    optimizer = Optimizer(model, optim(), BF16)
    for value in (256.0, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.collect()
    assert all((m.grad == 257.0).all() for m in optimizer.masters.values())
    assert all(p.grad is None for p in model.parameters())


def test_gradients_do_not_carry_over():
    model = tiny_model()
    optimizer = Optimizer(model, optim(), F32)
    set_gradients(model, 0)
    optimizer.collect()
    update(optimizer, 0.01)
    assert all(m.grad is None for m in optimizer.masters.values())
    gradients = set_gradients(model, 1)
    optimizer.collect()
    assert all(torch.equal(optimizer.masters[n].grad, g) for n, g in gradients.items())


# ---- masters and working copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bf16_copies_follow_the_masters(kind):
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, optim(optimizer=kind), BF16)
    assert all(torch.equal(before[n], m) for n, m in optimizer.masters.items())
    for step in range(3):
        set_gradients(model, step)
        optimizer.collect()
        update(optimizer, 0.01)
        for name, parameter in model.named_parameters():
            master = optimizer.masters[name]
            assert master.dtype == F32 and not torch.equal(master, before[name])
            assert torch.equal(parameter, master.to(parameter.dtype)), name
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    assert {kinds[n] for n in kinds if n.endswith("mlp.gate.weight")} == {F32}
    assert {kinds[n] for n in kinds if not n.endswith("mlp.gate.weight")} == {BF16}


def test_in_float32_master_and_copy_are_one():
    model = tiny_model()
    optimizer = Optimizer(model, optim(), F32)
    assert all(p.data_ptr() == optimizer.masters[n].data_ptr() for n, p in model.named_parameters())


def test_small_updates_are_not_lost_in_bf16():
    """100 steps, each far below the resolution of bf16 at 1, add up."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = Optimizer(model, optim(weight_decay=0.0), BF16)
    for _ in range(100):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.collect()
        update(optimizer, 2e-4)
    for name, parameter in model.named_parameters():
        assert torch.allclose(optimizer.masters[name], torch.tensor(0.98), atol=1e-4), name
        assert (parameter.float() - 0.98).abs().max() < 4e-3 and (parameter < 0.99).all(), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_non_finite_gradient_changes_nothing(bad, kind, dtype):
    model = tiny_model()
    optimizer = Optimizer(model, optim(optimizer=kind, clip=1.0), dtype)
    set_gradients(model, 0)
    optimizer.collect()
    update(optimizer, 0.01)
    before = {n: t.clone() for n, t in optimizer.state().items()}
    working = {n: p.detach().clone() for n, p in model.named_parameters()}
    set_gradients(model, 1)
    model.model.norm.weight.grad[3] = bad
    optimizer.collect()
    assert not torch.isfinite(optimizer.norm())
    optimizer.drop()
    after = optimizer.state()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert all(torch.equal(p, working[n]) for n, p in model.named_parameters())
    set_gradients(model, 2)
    optimizer.collect()
    assert update(optimizer, 0.01) < float("inf")
    assert not torch.equal(optimizer.masters["model.norm.weight"], before["master.model.norm.weight"])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parameters_without_a_gradient_are_left_alone(kind):
    """MTP modules while their loss is off: RL, or mtp = 0."""
    model = tiny_model(num_nextn_predict_layers=1)
    optimizer = Optimizer(model, optim(optimizer=kind), F32)
    before = masters(optimizer)
    set_gradients(model, 0, skip="model.layers.2.")
    optimizer.collect()
    update(optimizer, 0.01)
    for name, master in optimizer.masters.items():
        assert torch.equal(master, before[name]) == name.startswith("model.layers.2."), name


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("done", [0, 2])
def test_state_goes_on_bit_for_bit(kind, dtype, done):
    """Into another model with other weights: everything comes from the state."""

    def advance(model, optimizer, steps):
        for step in steps:
            set_gradients(model, step)
            optimizer.collect()
            update(optimizer, 0.01 / (step + 1))

    model = tiny_model()
    straight = Optimizer(model, optim(optimizer=kind), dtype)
    advance(model, straight, range(done))
    state = {n: t.clone() for n, t in straight.state().items()}
    assert all(isinstance(t, torch.Tensor) for t in state.values())
    other = tiny_model(seed=5)
    resumed = Optimizer(other, optim(optimizer=kind), dtype)
    for name, tensor in resumed.room(set(state)).items():
        tensor.copy_(state[name])
    resumed.reload()
    advance(model, straight, range(done, 5))
    advance(other, resumed, range(done, 5))
    expected = straight.state()
    for name, tensor in resumed.state().items():
        assert torch.equal(tensor, expected[name]), name
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


# ---- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 20), (3, 20, 6), (2, 64, 64)])
def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    inner = u.transpose(1, 2) @ orthogonalise(g).double() @ vh.transpose(1, 2)
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3
    sound = s > 0.05 * s.amax(1, keepdim=True)  # five steps do not lift the tiniest
    assert (values[sound] > 0.6).all() and (values[sound] < 1.25).all()
    assert torch.allclose(orthogonalise(1e4 * g), orthogonalise(g), atol=1e-3)


def test_muon_moves_the_layers_matrices_and_adamw_the_rest():
    model = tiny_model()
    optimizer = Optimizer(model, optim(optimizer="muon"), F32)
    by_muon = set(optimizer.muon.momentum)
    expected = {n for n, p in model.named_parameters() if p.dim() > 1} - {"lm_head.weight", "model.embed_tokens.weight"}
    assert by_muon == {n for n in expected if not n.endswith("mlp.gate.weight")}
    set_gradients(model, 0)
    optimizer.collect()
    update(optimizer, 0.01)
    assert {n.removeprefix("exp_avg.") for n in optimizer.state() if n.startswith("exp_avg.")} == set(optimizer.masters) - by_muon


def test_muon_written_out():
    """Nesterov momentum, each expert's gate, up and down alone, 0.2 sqrt(max side), decoupled decay; two steps."""
    model = tiny_model()
    optimizer = Optimizer(model, optim(optimizer="muon", momentum=0.9), F32)
    expected = masters(optimizer)
    momentum = {n: torch.zeros_like(expected[n]) for n in optimizer.muon.momentum}
    for step, lr in enumerate((0.02, 0.01)):
        gradients = set_gradients(model, step)
        optimizer.collect()
        update(optimizer, lr)
        for name, m in momentum.items():
            g = gradients[name]
            m.mul_(0.9).add_(0.1 * g)
            look = 0.1 * g + 0.9 * m
            if "gate_up_proj" in name:  # of one MLP or of all experts
                half = look.shape[-2] // 2
                stack = look if look.dim() == 3 else look[None]
                pieces = torch.stack([torch.cat([orthogonalise(e[None, :half])[0], orthogonalise(e[None, half:])[0]]) for e in stack])
                pieces, side = pieces.view_as(look), max(half, look.shape[-1])
            elif look.dim() == 3:
                pieces, side = torch.stack([orthogonalise(e[None])[0] for e in look]), max(look.shape[1:])
            else:
                pieces, side = orthogonalise(look[None])[0], max(look.shape)
            expected[name] = expected[name] * (1 - lr * 0.1) - lr * 0.2 * side**0.5 * pieces
    for name in momentum:
        assert relative_error(optimizer.masters[name], expected[name]) < 1e-4, name


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_muon_does_not_depend_on_how_many_matrices_go_together(dtype, monkeypatch):
    found = []
    for chunk in (1, 3000, 1 << 20):  # one matrix, a few with a rest, all
        monkeypatch.setattr("pascaline.train.optim.CHUNK", chunk)
        optimizer = Optimizer(model := tiny_model(), optim(optimizer="muon"), dtype)
        for step in range(2):
            set_gradients(model, step)
            optimizer.collect()
            update(optimizer, 0.01)
        found.append(masters(optimizer))
    for name in optimizer.muon.momentum:
        assert all(relative_error(other[name], found[0][name]) < (1e-5 if dtype == F32 else 1e-3) for other in found[1:]), name


def test_orthogonalise_in_bf16_is_that_of_float32_but_for_the_rounding():
    g = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(0))
    assert relative_error(orthogonalise(g.to(BF16)).float(), orthogonalise(g)) < 0.05
