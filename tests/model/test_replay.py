"""Router replay: the experts of the rollout are used again, and the share of those that would be chosen otherwise is told."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model, with_routes

from pascaline.data.batch import Batch, Sample, batches, collate
from pascaline.errors import BadInput
from pascaline.model.moe import MoE, Router
from pascaline.model.transformer import Model
from pascaline.post.check import check
from pascaline.post.minibatches import documents, store, stored
from pascaline.post.moment import Moment
from pascaline.post.reference import logprobs
from pascaline.recipe import load
from pascaline.tables import Rl
from pascaline.train.losses import Loss, compute, totals
from pascaline.train.policy import Policy

REPLAY, FREE = Loss(policy=Policy(replay=True)), Loss()
LAYERS = dict(num_hidden_layers=3, first_k_dense_replace=1, num_nextn_predict_layers=1)


def rollout(seed: int = 0) -> list[Batch]:
    draw, samples = np.random.default_rng(seed), []
    for n in (9, 5, 12, 7, 3):
        streams = {"rl": np.ones(n), "advantage": np.full(n, draw.normal()), "old_logprob": np.full(n, -4.0)}
        samples.append(Sample(draw.integers(3, 61, size=n), {name: s.astype(np.float32) for name, s in streams.items()}))
    return batches(samples, 16, 2, 0)


def recorded(model: Model) -> list[Batch]:
    return with_routes(model, rollout())


@torch.no_grad()
def moved(model: Model) -> Model:
    generator = torch.Generator().manual_seed(9)
    for p in model.parameters():
        p.add_(0.1 * p.abs().mean() * torch.randn(p.shape, generator=generator))
    return model


def step(model: Model, found: list[Batch], rule: Loss) -> tuple[float, list[torch.Tensor], float, torch.Tensor]:
    """Loss, gradients, share rerouted and loads of one optimizer step."""
    model.zero_grad(set_to_none=True)
    total, value, rerouted, load = totals(found), 0.0, 0.0, torch.zeros(())
    for batch in found:
        loss, logs, loads = compute(model, batch, total, rule)
        loss.backward()
        value, rerouted, load = value + loss.item(), rerouted + float(logs.get("rerouted", -1.0)), load + loads
    return value, [p.grad.clone() for p in model.parameters() if p.grad is not None], rerouted, load


@pytest.mark.parametrize("checkpointed", [False, True])
def test_with_the_weights_of_that_moment_replay_changes_no_bit(checkpointed: bool) -> None:
    model = tiny_model(**LAYERS)
    model.activation_checkpointing = checkpointed
    found = recorded(model)
    free, replayed = (step(model, found, rule) for rule in (FREE, REPLAY))
    assert free[0] == replayed[0] and all(torch.equal(a, b) for a, b in zip(free[1], replayed[1], strict=True))
    assert free[2] == replayed[2] == 0.0 and torch.equal(free[3], replayed[3])
    assert step(model, rollout(), FREE)[0] == free[0]


def test_later_the_recorded_experts_are_the_used_ones() -> None:
    """Without replay the routers choose otherwise for some tokens, which are counted here token by token."""
    model = tiny_model(**LAYERS)
    found = recorded(model)
    moved(model)
    free, replayed = step(model, found, FREE), step(model, found, REPLAY)
    assert free[0] != replayed[0]
    counts = torch.zeros(2, 8, dtype=torch.long)
    differing = tokens = 0
    for batch in found:
        routes, real = batch.streams["routes"], batch.document_ids >= 0
        assert routes.shape == (*batch.tokens.shape, 2, 2) and routes.dtype == torch.uint8
        with torch.no_grad():
            _, used = model.hidden(batch.tokens, batch.positions, batch.document_ids, routes_BTLK=routes)
            _, own = model.hidden(batch.tokens, batch.positions, batch.document_ids)
        for layer in range(2):
            kept = routes[:, :, layer][real].long()
            assert torch.equal(used[layer].chosen.view(*routes.shape[:2], 2)[real], kept)
            counts[layer] += torch.bincount(kept.flatten(), minlength=8)
            chosen = own[layer].chosen.view(*routes.shape[:2], 2)[real]
            differing += sum(set(a) != set(b) for a, b in zip(chosen.tolist(), kept.tolist(), strict=True))
        tokens += int(real.sum())
    assert 0 < free[2] < 1 and free[2] == pytest.approx(differing / tokens / 2)
    assert 0 < replayed[2] < 1
    assert torch.equal(replayed[3], counts) and not torch.equal(free[3], counts)  # what balancing counts is what was used


def test_the_weights_of_given_experts_come_from_the_scores_with_gradient() -> None:
    router = Router(tiny_config())
    torch.nn.init.normal_(router.weight)
    x, given = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 3], [7, 1], [2, 4], [5, 6], [1, 0]])
    weight, routing = router(x, given)
    scores = (x @ router.weight.T).sigmoid().gather(1, given)
    expected = scores / scores.sum(1, keepdim=True) * router.config.routed_scaling_factor
    assert torch.allclose(weight, expected) and torch.equal(routing.chosen, given)
    assert torch.equal(routing.own, router(x)[1].chosen)
    free = given.clone()
    free[2] = 8  # no record: its own choice, with which it never disagrees
    assert torch.equal(router(x, free)[1].chosen[2], routing.own[2]) and torch.equal(router(x, free)[1].chosen[3], given[3])
    assert not routing.differs(free)[2]
    (weight[:, 0] * torch.arange(5)).sum().backward()
    gradient = router.weight.grad.clone()
    router.weight.grad = None
    (expected[:, 0] * torch.arange(5)).sum().backward()
    assert torch.allclose(gradient, router.weight.grad, atol=1e-6) and gradient.abs().sum() > 0


def test_the_order_of_the_experts_is_no_disagreement() -> None:
    router = Router(tiny_config())
    torch.nn.init.normal_(router.weight)
    _, routing = router(torch.randn(6, 24, generator=torch.Generator().manual_seed(1)))
    assert not routing.differs(routing.chosen.flip(1)).any()
    other = routing.chosen.clone()
    other[2, 0] = next(e for e in range(8) if e not in other[2].tolist())
    assert routing.differs(other).tolist() == [False, False, True, False, False, False]


def test_the_sum_of_given_experts_is_theirs() -> None:
    layer = MoE(tiny_config())
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(2))
    given = torch.tensor([[[0, 1], [2, 3], [4, 5], [6, 7]]])
    y, routing = layer(x, None, given)
    weight, _ = layer.gate(x[0], given[0])
    expected = layer.experts.by_loop(x[0], weight, given[0]) + (layer.shared_experts(x[0]) if layer.shared_experts else 0)
    assert torch.allclose(y[0], expected, atol=1e-5) and torch.equal(routing.chosen, given[0])


def test_records_are_packed_with_their_tokens_and_kept_whole(tmp_path: Path) -> None:
    """The first token of a document carries no weight, but its experts count."""
    found = recorded(tiny_model(**LAYERS))
    samples = documents(found)
    store(tmp_path / "0.safetensors", samples)
    for a, b in zip(samples, stored(tmp_path / "0.safetensors"), strict=True):
        assert b.streams["routes"].dtype == np.uint8 and np.array_equal(a.streams["routes"], b.streams["routes"])
    again = collate([samples[::-1]], 64, 0)
    at = 0
    for sample in samples[::-1]:
        n = len(sample.tokens)
        assert np.array_equal(again.streams["routes"][0, at : at + n].numpy(), sample.streams["routes"])
        at += n
    assert again.streams["advantage"].dtype == torch.float32


@pytest.mark.parametrize("key", ["replay", "watch_routing"])
def test_a_dense_model_has_nothing_to_replay(key: str) -> None:
    """Refused before anything runs, for a student in the middle of a chain too."""
    with pytest.raises(BadInput, match=rf"rl-student\.{key}.*this model has none"):
        check(load(Path(__file__).parents[2] / "recipes" / "r1.toml", {f"rl-student.{key}": True}))


def test_a_forward_before_the_first_minibatch_uses_the_record_too() -> None:
    """Where the record is another than the router's choice, the weights of tis are those of the record."""
    model = tiny_model(**LAYERS)
    other = [Batch(b.tokens, b.positions, b.document_ids, {**b.streams, "routes": (b.streams["routes"] + 1) % 8}) for b in recorded(model)]
    keys = {"tis": 2.0, "replay": True}
    (own, *_), (free, *_) = (Moment(model, Rl(**{**keys, "replay": replay})).seen(other) for replay in (True, False))
    assert torch.equal(own.streams["old_logprob"], logprobs(model, other[0], replay=True))
    assert not torch.allclose(own.streams["old_logprob"], free.streams["old_logprob"], atol=1e-3)


def test_nothing_is_told_without_a_record() -> None:
    assert not Moment(tiny_model(), Rl(replay=True)).wanted
    assert "rerouted" not in compute(tiny_model(), rollout()[0], totals(rollout()), FREE)[1]
