"""Tokens sampled per second inside a step of reinforcement: the engine under rl's own rollouts (sampling, log-probabilities, verdicts,
advantages, packed batches) against transformers' `generate` of the same answers alone, at its best batch. The same weights and prompts,
temperature 1; each side in its best dtype."""

import argparse
import time
from collections.abc import Callable

import torch
from _common import DTYPES, alternate, best, finish

from pascaline.engine import Engine
from pascaline.model import hf
from pascaline.post.rollout import Rollouts
from pascaline.recipe import load
from pascaline.tokenizer import Tokenizer

BATCHES = (64, 256)  # answers that transformers is given at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="runs/demo/04-sft/model")
    parser.add_argument("--recipe", default="recipes/laptop.toml", help="whose [rl] says what is sampled")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=448)
    options = parser.parse_args()
    sizes = {"rl.prompts": options.prompts, "rl.samples": options.samples, "rl.max_tokens": options.max_tokens}
    recipe = load(options.recipe, sizes)
    other: dict[str, float] = {}
    sides: dict[str, Callable[[], int]] = {}
    for name, dtype in DTYPES.items():
        engine = Engine(hf.load(options.model, dtype), Tokenizer.load(options.model))
        rollouts = Rollouts(engine, recipe.rl, recipe.puzzles, recipe.seed)
        sides[f"pascaline {name}"] = ours(rollouts, other)
        for batch in BATCHES:
            sides[f"transformers {name} batch {batch}"] = theirs(options.model, dtype, rollouts, batch)
    began = time.perf_counter()
    rates = alternate(sides, options.rounds)
    found = {who: best(rates, who) for who in ("pascaline", "transformers")}
    finish(
        {
            "ratio": found["pascaline"][1] / found["transformers"][1],
            "floor": 5.0,
            "tokens_per_s": {who: rate for who, (_, rate) in found.items()},
            "best": {who: name for who, (name, _) in found.items()},
            "answers": options.prompts * options.samples,
            "outside_sampling_and_verifying": other["share"],
            "seconds": time.perf_counter() - began,
        },
        options.json,
    )


def ours(rollouts: Rollouts, other: dict[str, float]) -> Callable[[], int]:
    def work() -> int:
        rollouts.engine.flush()  # no prompt is known from the round before
        began = time.perf_counter()
        rollouts.step(0)
        facts = rollouts.facts
        other["share"] = 1 - (facts["rollout_seconds"] + facts["verify_seconds"]) / (time.perf_counter() - began)
        return round(facts["response_tokens"] * rollouts.rl.prompts * rollouts.rl.samples)

    return work


def theirs(folder: str, dtype: torch.dtype, rollouts: Rollouts, batch: int) -> Callable[[], int]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    own, rl = Tokenizer.load(folder), rollouts.rl
    prompts = sorted((own.prompt_ids(p.prompt) for p in rollouts.problems(0)), key=len)  # rows of about one length
    ends = [own.end, own.end_of_turn]

    def work() -> int:
        said, each = 0, max(batch // rl.samples, 1)
        for start in range(0, len(prompts), each):
            rows = prompts[start : start + each]
            longest = max(map(len, rows))
            ids = torch.tensor([[own.pad] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            with torch.inference_mode():
                made = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=rl.max_tokens,
                    num_return_sequences=rl.samples, eos_token_id=ends, pad_token_id=own.pad,
                )  # fmt: skip
            for answer in made[:, longest:].tolist():
                stops = [answer.index(token) for token in ends if token in answer]
                said += min(stops) + 1 if stops else len(answer)
        return said

    return work


if __name__ == "__main__":
    main()
