"""The knobs of the GRPO family in rollouts: averages, advantages, penalties, refills, and the reference, against the papers' formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

from pascaline.data.batch import collate
from pascaline.engine import Engine, Output
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.model.transformer import RewardHead
from pascaline.post import grpo
from pascaline.post.reference import Reference
from pascaline.post.reward import RewardModel
from pascaline.post.rollout import Rollouts, rl_sample
from pascaline.recipe import load
from pascaline.tables import ALGORITHMS
from pascaline.tokenizer import Tokenizer
from pascaline.train.losses import Loss, compute, totals
from pascaline.train.policy import Policy

TINY = Path(__file__).parent.parent.parent / "recipes" / "tiny.toml"
JUDGED = np.ones((1, 4), bool)


def test_a_papers_name_sets_its_keys_and_the_recipe_has_the_last_word() -> None:
    for name, keys in ALGORITHMS.items():
        rl = load(TINY, {"rl.algorithm": name}).rl
        assert {key: getattr(rl, key) for key in keys} == keys
    assert load(TINY, {"rl.algorithm": "gspo", "rl.clip_low": 0.1}).rl.clip_low == 0.1
    assert load(TINY, {"rl.algorithm": "gspo"}).rl.clip_high == 4e-4
    with pytest.raises(BadInput, match=r"rl\.algorithm = 'ppo' is wrong"):
        load(TINY, {"rl.algorithm": "ppo"})


def test_the_three_advantages() -> None:
    """Of rewards 1, 0, 0, -1 with mean 0: RLOO's baseline is the mean of the other three."""
    reward, right = np.array([[1.0, 0.0, 0.0, -1.0]]), np.array([[True, False, False, False]])
    assert grpo.advantages(reward, right, JUDGED, "mean")[0].tolist() == [[1.0, 0.0, 0.0, -1.0]]
    others = [[r - (reward.sum() - r) / 3 for r in reward[0]]]
    assert grpo.advantages(reward, right, JUDGED, "others")[0][0] == pytest.approx(others[0])
    assert grpo.advantages(reward, right, JUDGED, "std")[0][0] == pytest.approx(reward[0] / np.sqrt(0.5), abs=1e-5)
    three = np.array([[True, True, True, False]])  # the last could not be judged: the others are two
    assert grpo.advantages(reward, right, three, "others")[0][0] == pytest.approx([1.0, -0.5, -0.5, 0.0])


def test_the_soft_penalty_of_length() -> None:
    """DAPO eq. 13 with L_max 100 and a cache of 20: nothing up to 80, -1 at 100."""
    assert grpo.overlong(np.array([[10, 80, 90, 100]]), 100, 0.2).tolist() == [[0.0, 0.0, -0.5, -1.0]]
    assert not grpo.overlong(np.array([[10, 100]]), 100, 0.0).any()


LENGTHS, ADVANTAGES = (2, 5, 1), (1.0, -0.7, 0.4)


@pytest.mark.parametrize("average", ["token", "answer", "limit"])
def test_averages_are_the_papers(average: str) -> None:
    """The whole loss through the model, on-policy, against sums written out here."""
    model = tiny_model()
    weights, scale = grpo.averaged(np.array(LENGTHS), average, 10)
    generator = torch.Generator().manual_seed(0)
    samples, expected = [], torch.zeros(())
    for length, advantage, weight in zip(LENGTHS, ADVANTAGES, weights, strict=True):
        ids = torch.randint(3, 61, (3 + length,), generator=generator)
        logprob = model(ids[None])[0, 2:-1].log_softmax(-1).gather(1, ids[3:, None])[:, 0]
        samples.append(rl_sample(ids[:3].tolist(), Output(ids[3:].tolist(), logprob.tolist(), "stop"), scale * advantage, float(weight)))
        own = -(logprob - logprob.detach()).exp() * advantage
        divisor = {"token": sum(LENGTHS), "answer": length * len(LENGTHS), "limit": 10 * len(LENGTHS)}[average]
        expected = expected + own.sum() / divisor
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = collate([samples], 32, 0)
    loss, _, _ = compute(model, batch, totals([batch]), Loss())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, p in model.named_parameters():
        if name in gradients:
            assert p.grad == pytest.approx(gradients[name], abs=1e-5), name


# ---- on a model that solves about half ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(coin_run: Path) -> Engine:
    folder = coin_run / "04-sft" / "model"
    return Engine(hf.load(folder), Tokenizer.load(folder))


def rollouts(engine: Engine, coin_run: Path, reference: Reference | None = None, **settings: object) -> Rollouts:
    recipe = load(coin_run / "recipe.toml", {f"rl.{key}": value for key, value in settings.items()})
    return Rollouts(engine, recipe.rl, recipe.puzzles, recipe.seed, reference)


def answers(batches: list) -> int:
    return sum(int(b.document_ids[row].max()) + 1 for b in batches for row in range(len(b.tokens)))


def test_refills_put_groups_with_variance_in_the_places_of_flat_ones(engine: Engine, coin_run: Path) -> None:
    plain, filled = rollouts(engine, coin_run, samples=2), rollouts(engine, coin_run, samples=2, refills=4)
    few, more = answers(plain.step(0)), answers(filled.step(0))
    flat = 8 * plain.facts["flat_groups"]
    assert flat >= 2 and few == 2 * (8 - flat)
    assert filled.facts["flat_groups"] == flat / 8 and filled.facts["reward"] == plain.facts["reward"]  # told of the first draw
    assert more == few + 2 * filled.facts["refilled"] and 0 < filled.facts["refilled"] <= flat
    assert filled.facts["rollout_tokens"] > plain.facts["rollout_tokens"]


