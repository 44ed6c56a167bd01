"""Reuse of prefixes, memory and fairness: what is computed, in which step, on which blocks."""

import numpy as np
import pytest
import torch
from tiny import randomize_, tiny_model

from pascaline.engine import Engine, Sampling
from pascaline.engine.blocks import BLOCK
from pascaline.errors import BadInput

GREEDY = Sampling(0.0, max_tokens=6, ignore_eos=True)


def numbers(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 61, count).tolist()


@pytest.fixture(scope="module")
def model():
    found = tiny_model(max_position_embeddings=512)
    with torch.no_grad():
        found.head_weight.mul_(0.3)
    return found


def drain(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def memory(engine_model, blocks: int) -> int:
    """Bytes of a cache with that many blocks to give away."""
    return (blocks + 1) * BLOCK * Engine(engine_model).bytes_per_token()


# ---- prefixes --------------------------------------------------------------------------------------------------------


def test_a_prefix_is_computed_once(model):
    engine, system = Engine(model), numbers(100)
    (first,) = engine.add([*system, 5], GREEDY)
    drain(engine)
    (second,) = engine.add([*system, 9, 8], GREEDY)
    drain(engine)
    assert (first.cached_tokens, second.cached_tokens) == (0, 96)
    assert engine.stats.prefilled == 101 + 6 and (engine.stats.prefix_queries, engine.stats.prefix_hits) == (101 + 102, 96)
    alone = Engine(model, prefix_reuse=False).generate([[*system, 9, 8]], GREEDY)[0][0]
    assert second.token_ids == alone.token_ids and second.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_prompts_that_arrive_together_share_their_prefix_within_the_step(model):
    engine, system = Engine(model), numbers(100)
    group = [engine.add([*system, i], GREEDY)[0] for i in range(5, 13)]
    assert set(engine.step()) == set(group) and engine.stats.prefilled == 101 + 7 * 5
    drain(engine)
    for i, request in zip(range(5, 13), group, strict=True):
        assert request.token_ids == Engine(model, prefix_reuse=False).generate([[*system, i]], GREEDY)[0][0].token_ids


def test_an_answer_is_a_prefix_of_the_next_turn(model):
    engine, prompt = Engine(model), numbers(20)
    (first,) = engine.add(prompt, Sampling(0.0, max_tokens=30, ignore_eos=True))
    drain(engine)
    (second,) = engine.add([*prompt, *first.token_ids, 7], GREEDY)
    drain(engine)
    assert second.cached_tokens == 48  # 49 of the 50 tokens were computed: whole blocks


def test_new_weights_make_old_blocks_unreachable():
    """Complaint 8: stale entries after an update of the weights corrupt log-probabilities."""
    model = tiny_model()
    engine, prompt = Engine(model), numbers(40)
    engine.generate([prompt], GREEDY)
    engine.update_weights(randomize_(tiny_model(), 5).state_dict())
    (request,) = engine.add(prompt, GREEDY)
    drain(engine)
    fresh = Engine(model).generate([prompt], GREEDY)[0][0]
    assert request.cached_tokens == 0 and request.token_ids == fresh.token_ids and request.logprobs == fresh.logprobs


def test_weights_change_under_answers_that_run():
    """They go on with the new weights alone: what they say next is what the new weights say after the same tokens."""
    model = tiny_model()
    engine, prompt = Engine(model), numbers(20)
    requests = engine.add(prompt, Sampling(0.0, max_tokens=12, ignore_eos=True, n=3))
    for _ in range(4):
        engine.step()
    engine.update_weights(randomize_(tiny_model(), 5).state_dict())
    said = [list(r.token_ids) for r in requests]
    drain(engine)
    for request, before in zip(requests, said, strict=True):
        assert len(before) == 4 and request.token_ids[:4] == before
        after = Engine(model).generate([prompt + before], Sampling(0.0, max_tokens=8, ignore_eos=True))[0][0]
        assert request.token_ids[4:] == after.token_ids and request.logprobs[4:] == pytest.approx(after.logprobs, abs=1e-4)


def test_weights_written_by_an_optimizer_are_noticed():
    model = tiny_model()
    engine, prompt = Engine(model), numbers(40)
    before = engine.generate([prompt], GREEDY)[0][0].token_ids
    randomize_(model, 7)  # writes in place
    assert engine.generate([prompt], GREEDY)[0][0].token_ids == Engine(model).generate([prompt], GREEDY)[0][0].token_ids != before


@pytest.mark.parametrize("state", [{"lm_head.weight": torch.zeros(2, 2)}, {"nothing": torch.zeros(1)}])
def test_weights_of_another_model_are_refused_whole(state, model):
    engine = Engine(model)
    before = model.lm_head.weight.clone()
    with pytest.raises(BadInput, match="not of this model"):
        engine.update_weights({"model.norm.weight": torch.full((24,), 3.0)} | state)
    assert torch.equal(model.lm_head.weight, before) and not (model.model.norm.weight == 3).all()


def test_flush_pause_resume_release(model):
    engine, prompt = Engine(model), numbers(40)
    engine.generate([prompt], GREEDY)
    engine.flush()
    (request,) = engine.add(prompt, GREEDY)
    engine.pause()
    assert engine.step() == [] and not request.token_ids
    engine.resume()
    drain(engine)
    assert request.cached_tokens == 0 and len(request.token_ids) == 6
    engine.release()
    assert engine._store is None and engine.generate([prompt], GREEDY)[0][0].token_ids == request.token_ids


# ---- n > 1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [15, 16, 17, 40])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_answers_of_a_prompt_share_its_blocks_and_copy_what_they_write_to(model, length, rows):
    settings = Sampling(1.0, 1.0, max_tokens=20, n=5, seed=2, ignore_eos=True)
    engine = Engine(model, max_rows=rows)
    group = engine.add(numbers(length), settings)
    engine.step()
    if rows == 8:
        assert engine.stats.blocks_used == -(-length // BLOCK) and engine.stats.prefilled == length
    drain(engine)
    assert engine.stats.blocks_used == 0
    assert len({tuple(r.token_ids) for r in group}) == 5
    for request in group:
        with torch.no_grad():
            log_p = model(torch.tensor([request.prompt + request.token_ids]))[0].log_softmax(-1)
        own = log_p[length - 1 : -1].gather(1, torch.tensor(request.token_ids)[:, None])[:, 0]
        assert request.logprobs == pytest.approx(own.tolist(), abs=1e-4)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_request_that_can_never_fit_is_refused_with_the_sizes(model):
    engine = Engine(model, cache_memory=memory(model, 4))
    assert engine.capacity == 64
    with pytest.raises(BadInput, match=r"60 tokens with 6 .* holds 64 tokens of 128 bytes"):
        engine.add(numbers(60), GREEDY)
    assert not engine.busy and len(engine.generate([numbers(58)], GREEDY)[0][0].token_ids) == 6


def test_too_little_memory_is_refused(model):
    with pytest.raises(BadInput, match="cache_memory"):
        Engine(model, cache_memory=100)


def test_the_youngest_gives_way_when_blocks_run_out(model):
    """Everybody's answer is what it is alone, the eldest is never interrupted, and memory is never exceeded."""
    settings = [Sampling(1.0, 1.0, max_tokens=60, seed=i, ignore_eos=True) for i in range(4)]
    engine = Engine(model, cache_memory=memory(model, 11))
    group = [engine.add(numbers(20, i), s)[0] for i, s in enumerate(settings)]
    lengths = []
    while engine.busy:
        engine.step()
        lengths.append(len(group[0].token_ids))
        assert engine.stats.blocks_used <= 11
    assert engine.stats.preemptions > 0
    assert lengths[:60] == list(range(1, 61))
    for i, (request, s) in enumerate(zip(group, settings, strict=True)):
        alone = Engine(model).generate([numbers(20, i)], s)[0][0]
        assert request.token_ids == alone.token_ids and request.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_prefixes_are_evicted_before_anybody_gives_way(model):
    engine = Engine(model, cache_memory=memory(model, 8))
    for i in range(10):
        engine.generate([numbers(80, i)], GREEDY)
    assert engine.stats.preemptions == 0 and engine.stats.blocks_used == 0


# ---- fairness --------------------------------------------------------------------------------------------------------


def test_a_long_prompt_stops_nobodys_stream(model):
    """Each step gives every running answer its token, and stays within its budget."""
    engine = Engine(model, max_batch_tokens=32, max_rows=8)
    talking = [engine.add(numbers(5, i), Sampling(0.0, max_tokens=60, ignore_eos=True))[0] for i in range(3)]
    engine.step()
    (long,) = engine.add(numbers(400, 9), GREEDY)
    (short,) = engine.add(numbers(5, 10), GREEDY)
    steps, before = 0, engine.stats.prefilled
    while not long.token_ids:
        said = [len(r.token_ids) for r in talking]
        engine.step()
        steps += 1
        assert [len(r.token_ids) for r in talking] == [n + 1 for n in said]
        assert engine.stats.prefilled - before <= 32 - 3
        before = engine.stats.prefilled
        if steps == 1:
            assert short.token_ids  # it did not wait for the long one
    assert 400 / 29 <= steps < 400 / 29 * 2 + 3


def test_first_come_first_served(model):
    engine = Engine(model, max_rows=2)
    group = [engine.add(numbers(5, i), GREEDY)[0] for i in range(6)]
    order = []
    while engine.busy:
        order += [group.index(r) for r in engine.step() if r.output is not None]
    assert order == sorted(order)


# ---- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [0, 1, 3])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_cancelled_requests_leave_nothing(model, when, which):
    """Waiting, in the middle of the prompt, or talking; the first of the n or another."""
    engine = Engine(model, max_batch_tokens=30)
    other = engine.add(numbers(4, 1), GREEDY)[0]
    group = engine.add(numbers(70), Sampling(1.0, 1.0, max_tokens=9, n=3, ignore_eos=True))
    for _ in range(when):
        engine.step()
    engine.cancel(group[which])
    assert group[which].finish_reason == "cancelled" and group[which].output is not None
    engine.cancel(group[which])
    drain(engine)
    assert all(len(r.token_ids) == 9 and r.finish_reason == "length" for i, r in enumerate(group) if i != which)
    assert len(other.token_ids) == 6 and engine._blocks.used == 0 and len(engine.scheduler.free_rows) == 30
    alone = Engine(model).generate([numbers(70)], Sampling(1.0, 1.0, max_tokens=9, n=3, ignore_eos=True))[0]
    assert [r.token_ids for i, r in enumerate(group) if i != which] == [o.token_ids for i, o in enumerate(alone) if i != which]


def test_all_cancelled_in_any_order(model):
    engine = Engine(model, max_batch_tokens=16)
    group = engine.add(numbers(70), Sampling(1.0, 1.0, max_tokens=9, n=4))
    engine.step()
    for request in group:
        engine.cancel(request)
    assert not engine.busy and engine.scheduler.queued == 0
    assert engine.stats.running == engine.stats.waiting == engine.stats.blocks_used == 0  # at once, not after another step


def test_logits_that_are_no_numbers_end_their_answer_alone(model, monkeypatch):
    """A poisoned request: the others go on, and nothing of it stays in the cache."""
    engine = Engine(model)
    good = engine.add(numbers(20, 1), GREEDY)[0]
    bad = engine.add(numbers(40, 2), GREEDY)[0]
    place, take = model.head, engine._places
    asked: list = []
    monkeypatch.setattr(engine, "_places", lambda *a: asked.append(take(*a)) or asked[-1])
    spoil = lambda h, cache: torch.where(torch.tensor([[r is bad] for r, _, _ in asked[-1]]), torch.nan, place(h, cache))  # noqa: E731
    monkeypatch.setattr(model, "head", spoil)
    engine.step()
    assert bad.finish_reason == "error" and "no numbers" in bad.error and bad.output.token_ids == []
    monkeypatch.undo()
    drain(engine)
    assert good.token_ids == Engine(model).generate([numbers(20, 1)], GREEDY)[0][0].token_ids
    (again,) = engine.add(numbers(40, 2), GREEDY)
    drain(engine)
    assert again.cached_tokens == 0 and len(again.token_ids) == 6


def test_a_failing_computation_ends_who_took_part_and_the_engine_goes_on(model, monkeypatch):
    engine = Engine(model, max_rows=1)
    first, second = engine.add(numbers(20, 1), GREEDY)[0], engine.add(numbers(20, 2), GREEDY)[0]
    monkeypatch.setattr(model, "head", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert first.finish_reason == "error" and second.finish_reason is None
    monkeypatch.undo()
    drain(engine)
    assert len(second.token_ids) == 6 and engine._blocks.used == 0
