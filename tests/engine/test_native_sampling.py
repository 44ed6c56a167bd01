"""The kernels' draws against PyTorch's, and the engine on them."""

import numpy as np
import pytest
import torch

from pascaline.engine import Engine, Sampling
from pascaline.engine import sampler as sampling
from pascaline.model import native
from tests.tiny import tiny_model


@pytest.fixture(scope="module", autouse=True)
def kernels():
    reason = native.wait()
    if reason:
        pytest.skip(reason)


CUTS = [
    Sampling(temperature=1.0, top_p=1.0), Sampling(temperature=0.6, top_p=0.95), Sampling(temperature=0.0), Sampling(temperature=1.3, top_p=0.3),
    Sampling(top_k=5, top_p=1.0), Sampling(top_k=40, top_p=0.7), Sampling(min_p=0.1, top_p=1.0), Sampling(min_p=0.02, top_p=0.8, top_k=100),
    Sampling(temperature=1e-6), Sampling(top_k=1),
]  # fmt: skip


@pytest.mark.parametrize("spread", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("V", [61, 1000, 4096])
def test_the_same_tokens_as_in_pytorch(V, spread):
    generator = torch.Generator().manual_seed(V)
    n = 50 * len(CUTS)
    logits = spread * torch.randn(n, V, generator=generator)
    seeds, positions = np.arange(n, dtype=np.uint64) * 7919, np.arange(n) % 11
    settings = CUTS * 50
    found = sampling.sample(logits, settings, seeds, positions)
    keys = sampling.mix(seeds + sampling.mix(positions.astype(np.uint64)))
    expected = sampling.sample_torch(logits, settings, keys)
    assert (found != expected).sum() <= 1, torch.nonzero(found != expected)  # rounding may decide a race
    one = [sampling.sample(logits[i : i + 1], settings[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(0, n, 37)]
    assert torch.equal(torch.cat(one), found[::37])


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((64, 500), -torch.inf)
    logits[:, 77] = -3.0
    seeds = np.arange(64, dtype=np.uint64)
    for told in CUTS:
        assert sampling.sample(logits, [told] * 64, seeds, seeds.astype(np.int64)).tolist() == [77] * 64


def test_log_probabilities_are_the_models_own():
    own, seeds = 5 * torch.randn(33, 4097), np.arange(33, dtype=np.uint64)
    adjusted = own + torch.randn(33, 4097)
    tokens, logprobs = sampling.draw(adjusted, own, CUTS[:1] * 33, seeds, seeds)
    assert torch.equal(tokens, sampling.sample(adjusted, CUTS[:1] * 33, seeds, seeds))
    assert torch.allclose(logprobs, own.log_softmax(-1)[torch.arange(33), tokens], rtol=1e-5, atol=1e-5)
    own[3, 5], own[4, 9] = float("nan"), float("inf")
    assert sampling.draw(own, own, CUTS[:1] * 33, seeds, seeds)[1].isfinite().tolist() == [i not in (3, 4) for i in range(33)]


def test_an_answer_is_the_same_bits_alone_and_in_company():
    """Cold, from a warm cache, beside others, in chunks, with and without guesses: tokens and log-probabilities to the last bit."""
    model = tiny_model(num_nextn_predict_layers=1)
    prompts = [torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (40, 33, 9, 61)]
    told = Sampling(temperature=1.0, top_p=0.9, max_tokens=40, seed=5, ignore_eos=True)

    def answer(engine: Engine, others: list[list[int]]) -> tuple[list[int], list[float]]:
        (out,) = engine.generate([prompts[0], *others], told)[0]
        return out.token_ids, out.logprobs

    alone = answer(Engine(model, speculate=False), [])
    for options in ({}, {"max_batch_tokens": 7}, {"speculate": False}, {"prefix_reuse": False}):
        engine = Engine(model, **options)
        assert answer(engine, prompts[1:]) == alone, options
        assert answer(engine, []) == alone, options  # its prompt's blocks are there now, and some of the answer's


def test_kernels_are_taken_between_answers_only(monkeypatch):
    """While they are being built PyTorch computes; an answer that has begun so ends so."""
    model, told = tiny_model(), Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
    ready, taken = native._library, []
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "take", lambda: taken.append(len(engine.scheduler.running)) or False)
    engine = Engine(model)
    (request,) = engine.add([5, 6, 7], told)
    engine.step()
    engine.step()
    assert taken == [0] and native.library() is None and ready is not None
    while engine.busy:
        engine.step()
    assert taken == [0] and request.finish_reason == "length"