def test_refills_end(engine: Engine, coin_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no group ever has variance: so many times, and an empty step."""
    source = rollouts(engine, coin_run, max_tokens=1, refills=3)
    calls = []
    sampled = source._sampled
    monkeypatch.setattr(source, "_sampled", lambda *a: calls.append(a[1]) or sampled(*a))
    assert source.step(0) == [] and calls == [0, 1, 2, 3] and source.facts["refilled"] == 0


def test_the_reference_is_where_rl_began(engine: Engine, coin_run: Path, tmp_path: Path) -> None:
    """On-policy at the first step the distance is 0, and grows when the policy has moved."""
    model = hf.load(coin_run / "04-sft" / "model")
    own = Engine(model, engine.tokenizer)
    source = rollouts(own, coin_run, Reference(model, coin_run / "04-sft" / "model", tmp_path, 0, 0), kl=0.5)

    def distance() -> float:
        batches = source.step(0)
        total = totals(batches)
        assert total["kl"] == total["rl"] > 0
        return sum(float(compute(model, b, total, Loss(policy=Policy(kl=0.5)))[1]["kl"]) for b in batches)

    assert distance() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    own.update_weights()
    assert distance() > 1e-4


def test_what_judge_and_reference_read_is_counted(engine: Engine, coin_run: Path, tmp_path: Path) -> None:
    """2 FLOPs for each active parameter and token: of the judge all answers with their prompts, of the reference those that teach."""
    origin = coin_run / "04-sft" / "model"
    model, small = hf.load(origin), tiny_model(vocab_size=engine.tokenizer.vocab_size, model_type="qwen3", max_position_embeddings=512)
    source = rollouts(Engine(model, engine.tokenizer), coin_run, Reference(model, origin, tmp_path, 0, 0), rewards={"judge": 0.1}, kl=0.5)
    small.reward_head = RewardHead(24)
    source.judges = {"judge": RewardModel(small, engine.tokenizer)}
    rated: list[list[int]] = []
    scores = source.judges["judge"].scores
    source.judges["judge"].scores = lambda chats: rated.extend(chats) or scores(chats)  # type: ignore[method-assign]
    for step in range(2):
        rated.clear()
        taught = sum(int((batch.document_ids >= 0).sum()) for batch in source.step(step))
        judge = sum(p.numel() for p in small.parameters()) - 24 * engine.tokenizer.vocab_size
        assert len(rated) == source.rl.prompts * source.rl.samples and taught > 0
        own = (source.facts["rollout_tokens"] + taught) * source.flops_per_token
        assert source.facts["rollout_flops"] == pytest.approx(own + 2 * judge * sum(map(len, rated)), rel=1e-12)


def test_the_reference_follows_from_the_step_alone(tmp_path: Path) -> None:
    """Refreshed every 3 steps from the policy of that step; a run that is resumed at 4 finds the one of 3."""
    policy = tiny_model()
    policy.save(tmp_path / "origin")
    seen = {}
    reference = Reference(policy, tmp_path / "origin", tmp_path / "kept", 3, back=2)
    for step in range(8):
        reference._at(step)
        seen[step] = float(reference.model.model.embed_tokens.weight.detach().double().sum())
        with torch.no_grad():
            policy.model.embed_tokens.weight.add_(0.01)
    assert len({seen[s] for s in (0, 1, 2)}) == len({seen[s] for s in (3, 4, 5)}) == len({seen[s] for s in (6, 7)}) == 1
    assert len(set(seen.values())) == 3
    resumed = Reference(policy, tmp_path / "origin", tmp_path / "kept", 3, back=2)
    resumed._at(4)
    assert float(resumed.model.model.embed_tokens.weight.detach().double().sum()) == seen[4]
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["3", "6"]


@pytest.mark.parametrize("back", [0, 4, 7, 20])
def test_what_the_oldest_checkpoint_needs_is_kept(tmp_path: Path, back: int) -> None:
    """A run that saves seldom, and refreshes often, is resumed from far before its last reference."""
    policy = tiny_model()
    policy.save(tmp_path / "origin")
    for step in range(14):
        reference = Reference(policy, tmp_path / "origin", tmp_path / "kept", 3, back)
        reference._at(step)
        for earlier in range(max(step - back, 0), step):
            Reference(policy, tmp_path / "origin", tmp_path / "kept", 3, back)._at(earlier)


def test_refills_are_of_all_puzzles(engine: Engine, coin_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = rollouts(engine, coin_run, max_tokens=1, refills=1)
    asked = []
    sampled = source._sampled
    monkeypatch.setattr(source, "_sampled", lambda step, refill, problems: asked.append(problems) or sampled(step, refill, problems[:8]))
    monkeypatch.setattr(source, "problems", lambda step, refill=0: list(range(8, 24)) if refill else Rollouts.problems(source, step))
    with pytest.raises(AttributeError):  # numbers are no problems; what was drawn is known by then
        source.step(0)
    assert len(asked[1]) == 8 and max(asked[1]) > 15
