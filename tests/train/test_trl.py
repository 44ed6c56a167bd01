"""The losses of reinforcement and of preferences against TRL's own code, on the same log-probabilities: value and gradient."""

import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pascaline.post import grpo
from pascaline.tables import ALGORITHMS, Rl
from pascaline.train.policy import Policy, corrected, distance, fresh, policy_loss
from pascaline.train.preference import Preference, pair_loss

pytest.importorskip("trl", reason="pip install pascaline[test]")
LIMIT = 9
LENGTHS = np.array([3, 9, 1, 6])
THEIRS: dict[str, dict[str, Any]] = {  # the names of the same papers there
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo"},
}


def drawn(seed: int) -> tuple[Tensor, ...]:
    """Log-probabilities now, at the rollout, of the engine and of the reference, each [answers, LIMIT], and advantages [answers]."""
    rng = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand((len(LENGTHS), LIMIT), generator=rng, dtype=torch.float64)
    moved = [old + scale * torch.randn(old.shape, generator=rng, dtype=torch.float64) for scale in (0.4, 0.2, 0.3)]
    return moved[0].requires_grad_(), old, *moved[1:], torch.randn(len(LENGTHS), generator=rng, dtype=torch.float64)


def mask() -> Tensor:
    return torch.from_numpy(np.arange(LIMIT) < LENGTHS[:, None]).double()


def trl_loss(rl: Rl, kind: dict[str, Any], own: Tensor, old: Tensor, engine: Tensor, ref: Tensor, advantages: Tensor) -> Tensor:
    """What GRPOTrainer makes of them, its model left out."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True)
    trainer = SimpleNamespace(
        **{"importance_sampling_level": "token", **kind}, aux_loss_enabled=False, top_entropy_quantile=1.0, _entropy_bonus_enabled=False,
        off_policy_mask_threshold=rl.stale or None, get_off_policy_mask=GRPOTrainer.get_off_policy_mask, beta=rl.kl,
        epsilon_low=rl.clip_low, epsilon_high=rl.clip_high + (rl.surrogate == "cispo"), max_completion_length=LIMIT,
        use_vllm=bool(rl.tis), vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1, accelerator=accelerator,
        args=SimpleNamespace(use_bias_correction_kl=rl.unbiased, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (own, torch.zeros_like(own), None),
    )  # fmt: skip
    ids = torch.zeros(own.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask()[:, :1], "completion_ids": ids, "completion_mask": mask(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref, "sampling_per_token_logps": engine,
        "num_items_in_batch": mask().sum(), "importance_sampling_ratio": (old - engine).exp().clamp(max=rl.tis or None, min=0),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def our_loss(rl: Rl, own: Tensor, old: Tensor, engine: Tensor, ref: Tensor, advantages: Tensor) -> Tensor:
    """The same by what the rl stage puts into the streams and what losses.compute makes of them."""
    here = mask().bool()
    weights, scale = grpo.averaged(LENGTHS, rl.average, LIMIT)
    w, answer = (torch.from_numpy(np.repeat(values, LENGTHS)) for values in (weights, np.arange(len(LENGTHS))))
    advantage = scale * advantages[answer]
    if rl.tis:
        advantage = advantage * corrected(old[here], engine[here], rl.tis, 0.0, 0.0)
    rule = Policy(rl.ratio, rl.surrogate, rl.clip_low, rl.clip_high, kl=rl.kl, unbiased=rl.unbiased)
    log_ratio = own[here] - old[here]
    loss, _ = policy_loss(own[here], log_ratio, advantage, answer, torch.ones_like(w), rule)
    if rl.stale:
        loss = loss * fresh(own[here] - engine[here], advantage, answer, torch.ones_like(w), rl.stale)
    apart = distance(own[here], ref[here], log_ratio, rule)
    return (w * loss).sum() / w.sum() + rl.kl * (w * apart).sum() / w.sum()


@pytest.mark.parametrize("more", [{}, {"tis": 1.1}, {"stale": 0.05}], ids=["plain", "tis", "stale"])
@pytest.mark.parametrize("name", THEIRS)
def test_each_algorithm_is_trls(name: str, more: dict[str, float]) -> None:
    taught = 0
    for seed in range(8):
        rl = Rl(algorithm=name, **more)  # type: ignore[arg-type]
        assert set(ALGORITHMS[name]) <= rl.model_fields_set
        values = drawn(seed)
        expected, found = trl_loss(rl, THEIRS[name], *values), our_loss(rl, *values)
        gradients = [torch.autograd.grad(loss, values[0])[0] for loss in (expected, found)]
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
        taught += bool(gradients[0].abs().max() > 0)
    assert taught >= 4  # a narrow clip may hold all of a draw's gradients back


def trl_rloo(rl: Rl, own: Tensor, old: Tensor, ref: Tensor, reward: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """What RLOOTrainer makes of them, its model left out: the loss, and the advantages."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    said, logs = iter([old, ref]), defaultdict(list)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", process_index=0, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False), ref_model=True,
        beta=rl.kl, epsilon_low=rl.clip_low, epsilon_high=rl.clip_high,
        args=SimpleNamespace(per_device_train_batch_size=1, gradient_checkpointing_kwargs=None), mask_truncated_completions=False,
        aux_loss_enabled=False, pad_to_multiple_of=None, _tokenizer=SimpleNamespace(pad_token_id=0), num_generations=group,
        reward_weights=torch.ones(1), reward_clip_range=None, normalize_advantages=False, reward_func_names=["it"],
        _metrics={"train": defaultdict(list)}, _logs={**logs, "prompt": [], "completion": [], "advantages": [], "rewards": logs},
        _pending_extra_logs={}, _pending_metrics={}, _calculate_rewards=lambda *_: reward[:, None].clone(),
        _generate=lambda prompts: ([[1]] * len(LENGTHS), [[1] * n for n in LENGTHS], [""] * len(LENGTHS)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (next(said), None, None),
    )  # fmt: skip
    inputs = RLOOTrainer._generate_and_score_completions(trainer, [{"prompt": ""}] * len(LENGTHS))
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (own, torch.zeros_like(own), None)
    return RLOOTrainer._compute_loss(trainer, None, inputs), inputs["advantages"]


