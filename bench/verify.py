"""What verdicts cost: integers against math-verify, the pool against one process, and an honest answer among hostile ones."""

import argparse
import contextlib
import logging
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import alternate, finish
from _verifying import HOSTILE, expressions, integers

from pascaline.data.parallel import cores
from pascaline.post.verifiers import get, latex
from pascaline.post.verifiers.pool import Failure, Pool, environment

FLOORS = {"integer": 50.0, "pool": 0.8, "isolation": 1.05}  # of the last, a twentieth is for killing the process


def of_math_verify(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """As it is used where nobody kills it: one process, both sides parsed."""
    from math_verify import parse, verify

    return [verify(parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None) for gold, answer in pairs]


def integer(rounds: int, seed: int) -> dict[str, Any]:
    """Our exact integers against math-verify, both in this process, on the same answers."""
    pairs = integers(250, 8, random.Random(seed))
    ours = get("pascaline.post.verifiers.numbers:integer")
    arguments: dict[str, Any] = {
        "prompts": ["?"] * len(pairs), "completions": [answer for _, answer in pairs],
        "completion_ids": [[]] * len(pairs), "answer": [gold for gold, _ in pairs],
    }  # fmt: skip
    same = sum((score == 1.0) == other for score, other in zip(ours(**arguments), of_math_verify(pairs), strict=True))
    rates = alternate({"integer": lambda: len(ours(**arguments)), "math-verify": lambda: len(of_math_verify(pairs))}, rounds, 0.5)
    return _rates(rates, "integer", "math-verify") | {"answers": len(pairs), "same verdict": same}


def throughput(rounds: int, seed: int, workers: int) -> dict[str, Any]:
    """The pool's rate against that of the same function in this process, times the number of processes.

    Beside it, what the machine gives at that moment: as many processes without a pool, each with all the answers.
    """
    pairs = expressions(250, 8, random.Random(seed))
    file = str(Path(__file__).with_name("_verifying.py"))
    with Pool(workers) as pool, contextlib.ExitStack() as stack:
        apart = [stack.enter_context(subprocess.Popen([sys.executable, file, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                      stderr=subprocess.DEVNULL, env=environment())) for _ in range(workers)]  # fmt: skip

        def all_apart() -> int:
            for process in apart:
                process.stdin.write(b"\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            return len(pairs) * len([process.stdout.readline() for process in apart])  # type: ignore[union-attr]

        rates = alternate(
            {
                "pool": lambda: len(pool.map("pascaline.post.verifiers.latex:same", pairs)),
                "one process": lambda: len([latex.same(gold, answer) for gold, answer in pairs]),
                "processes apart": all_apart,
            },
            rounds,
        )
    result = _rates(rates, "pool", "one process") | {"answers": len(pairs), "workers": workers}
    result |= {"ratio": result["ratio"] / workers, "ratios": [ratio / workers for ratio in result["ratios"]]}
    return result | {"of processes apart": _rates(rates, "pool", "processes apart")["ratio"]}


def isolation(rounds: int, seed: int, workers: int, timeout: float) -> dict[str, Any]:
    """How much later than alone an honest answer is judged behind hostile ones; they come first, so that all processes hang at once.

    In timeouts for each time that the processes have to go through hostile answers: 1 for up to as many as there are processes.
    """
    honest: list[tuple[str, str]] = [("7", f"\\boxed{{{7 + i % 2}}}") for i in range(64)]  # quick ones: what is seen is what the pool does
    result: dict[str, Any] = {}
    with Pool(workers, timeout) as pool:

        def done(pairs: Sequence[tuple[str, str]]) -> list[Any]:
            began = time.monotonic()
            return [one if isinstance(one, Failure) else (one[0], one[1] - began) for one in pool.map("_verifying:timed", pairs)]

        done(honest)  # warm up
        for hostile in (1, workers, 3 * workers):
            delays, wrong, before = [], 0, pool.kills
            for _ in range(rounds):
                alone = done(honest)
                among = done([("7", HOSTILE[i % len(HOSTILE)]) for i in range(hostile)] + honest)[hostile:]
                wrong += sum(isinstance(b, Failure) or a[0] != b[0] for a, b in zip(alone, among, strict=True))
                delays.append(max(b[1] - a[1] for a, b in zip(alone, among, strict=True) if not isinstance(b, Failure)))
            result[f"{hostile} hostile"] = {
                "worst delay s": [round(delay, 3) for delay in delays],
                "in timeouts": round(max(delays) / timeout / math.ceil(hostile / workers), 3),
                "killed": pool.kills - before,
                "other verdicts": wrong,
            }
    return result | {"ratio": max(one["in timeouts"] for one in result.values()), "timeout s": timeout, "honest": len(honest)}


def _rates(rates: dict[str, list[float]], ours: str, theirs: str) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
    medians = {f"{name} /s": round(statistics.median(values)) for name, values in rates.items()}
    return medians | {"ratio": statistics.median(ratios), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for an answer, where some are hostile")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=FLOORS, help="one of the three")
    options = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # that its own timer is off
    result: dict[str, Any] = {}
    measures = {
        "integer": lambda: integer(options.rounds, options.seed),
        "pool": lambda: throughput(options.rounds, options.seed, options.workers),
        "isolation": lambda: isolation(min(options.rounds, 3), options.seed, options.workers, options.timeout),
    }
    for name, measure in measures.items():
        if options.only in (None, name):
            found = measure()
            floor, reached = FLOORS[name], found["ratio"]
            kept = reached <= floor if name == "isolation" else reached >= floor
            result[name] = found | {"floor": floor, "kept": kept}
            if not options.json:
                print(f"{name}: {reached:.3g} ({'at most' if name == 'isolation' else 'floor'} {floor:g}): {'kept' if kept else 'MISSED'}")
    finish(result | {"seed": options.seed, "rounds": options.rounds}, options.json)


if __name__ == "__main__":
    main()
