"""What an engine records of its routers: the experts that were used for every token, so that no tie parts the trainer from it."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from pascaline.data.batch import batches
from pascaline.engine import Engine, Output, Sampling
from pascaline.engine.blocks import BLOCK
from pascaline.engine.speculate import Speculation
from pascaline.model import native
from pascaline.model.transformer import Model
from pascaline.post.rollout import rl_sample
from pascaline.train.losses import Loss, compute, totals
from pascaline.train.policy import Policy

LAYERS = dict(num_hidden_layers=4, first_k_dense_replace=2, num_nextn_predict_layers=1)
DRAW = np.random.default_rng(1)
SHARED = DRAW.integers(3, 61, 37).tolist()
PROMPTS = [SHARED + DRAW.integers(3, 61, n).tolist() for n in (1, 9, 20)] + [DRAW.integers(3, 61, 5).tolist()]
SAMPLING = Sampling(1.0, 1.0, 25, n=3, seed=4)


@pytest.fixture(params=["kernels", "PyTorch"])
def by(request: pytest.FixtureRequest, kernels: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernels" and kernels:
        pytest.skip(kernels)
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "_library", None)
        monkeypatch.setattr(native, "take", lambda: False)
    return str(request.param)


@torch.no_grad()
def own(model: Model, ids: list[int]) -> np.ndarray:
    """The experts of a forward over the whole, in rising order, [t, M, K]."""
    _, routings = model.hidden(torch.tensor([ids]))
    return torch.stack([routing.chosen.sort(-1).values for routing in routings], 1).numpy()


def check(model: Model, answers: list[list[Output]]) -> None:
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for output in group:
            ids, routes = prompt + output.token_ids, output.routes
            assert routes is not None and routes.dtype == np.uint8 and routes.shape == (len(ids), 2, 2)
            assert np.array_equal(np.sort(routes[:-1], -1), own(model, ids[:-1])) and (routes[-1] == 8).all()  # never computed


@pytest.mark.parametrize("batch", [8, 300])
def test_each_answer_has_the_experts_of_its_prompt_and_of_what_was_said(batch: int, by: str) -> None:
    """Prompts in chunks, answers that share a prompt, prompts that share a beginning: read from the cache, not computed again."""
    model = tiny_model(**LAYERS)
    engine = Engine(model, max_batch_tokens=batch, record_routes=True)
    check(model, engine.generate(PROMPTS, SAMPLING))
    check(model, engine.generate(PROMPTS, SAMPLING))
    assert engine.stats.prefix_hits > 0


def test_also_where_answers_were_interrupted_or_guessed(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculation, "pays", lambda self, rows: True)
    model = tiny_model(**LAYERS)
    with torch.no_grad():
        model.head_weight.mul_(0.3)  # so that some guesses are right
    few = 12 * BLOCK * Engine(model, speculate=True).bytes_per_token()
    engine = Engine(model, cache_memory=few, speculate=True, record_routes=True)
    check(model, engine.generate(PROMPTS, SAMPLING))
    assert engine.stats.preemptions > 0 and engine.stats.accepted_tokens > 0


def test_nothing_is_recorded_unless_asked_for_or_where_there_is_no_expert() -> None:
    dense = dict(model_type="qwen3", num_key_value_heads=1, head_dim=8)
    for engine in (Engine(tiny_model()), Engine(tiny_model(**dense), record_routes=True)):
        ((output,),) = engine.generate([[5, 6]], Sampling(max_tokens=2))
        assert output.routes is None and output.record == {}


@torch.no_grad()
def tied() -> Model:
    """A model that cannot tell its experts apart, whose outputs are far from each other: a rounding decides which of them is used."""
    model = tiny_model(**LAYERS)
    for layer in model.model.layers[2:4]:
        weight, bias = layer.mlp.gate.weight, layer.mlp.gate.e_score_correction_bias
        weight.copy_(weight[:1] + 1e-7 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
        bias.zero_()
    return model


def test_with_their_record_the_trainer_says_what_the_engine_said(by: str) -> None:
    """Law 1 where routers tie: without the record the two are nats apart."""
    model = tied()
    answers = Engine(model, record_routes=True).generate(PROMPTS, SAMPLING)
    samples = [rl_sample(prompt, output, 1.0) for prompt, group in zip(PROMPTS, answers, strict=True) for output in group]
    found = batches(samples, 96, 4, 0)
    total = totals(found)
    gaps = {replay: max(float(compute(model, b, total, Loss(policy=Policy(replay=replay)))[1]["gap_max"]) for b in found)
            for replay in (True, False)}  # fmt: skip
    assert gaps[True] < 1e-4 and gaps[False] > 0.01
