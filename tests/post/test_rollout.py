"""Rollouts: what the engine sampled is what the loss sees, token for token and number for number (laws 1 and 4)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pascaline.data.batch import Batch
from pascaline.engine import Engine, Output, Sampling
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.post.rollout import Rollouts, rl_sample
from pascaline.post.verifiers.base import answers
from pascaline.recipe import load
from pascaline.tokenizer import Tokenizer
from pascaline.train.losses import Loss, compute, totals


class Recorded(Engine):
    """An engine that remembers what it was asked and what it answered."""

    def generate(self, prompts, sampling=None):  # type: ignore[no-untyped-def]
        self.asked, self.sampling = list(prompts), sampling
        self.answers = super().generate(prompts, sampling)
        return self.answers


@pytest.fixture(scope="module")
def engine(coin_run: Path) -> Recorded:
    folder = coin_run / "04-sft" / "model"
    return Recorded(hf.load(folder), Tokenizer.load(folder))


def rollouts(engine: Engine, coin_run: Path, **settings: object) -> Rollouts:
    recipe = load(coin_run / "recipe.toml", {f"rl.{key}": value for key, value in settings.items()})
    return Rollouts(engine, recipe.rl, recipe.puzzles, recipe.seed)


def documents(batches: list[Batch]) -> list[dict[str, np.ndarray]]:
    """The documents of the batches, each with its tokens and streams."""
    found = []
    for batch in batches:
        for b in range(len(batch.tokens)):
            for d in range(int(batch.document_ids[b].max()) + 1):
                at = batch.document_ids[b] == d
                found.append({"tokens": batch.tokens[b][at].numpy(), **{k: s[b][at].numpy() for k, s in batch.streams.items()}})
    return found


def test_a_sample_keeps_the_tokens_and_numbers_as_they_are() -> None:
    logprobs = [-0.1, -1e-7, -33.3]
    sample = rl_sample([7, 8], Output([4, 4, 1], logprobs, "stop"), -0.75)
    assert sample.tokens.tolist() == [7, 8, 4, 4, 1]
    assert sample.streams["rl"].tolist() == [0, 0, 1, 1, 1]
    assert sample.streams["advantage"].tolist() == [0, 0, -0.75, -0.75, -0.75]
    assert sample.streams["old_logprob"].tolist() == [0, 0, *np.array(logprobs, np.float32).tolist()]
    assert {s.dtype for s in sample.streams.values()} == {np.dtype(np.float32)}


def test_ids_are_not_encoded_again(engine: Recorded) -> None:
    """The ids of "o" and "n" one by one are not what the tokenizer makes of "on"; they must stay."""
    assert engine.tokenizer is not None
    odd = [i for letter in "Coin " for i in engine.tokenizer.encode(letter)]
    assert engine.tokenizer.encode(engine.tokenizer.decode(odd)) != odd
    assert rl_sample([3], Output(odd, [-1.0] * len(odd), "length"), 1.0).tokens.tolist() == [3, *odd]


def test_every_answer_of_a_group_that_teaches_reaches_the_loss_unchanged(engine: Recorded, coin_run: Path) -> None:
    source = rollouts(engine, coin_run)
    batches = source.step(0)
    assert engine.sampling == Sampling(1.0, 1.0, 12, 4, seed=engine.sampling.seed)
    assert engine.asked == [p.prompt for p in source.problems(0)]
    expected = {}
    flat = 0
    for prompt, group in zip(engine.asked, engine.answers, strict=True):
        even = [o.finish_reason == "stop" and o.reasoning is not None and o.text in list("02468") for o in group]
        flat += len(set(even)) == 1
        mean = sum(even) / 4
        for o, is_right in zip(group, even, strict=True):
            if len(set(even)) == 2:
                tokens = (*engine.tokenizer.prompt_ids(prompt), *o.token_ids)
                expected.setdefault(tokens, []).append((o, (is_right - mean) / (mean * (1 - mean)) ** 0.5))
    assert source.facts["flat_groups"] == flat / 8 < 1
    found = documents(batches)
    assert len(found) == sum(map(len, expected.values())) == 4 * (8 - flat)
    for document in found:
        output, advantage = expected[tuple(document["tokens"].tolist())][0]
        n = len(output.token_ids)
        assert not document["rl"][:-n].any() and (document["rl"][-n:] == 1).all()
        assert document["tokens"][-n:].tolist() == output.token_ids
        assert document["advantage"][-n:] == pytest.approx(advantage, abs=1e-4) and not document["advantage"][:-n].any()
        group = expected[tuple(document["tokens"].tolist())]  # the same answer may have been given twice
        assert any(document["old_logprob"][-n:].tolist() == np.array(o.logprobs, np.float32).tolist() for o, _ in group)


def test_on_policy_the_ratio_is_one(engine: Recorded, coin_run: Path) -> None:
    """Law 1: the trainer's log-probabilities of the sampled tokens are the engine's."""
    batches = rollouts(engine, coin_run).step(3)
    worst = 0.0
    for document in documents(batches):
        tokens = torch.from_numpy(document["tokens"])[None]
        with torch.no_grad():
            logprob = engine.model(tokens)[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].numpy()
        sampled = document["rl"][1:] > 0
        worst = max(worst, float(np.abs(np.exp(logprob - document["old_logprob"][1:])[sampled] - 1).max()))
    assert worst < 1e-4
    total = totals(batches)
    logs = [compute(engine.model, batch, total, Loss())[1] for batch in batches]
    assert sum(float(part["mismatch"]) for part in logs) < 1e-4 and sum(float(part["clipped"]) for part in logs) == 0
    weight = np.concatenate([d["rl"] for d in documents(batches)])
    advantage = np.concatenate([d["advantage"] for d in documents(batches)])
    assert sum(float(part["rl"]) for part in logs) == pytest.approx(-(weight * advantage).sum() / weight.sum(), abs=1e-4)


def test_a_step_depends_on_its_number_the_seed_and_the_weights_only(engine: Recorded, coin_run: Path) -> None:
    def tokens(step: int) -> list[list[int]]:
        rollouts(engine, coin_run).step(step)
        return [o.token_ids for group in engine.answers for o in group]

    first = tokens(1)
    assert tokens(2) != first == tokens(1)


def test_a_step_without_a_signal_is_empty_and_says_so(engine: Recorded, coin_run: Path) -> None:
    source = rollouts(engine, coin_run, max_tokens=1)  # too short to say anything
    assert source.step(0) == []
    assert (
        source.facts["flat_groups"] == source.facts["none_right"] == 1
        and source.facts["reward"] == 0
        and source.facts["response_tokens"] == 1
    )
    assert source.facts["rollout_tokens"] > 0 and source.facts["truncated"] + source.facts["false_claim"] == 1


def test_a_false_claim_costs_and_an_answer_that_was_cut_off_does_not(engine: Recorded, coin_run: Path) -> None:
    for limit in (2, 12):
        source = rollouts(engine, coin_run, max_tokens=limit, wrong_reward=-0.5)
        source.step(0)
        facts = source.facts
        assert facts["reward"] == pytest.approx(facts["accuracy"] - 0.5 * facts["false_claim"])
        assert facts["truncated" if limit == 2 else "false_claim"] > 0.2


def test_an_answer_longer_than_a_row_gets_a_longer_row(engine: Recorded, coin_run: Path) -> None:
    found = rollouts(engine, coin_run, sequence_length=8, micro_tokens=8).step(0)
    assert found and all(batch.tokens.shape[1] > 8 for batch in found)
    assert {tuple(d["tokens"].tolist()) for d in documents(found)} == {
        tuple(d["tokens"].tolist()) for d in documents(rollouts(engine, coin_run).step(0))
    }


def unsure(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """Judges as the coin does, but cannot tell about 0 and 1."""
    said = answers(completions)
    return [None if a in ("0", "1") else float(a in list("2468")) for a in said]


def length(prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
    return [float(len(ids)) for ids in completion_ids]


def test_what_could_not_be_judged_never_reaches_the_loss(engine: Recorded, coin_run: Path) -> None:
    settings = {"rl.max_unjudged": 1.0, "puzzles": {"coin:puzzle": {"verifier": f"{__name__}:unsure"}}}
    recipe = load(coin_run / "recipe.toml", settings)
    source = Rollouts(engine, recipe.rl, recipe.puzzles, recipe.seed)
    found = documents(source.step(0))
    assert found and 0.1 < source.facts["unjudged"] < 0.5
    said = {tuple(o.token_ids): o.text for group in engine.answers for o in group}
    texts = [said[tuple(d["tokens"][d["rl"] > 0].tolist())] for d in found]
    assert not {"0", "1"} & set(texts)
    for document, text in zip(found, texts, strict=True):
        assert (document["advantage"][-1] > 0) == (text in list("2468"))


def test_a_run_whose_verifier_is_blind_stops(engine: Recorded, coin_run: Path) -> None:
    """verl PR 5635: every reward became 0 and nothing said so."""
    recipe = load(coin_run / "recipe.toml", {"puzzles": {"coin:puzzle": {"verifier": f"{__name__}:unsure"}}})
    with pytest.raises(BadInput, match=r"rl step 0: [1-4]\d% of the answers could not be judged.*unsure' gave no score"):
        Rollouts(engine, recipe.rl, recipe.puzzles, recipe.seed).step(0)


def test_further_rewards_are_added_with_their_weight(engine: Recorded, coin_run: Path) -> None:
    plain, more = rollouts(engine, coin_run), rollouts(engine, coin_run, rewards={f"{__name__}:length": 0.25})
    plain.step(0)
    more.step(0)
    assert more.facts["reward"] == pytest.approx(plain.facts["reward"] + 0.25 * plain.facts["response_tokens"])
    assert more.facts["accuracy"] == plain.facts["accuracy"]
