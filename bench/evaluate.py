"""Answers evaluated per second, the engine against the same protocol through transformers' `generate`: the same weights, problems,
sampling and judge, each side in its best dtype and transformers at its best batch. The accuracies of both sides must agree."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import DTYPES, alternate, best, finish

from pascaline.data import puzzles
from pascaline.engine import Engine, Output, Sampling
from pascaline.eval import passk, tasks
from pascaline.model import hf
from pascaline.post.verifiers import judge
from pascaline.tokenizer import Tokenizer

SEED = 1_000_003
BATCHES = (32, 128)  # answers that transformers is given at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="runs/demo/model")
    parser.add_argument("--puzzle", default="countdown")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=448)
    options = parser.parse_args()
    problems = puzzles.problems(options.puzzle, options.problems, SEED, held_out=True)
    sampling = Sampling(0.6, 0.95, options.max_tokens, options.samples, seed=SEED)
    means: dict[str, list[float | None]] = {}
    sides: dict[str, Callable[[], int]] = {}
    for name, dtype in DTYPES.items():
        sides[f"pascaline {name}"] = ours(options.model, dtype, problems, sampling, means)
        for batch in BATCHES:
            sides[f"transformers {name} batch {batch}"] = theirs(options.model, dtype, problems, sampling, batch, means)
    began = time.perf_counter()
    rates = alternate(sides, options.rounds)
    found = {who: best(rates, who) for who in ("pascaline", "transformers")}
    result: dict[str, Any] = {
        "ratio": found["pascaline"][1] / found["transformers"][1],
        "floor": 4.0,
        "answers_per_s": {who: rate for who, (_, rate) in found.items()},
        "best": {who: name for who, (name, _) in found.items()},
        "accuracy": {name: passk.mean_interval([v for v in values if v is not None]) for name, values in means.items()},
        "answers": options.problems * options.samples,
        "seconds": time.perf_counter() - began,
    }
    finish(result, options.json)


def ours(folder: str, dtype: torch.dtype, problems: list[Any], sampling: Sampling, means: dict[str, Any]) -> Callable[[], int]:
    engine = Engine(hf.load(folder, dtype), Tokenizer.load(folder))

    def work() -> int:
        engine.flush()  # no prompt is known from the round before
        result = tasks.evaluate(engine, problems, sampling)
        means[f"pascaline {dtype}"] = result.means
        return int(result.right.size)

    return work


def theirs(
    folder: str, dtype: torch.dtype, problems: list[Any], sampling: Sampling, batch: int, means: dict[str, Any]
) -> Callable[[], int]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    own = Tokenizer.load(folder)
    texts = [
        words.apply_chat_template([{"role": "user", "content": p.prompt}], tokenize=False, add_generation_prompt=True) for p in problems
    ]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of about one length, as lm-eval makes its batches

    def answer(prompt: list[int], ids: list[int]) -> Output:
        """What was said up to the end token, thought and answer apart."""
        ends = [ids.index(token) for token in {own.end, own.end_of_turn} if token in ids]
        said = ids[: min(ends)] if ends else ids
        thought, text = own.thought(prompt, said)
        return Output(said, [], "stop" if ends else "length", text or "", thought)

    def work() -> int:
        outputs: list[list[Output]] = [[] for _ in problems]
        each = max(batch // sampling.n, 1)
        for start in range(0, len(order), each):
            rows = order[start : start + each]
            told = words([texts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.inference_mode():
                made = model.generate(
                    **told, do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0,
                    max_new_tokens=sampling.max_tokens, num_return_sequences=sampling.n, eos_token_id=[own.end, own.end_of_turn],
                )  # fmt: skip
            for k, ids in enumerate(made[:, told["input_ids"].shape[1] :].tolist()):
                i = rows[k // sampling.n]
                outputs[i].append(answer(own.prompt_ids(problems[i].prompt), ids))
        result = tasks.Result(problems, outputs, judge(problems, outputs).verdicts)
        means[f"transformers {dtype} batch {batch}"] = result.means
        return int(result.right.size)

    return work


if __name__ == "__main__":
    main()
