"""The stage `prefer`: DPO and its relatives, or a Bradley-Terry reward model, on pairs of answers; judged on held-out prompts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from pascaline.data.batch import Sample, collate, pack
from pascaline.data.loader import ListSamples
from pascaline.data.pairs import Pair, documents, read, sample, split
from pascaline.errors import BadInput
from pascaline.eval.passk import mean_interval
from pascaline.model import hf
from pascaline.model.transformer import Model, RewardHead
from pascaline.post.reward import RewardModel
from pascaline.post.stage import Run, loader, train
from pascaline.runs import atomic_path, write_json
from pascaline.stopping import Interrupt
from pascaline.tables import Prefer
from pascaline.train.losses import token_logprobs
from pascaline.train.parallel import ALONE
from pascaline.train.preference import Preference

FILE, REFERENCE = "preference.json", "reference.safetensors"
BINS = 10  # of the expected calibration error
RESAMPLES = 1000  # for its interval
WEIGHING: dict[str, Literal["sum", "mean", "last"]] = {"sigmoid": "sum", "ipo": "mean", "norm": "mean", "reward": "last"}


def prefer(run: Run, name: str) -> dict[str, Any]:
    """Learn from pairs; by one rank. preference.json says what came of it on the held-out prompts."""
    stage: Prefer = getattr(run.recipe, name)
    run = replace(run, ranks=ALONE)
    model = hf.load(run.origin(name), device=run.device)
    pairs, samples, left = _fitting(run, name, model.config.max_position_embeddings)
    out = split(pairs, stage.held_out)
    row = max(stage.sequence_length, *(len(s.tokens) for s in samples))
    if stage.method == "reward":
        model.reward_head = RewardHead(model.config.hidden_size).to(run.device)
    else:
        samples = _referred(run, name, samples, row)
    rows = loader(run, stage, ListSamples([s for s, held in zip(samples, out, strict=True) if not held]), row)
    steps = max(round(stage.epochs * rows.epoch_size(0) / rows.rows), 1)
    rule = Preference("ipo" if stage.method == "ipo" else "sigmoid", stage.beta)
    summary = train(run, name, model, rows, steps, preference=rule)
    judged = [s for s, held in zip(samples, out, strict=True) if held]
    prompts = [pair.key for pair, held in zip(pairs, out, strict=True) if held]
    with run.progress(f"{name} held out", len(judged), "pair") as progress, Interrupt() as interrupt:

        def watch(done: int) -> None:
            progress.update(done)
            if interrupt.requested:
                raise interrupt.stopped(f"stopped while judging {name}")

        found = _judged(run, name, model.eval(), judged, prompts, row, watch)
        progress.note(note(found))
    counts = {"learnt_from": len(pairs) - len(judged), "held_out": len(judged), "left_out": dict(left)}
    facts = {"method": stage.method, **({} if stage.method == "reward" else {"beta": stage.beta})}
    if stage.method == "reward":
        RewardModel(model, run.tokenizer()).save_head(run.folder(name), {"dtype": str(run.dtype).removeprefix("torch.")})
    write_json(run.folder(name) / FILE, {**facts, "pairs": counts, "held_out": found})
    return summary | {"pairs": counts["learnt_from"], "accuracy": found["accuracy"]}


# ---- the pairs -------------------------------------------------------------------------------------------------------


def _fitting(run: Run, name: str, room: int) -> tuple[list[Pair], list[Sample], Counter[str]]:
    """The pairs of stage.data that can be learnt from, with their samples, and how many were left out and why (told in a note each)."""
    stage: Prefer = getattr(run.recipe, name)
    tokenizer, places = run.tokenizer(), [run.folder(s) / "pairs.jsonl" if s in run.recipe.stages else Path(s) for s in stage.data]
    pairs, samples = list[Pair](), list[Sample]()
    left, examples = Counter[str](), dict[str, str]()
    for pair in (pair for place in places for pair in read(place)):
        own = sample(pair, tokenizer, WEIGHING[stage.method])
        longest = max(map(len, documents([own])))
        why = "the same answer twice" if pair.chosen == pair.rejected else f"longer than the model's {room} positions" * (longest > room)
        if why:
            left[why] += 1
            examples.setdefault(why, pair.name)
            continue
        pairs.append(pair)
        samples.append(own)
    if left:
        with run.progress(f"{name} pairs", len(pairs) + left.total(), "pair") as progress:
            progress.update(len(pairs) + left.total())
            for why, count in left.items():
                progress.note(f"{count} of {len(pairs) + left.total()} pairs left out: {why} (the first: {examples[why]})")
    if not pairs:
        raise BadInput(f"{name} has no pair to learn from: {', '.join(f'{why} ({n})' for why, n in left.items())}.")
    return pairs, samples, left


def _referred(run: Run, name: str, samples: list[Sample], row: int) -> list[Sample]:
    """The samples with the stream `ref_logprob`: log-probabilities of the model that the stage starts from, in the dtype that it is trained
    in. They are computed once and kept in the stage's folder, so that a run that goes on has the same bits."""
    path, print_ = run.folder(name) / REFERENCE, _fingerprint(samples)
    if not path.exists():
        model = hf.load(run.origin(name), run.dtype, run.device)
        with run.progress(f"{name} reference", len(samples), "pair") as progress, Interrupt() as interrupt:

            def watch(done: int) -> None:
                progress.update(done)
                if interrupt.requested:
                    raise interrupt.stopped(f"stopped while computing the reference of {name}")

            found = logprobs(model, samples, row, max(getattr(run.recipe, name).micro_tokens // row, 1), run.tokenizer().pad, watch)
        with atomic_path(path) as temporary:
            save_file({"logprob": np.concatenate(found)}, temporary, metadata={"pairs": print_})
    try:
        with safe_open(path, "numpy") as file:
            known = (file.metadata() or {}).get("pairs")
        whole = load_file(path)["logprob"]
    except (OSError, SafetensorError, KeyError) as error:
        raise BadInput(f"{path} cannot be read ({error}); delete it, and it is computed again.") from None
    if known != print_:
        raise BadInput(f"the pairs of {name} are others than when it began: put {', '.join(getattr(run.recipe, name).data)} back as they "
                       "were, or start over with --fresh.")  # fmt: skip
    parts = np.split(whole, np.cumsum([len(s.tokens) for s in samples])[:-1])
    return [replace(s, streams={**s.streams, "ref_logprob": part}) for s, part in zip(samples, parts, strict=True)]


def _fingerprint(samples: Sequence[Sample]) -> str:
    digest = blake2b(digest_size=16)
    for own in samples:
        digest.update(np.array([len(own.tokens), *own.begins, *own.tokens], "<i8").tobytes())
    return digest.hexdigest()


@torch.no_grad()
def logprobs(
    model: Model, samples: Sequence[Sample], row: int, rows: int, pad: int, watch: Callable[[int], None] = lambda done: None
) -> list[np.ndarray]:
    """The log-probability of each token that the stream `pair` weighs, 0 elsewhere; one float32 array a sample. `rows` rows at once; watch
    is told how many samples are done."""
    found = [np.zeros(len(s.tokens), np.float32) for s in samples]
    packed, done = pack([len(s.tokens) for s in samples], row), 0
    for at in range(0, len(packed), rows):
        own = packed[at : at + rows]
        batch = collate([[samples[i] for i in r] for r in own], row, pad)
        keep = batch.weight("pair").nonzero().squeeze(1).to(model.device)
        batch = batch.to(model.device)
        hidden, _ = model.hidden(batch.tokens, batch.positions, batch.document_ids)
        target = batch.tokens[:, 1:].flatten()[keep]
        values, *_ = token_logprobs(hidden[:, :-1].flatten(0, 1)[keep], model.head_weight, target)
        whole = torch.zeros(len(own), row, device=model.device)
        whole[keep // (row - 1), keep % (row - 1) + 1] = values
        for b, r in enumerate(own):
            begin = 0
            for i in r:
                end = begin + len(found[i])
                found[i], begin = whole[b, begin:end].cpu().numpy(), end
                done += 1
        watch(done)
    return found


# ---- the judgement ---------------------------------------------------------------------------------------------------


def _judged(
    run: Run, name: str, model: Model, samples: list[Sample], prompts: list[str], row: int, watch: Callable[[int], None]
) -> dict[str, Any]:
    """What the trained model makes of pairs that it has not seen."""
    stage: Prefer = getattr(run.recipe, name)
    if stage.method == "reward":
        score = RewardModel(model, run.tokenizer()).scores([d.tolist() for d in documents(samples)], lambda done: watch(done // 2))
        chosen, rejected = score[0::2].astype(np.float64), score[1::2].astype(np.float64)
        return judge(chosen - rejected, prompts) | {"chosen_score": float(chosen.mean()), "rejected_score": float(rejected.mean())}
    now = logprobs(model, samples, row, max(stage.micro_tokens // row, 1), run.tokenizer().pad, watch)
    change = np.array([_changes(s, own) for s, own in zip(samples, now, strict=True)])
    told = {"chosen_change": float(change[:, 0].mean()), "rejected_change": float(change[:, 1].mean())}
    return judge(stage.beta * (change[:, 0] - change[:, 1]), prompts) | told | {"both_fell": float((change < 0).all(1).mean())}


def _changes(own: Sample, logprob: np.ndarray) -> tuple[float, float]:
    """How much more probable than under the reference each of the two answers is, in nats (a token, where the weights are means)."""
    weight = own.streams["pair"].astype(np.float64)
    values = weight * (logprob - own.streams["ref_logprob"])
    return float(values[weight > 0].sum()), -float(values[weight < 0].sum())


def judge(margin: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
    """Accuracy, mean margin, and how well sigmoid(margin) is the probability that the chosen answer is the better one. margin [n], and the
    prompt of each; a prompt counts once, however many pairs it has. Each with its 95 % interval over the prompts:

    - accuracy: margins above 0, a margin of 0 counts a half; brier: mean (1 - sigmoid(margin))^2 (Brier 1950), 0.25 for one that knows
      nothing; calibration_error: expected calibration error (arXiv 1706.04599 eq. 3) over BINS bins of the probability of the likelier
      answer, 0.5 to 1; its interval is a bootstrap's percentiles, and with few pairs it is too large by chance alone.
    """
    keys, of, counts = np.unique(np.array(prompts), return_inverse=True, return_counts=True)
    out: dict[str, Any] = {"pairs": len(margin), "prompts": len(keys)}
    measured = {"accuracy": (np.sign(margin) + 1) / 2, "margin": margin, "brier": (1 - _sigmoid(margin)) ** 2}
    for what, values in measured.items():
        means = np.bincount(of, weights=values) / counts
        out[what], out[f"{what}_low"], out[f"{what}_high"] = mean_interval(means, bounded=what != "margin")
    once, draw = 1 / counts[of], np.random.default_rng(0)
    drawn = (np.bincount(draw.integers(len(keys), size=len(keys)), minlength=len(keys)) for _ in range(RESAMPLES))
    low, high = np.percentile([calibration_error(margin, once * times[of]) for times in drawn], [2.5, 97.5])
    error = {"": calibration_error(margin, once), "_low": float(low), "_high": float(high)}
    return out | {f"calibration_error{end}": value for end, value in error.items()}


def calibration_error(margin: np.ndarray, weight: np.ndarray) -> float:
    """Distance between how sure (sigmoid |margin|) and how often right, over bins of equal width, each by its share of the weight."""
    sure, right = _sigmoid(np.abs(margin)), (np.sign(margin) + 1) / 2
    bins = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gap = np.bincount(bins, weights=weight * (right - sure), minlength=BINS)
    return float(np.abs(gap).sum() / weight.sum())


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))  # never overflows


def note(found: dict[str, Any]) -> str:
    """One line for people."""
    told = (
        f"{found['pairs']} held-out pairs of {found['prompts']} prompts: accuracy {found['accuracy']:.3f} (95 % interval "
        f"{found['accuracy_low']:.3f} to {found['accuracy_high']:.3f}), margin {found['margin']:.3g}, calibration error "
        f"{found['calibration_error']:.3f}, Brier {found['brier']:.3f} (0.25 knows nothing)"
    )
    if found.get("chosen_change", 0.0) < 0:
        told += (
            f"; the chosen answers became less probable too ({found['chosen_change']:.3g} nats, the rejected ones "
            f"{found['rejected_change']:.3g}), which nobody asked for: lower lr, train less, or raise beta"
        )
    return told
