"""Self-speculation with the MTP module: nothing that is said changes, right guesses save steps, and it stops where it does not pay."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from pascaline.engine import Engine, Sampling
from pascaline.engine import engine as engine_module
from pascaline.engine.speculate import AGAIN, PLAIN, TRIED, Speculation


@pytest.fixture(scope="module")
def model():
    found = tiny_model(num_nextn_predict_layers=1, max_position_embeddings=512)
    with torch.no_grad():
        found.head_weight.mul_(0.3)
    return found


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(Speculation, "pays", lambda self, rows: True)


def prompts(count: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, 61, int(draw.integers(1, 30))).tolist() for _ in range(count)]


@pytest.mark.parametrize("settings", [dict(temperature=0.0), dict(temperature=1.0, top_p=1.0), dict(temperature=0.6, top_p=0.9)])
def test_the_tokens_are_those_without_guesses(model, settings):
    s = Sampling(**settings, max_tokens=50, n=3, seed=4)
    fast, slow = Engine(model, speculate=True), Engine(model)
    for one, other in zip(fast.generate(prompts(6), s), slow.generate(prompts(6), s), strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert 0 < fast.stats.accepted_tokens < fast.stats.draft_tokens


def markov(logits_VV: torch.Tensor, sharper: float):
    """A model whose next token depends on the last one alone, by those logits, and an MTP module that knows it, `sharper` times."""
    V = len(logits_VV)
    model = tiny_model(vocab_size=V, hidden_size=V, first_k_dense_replace=2, num_nextn_predict_layers=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        for layer in model.model.layers[:2]:
            layer.mlp.down_proj.weight.zero_()
        module = model.model.layers[2]
        module.mlp.experts.down_proj.zero_()
        module.mlp.shared_experts.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(V))
        model.lm_head.weight.copy_(logits_VV.T / V**0.5)
        module.eh_proj.weight.copy_(torch.cat((torch.eye(V), torch.zeros(V, V)), 1))  # the next token's embedding
        module.enorm.weight.fill_(1.0)
        module.shared_head["norm"].weight.fill_(sharper)
    return model


def test_the_distribution_is_the_models():
    """Chi-square of the third token, a guess that was accepted or what came in its place, against the chain's own probabilities."""
    logits = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    engine = Engine(markov(logits, 1.6), speculate=True, max_rows=512)
    outputs = engine.generate([[5]], Sampling(1.0, 1.0, max_tokens=4, n=20_000, seed=1, ignore_eos=True))[0]
    assert 0.6 < engine.stats.accepted_tokens / engine.stats.draft_tokens < 0.95 and engine.stats.draft_tokens > 10_000
    p = torch.linalg.matrix_power(logits.double().softmax(-1), 3)[5].numpy()
    found = np.bincount([o.token_ids[2] for o in outputs], minlength=20)
    statistic = ((found - 20_000 * p) ** 2 / (20_000 * p)).sum()
    assert statistic < 19 + 4 * (2 * 19) ** 0.5


def test_a_module_that_knows_the_model_saves_every_other_step():
    engine = Engine(markov(9.0 * torch.eye(64).roll(1, 1), 1.0), speculate=True)
    (output,) = engine.generate([[3]], Sampling(0.0, max_tokens=41, ignore_eos=True))[0]
    assert output.token_ids == list(range(4, 45))
    assert engine.stats.steps == 21 and engine.stats.accepted_tokens == engine.stats.draft_tokens == engine.stats.drafts == 20


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_never_more_tokens_than_asked_for(model, max_tokens):
    for output in Engine(model, speculate=True).generate(prompts(4), Sampling(0.0, max_tokens=max_tokens, ignore_eos=True)):
        assert len(output[0].token_ids) == max_tokens


def test_it_goes_on_only_where_it_pays(model, monkeypatch):
    monkeypatch.undo()
    one = Speculation(model)
    for rows, with_guesses in ((1, 0.6), (32, 1.5)):
        for _ in range(TRIED):
            assert one.pays(rows)
            one.timed(rows, 10, 10 * with_guesses, True)
        for _ in range(PLAIN):
            assert not one.pays(rows)
            one.timed(rows, 10, 10 * 1.0, False)
    assert one.pays(1) and not one.pays(32)
    for _ in range(AGAIN - TRIED - PLAIN):
        one.timed(32, 10, 10.0, False)
    assert one.pays(32)  # it is tried again: the batch may be another one by now


def test_without_a_module_there_is_nothing_to_guess_with():
    engine = Engine(tiny_model(), speculate=True)
    assert engine.speculation is None and engine.bytes_per_token() == Engine(tiny_model()).bytes_per_token()


def test_the_clock_decides_nothing_by_default():
    """Law 5: a run that is resumed gives the same bits; guesses are taken by the clock."""
    assert Engine(tiny_model(num_nextn_predict_layers=1)).speculation is None
    assert engine_module.Speculation is Speculation
