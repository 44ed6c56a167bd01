"""Tokens that votes spend with the early stop and with all k samples finished, on held-out problems, and whether the answers are the same.
Needs a trained model: `pascaline bench vote --model runs/demo/model`."""

import argparse
import json
from typing import Any

from _common import finish

from pascaline.data import puzzles
from pascaline.data.puzzles import Verdict
from pascaline.engine import Engine, Sampling
from pascaline.engine.vote import votes
from pascaline.post.verifiers import judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--model", default="runs/demo/model")
    parser.add_argument("--puzzle", default="countdown")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--max-tokens", type=int, default=448)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    engine = Engine(options.model)
    problems = puzzles.problems(options.puzzle, options.problems, 0, held_out=True)
    prompts, result = [problem.prompt for problem in problems], dict[str, Any]()
    for k in options.samples:
        sampling = Sampling(max_tokens=options.max_tokens, seed=options.seed)
        early = votes(engine, prompts, sampling, k)
        whole = votes(engine, prompts, sampling, k, judge=lambda prompt, output: 0.0)  # a judge wants to hear all of them
        spent, all_tokens = (sum(one.tokens_spent for one in held) for held in (early, whole))
        result[f"k = {k}"] = {
            "tokens": spent,
            "tokens_of_all": all_tokens,
            "saved": 1 - spent / all_tokens,
            "cancelled": sum(one.cancelled for one in early),
            "samples": k * len(problems),
            "same_answer": sum(one.answer == next(iter(other.tally), None) for one, other in zip(early, whole, strict=True)),
            "right": sum(
                Verdict.RIGHT in group for group in judge(problems, [[one.winner] if one.winner else [] for one in early]).verdicts
            ),
            "problems": len(problems),
        }
        if not options.json:
            print(f"k = {k}", json.dumps(result[f"k = {k}"]), flush=True)
    finish(result if options.json else {}, options.json)


if __name__ == "__main__":
    main()
