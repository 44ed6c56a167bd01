"""Tokens per second with the MTP module's guesses and without, and how many of the guesses are accepted, by domain: two puzzles (held-out
problems, as chats) and Python's standard library (raw text, which the laptop recipes train on). The two take turns; the same tokens come
out.
Needs a trained model with an MTP module: `pascaline bench speculate --model runs/mtp/model`."""

import argparse
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from _common import DTYPES, finish

from pascaline.data import puzzles
from pascaline.engine import Engine, Sampling
from pascaline.engine.engine import Prompt
from pascaline.engine.speculate import Speculation


class Always(Speculation):
    """Guesses at every step, so that it is measured where it does not pay, too."""

    def pays(self, rows: int) -> bool:
        return True


def domains(engine: Engine, count: int) -> dict[str, list[Prompt]]:
    found: dict[str, list[Prompt]] = {
        name: [p.prompt for p in puzzles.problems(name, count, 0, held_out=True)] for name in ("countdown", "chain")
    }
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[: 4 * count : 4]
    assert engine.tokenizer is not None
    return found | {"code": [engine.tokenizer.prefix + engine.tokenizer.encode(file.read_text()[:200]) for file in files]}


def answers(engine: Engine, prompts: list[Prompt], batch: int, sampling: Sampling) -> tuple[float, list[list[int]]]:
    """Seconds, and the tokens; `batch` prompts at a time."""
    began, said = time.perf_counter(), []
    for start in range(0, len(prompts), batch):
        said += [group[0].token_ids for group in engine.generate(prompts[start : start + batch], sampling)]
    return time.perf_counter() - began, said


def measured(make: Callable[[bool], Engine], batch: int, rounds: int, count: int, sampling: Sampling) -> dict[str, dict[str, float]]:
    with_guesses, without = make(True), make(False)
    with_guesses.speculation = Always(with_guesses.model)
    result = {}
    for name, prompts in domains(without, max(count, batch)).items():
        rates: dict[bool, list[float]] = {True: [], False: []}
        said: dict[bool, list[list[int]]] = {}
        before = with_guesses.stats.accepted_tokens, with_guesses.stats.draft_tokens
        for _ in range(rounds + 1):  # the first warms up
            for guessing, engine in ((True, with_guesses), (False, without)):
                seconds, said[guessing] = answers(engine, prompts, batch, sampling)
                rates[guessing].append(sum(map(len, said[guessing])) / seconds)
        fast, slow = (statistics.median(rates[guessing][1:]) for guessing in (True, False))
        stats = with_guesses.stats
        accepted = (stats.accepted_tokens - before[0]) / max(stats.draft_tokens - before[1], 1)
        same = sum(a == b for a, b in zip(said[True], said[False], strict=True)) / len(prompts)
        result[name] = {"acceptance": accepted, "tokens_per_s": fast, "without": slow, "ratio": fast / slow, "same_answers": same}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--model", default="runs/mtp/model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.6)
    options = parser.parse_args()
    sampling = Sampling(options.temperature, max_tokens=options.max_tokens, seed=1)
    result = {}
    for name, dtype in DTYPES.items():
        for batch in options.batches:

            def make(speculate: bool, dtype=dtype) -> Engine:  # type: ignore[no-untyped-def]
                return Engine(options.model, dtype=dtype, speculate=speculate, prefix_reuse=False)

            result[f"{name} batch {batch}"] = measured(make, batch, options.rounds, options.problems, sampling)
    finish(result, options.json)


if __name__ == "__main__":
    main()