def left_out(reward: Tensor, group: int) -> Tensor:
    """Our advantages [answers] of groups that have a right answer and a wrong one; NaN could not be judged."""
    reward_Gn = reward.reshape(-1, group).numpy()
    right = np.arange(group) == np.zeros((len(reward_Gn), 1))
    found, flat = grpo.advantages(np.nan_to_num(reward_Gn), right, ~np.isnan(reward_Gn), ALGORITHMS["rloo"]["advantage"])
    assert not flat.any()
    return torch.from_numpy(found).flatten()


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_advantages_of_rloo_are_trls(group: int, kl: float) -> None:
    """By definition they differ in KL: TRL takes its beta (log pi_old - log pi_ref), summed over the answer, from the reward, ours is k3 of
    each token in the loss, and 0 unless it is asked for. As a reward it gives the same here; no outcome, no say, in both."""
    for seed in range(4):
        own, old, _, ref, reward = drawn(seed)
        if group == 4:
            reward[3] = torch.nan
        _, expected = trl_rloo(Rl(algorithm="rloo", kl=kl), own, old, ref, reward, group)
        found = left_out(reward - kl * ((old - ref) * mask()).sum(1), group)
        torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)
        assert found.abs().max() > 0.1 and Rl(algorithm="rloo").kl == 0


def test_the_gradient_of_rloo_is_trls_where_it_has_just_sampled() -> None:
    """But for a constant: theirs is the mean over answers, ours that over max_tokens too (Dr. GRPO's), which Adam does not see. Values
    differ: at ratio 1 theirs is the mean of the advantages, 0, ours weighs them by length."""
    for seed in range(4):
        own, _, _, ref, reward = drawn(seed)
        rl = Rl(algorithm="rloo")
        loss, advantages = trl_rloo(rl, own, own.detach(), ref, reward, 4)
        ours = our_loss(rl, own, own.detach(), own.detach(), ref, left_out(reward, 4))
        expected, found = (torch.autograd.grad(each, own)[0] for each in (loss, ours))
        torch.testing.assert_close(LIMIT * found, expected, rtol=1e-6, atol=1e-9)
        assert expected.abs().max() > 0.1 and loss.item() == pytest.approx(0, abs=1e-6) and abs(ours.item()) > 1e-3
        assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-6)


def test_the_loss_of_rloo_is_trls_for_answers_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off-policy they differ by definition: TRL clips the ratio of the whole answer, a product, ours each token's. For one they agree."""
    monkeypatch.setattr(sys.modules[__name__], "LENGTHS", np.ones(4, int))
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 1)
    clipped = 0
    for seed in range(8):
        own, old, _, ref, reward = drawn(seed)
        rl = Rl(algorithm="rloo")
        loss, _ = trl_rloo(rl, own, old, ref, reward, 4)
        ours = our_loss(rl, own, old, old, ref, left_out(reward, 4))
        assert ours.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
        expected, found = (torch.autograd.grad(each, own)[0] for each in (loss, ours))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        clipped += int((expected == 0).sum())
    assert 0 < clipped < 8 * 4


def test_the_unbiased_distance_is_trls() -> None:
    """V3.2's: times the ratio of the token."""
    rl = Rl(kl=0.1, unbiased=True, average="token")
    values = drawn(7)
    expected, found = trl_loss(rl, {"loss_type": "dapo"}, *values), our_loss(rl, *values)
    gradients = [torch.autograd.grad(loss, values[0])[0] for loss in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["sigmoid", "norm", "ipo"])
def test_each_loss_of_pairs_is_trls(method: str) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    own, old, *_ = drawn(3)  # two pairs: chosen, chosen, rejected, rejected
    beta, here = 0.3, torch.cat((torch.zeros(len(LENGTHS), 1), mask()), 1).long()
    outputs = SimpleNamespace(
        log_probs=own * mask(), entropy=torch.zeros_like(own), mean_logits=torch.zeros_like(own), is_top1=here[:, 1:].bool()
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, beta=beta,
        f_divergence_type="reverse_kl", loss_types=["sigmoid_norm" if method == "norm" else method], loss_weights=[1.0],
        use_weighting=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
    )  # fmt: skip
    reference = (old * mask()).sum(1)
    inputs = {
        "input_ids": torch.zeros(here.shape, dtype=torch.long), "attention_mask": torch.ones(here.shape), "completion_mask": here,
        "ref_chosen_logps": reference[:2], "ref_rejected_logps": reference[2:],
    }  # fmt: skip
    expected = DPOTrainer._compute_loss(trainer, lambda **k: outputs, inputs, False)
    means = 1 if method == "sigmoid" else torch.from_numpy(LENGTHS).double()
    change = ((own - old) * mask()).sum(1) / means
    found = pair_loss(change.view(2, 2).t(), Preference("ipo" if method == "ipo" else "sigmoid", beta)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    gradients = [torch.autograd.grad(loss, own, retain_graph=True)[0] for loss in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
