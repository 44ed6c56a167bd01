"""The hygiene suite (docs/verifiers.md) over every built-in verifier, on small problems made here, over every built-in puzzle and every
admitted family of reasoning-gym; prints the table of docs/verifiers.md. `--names integer countdown` for some of them."""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import finish

from pascaline.data import puzzles
from pascaline.errors import BadInput
from pascaline.eval.hygiene import check
from pascaline.eval.hygiene.checks import Limits
from pascaline.post.verifiers.base import BUILT_IN

Row = dict[str, Any]
HEAD = ["name", "oracle", "constant", "echo", "empty", "ms a call (in a batch)", "different prompts per 10,000", "fails"]


def stories(rng: random.Random) -> Row:
    """Whole numbers, with GSM8K's mark and commas."""
    price, count, spent = rng.randrange(2, 90), rng.randrange(2, 60), rng.randrange(1, 2000)
    left = price * count - spent
    prompt = f"A shop sells {count} chairs at ${price} each and pays ${spent} of it for wood. How many dollars are left?"
    return {"prompt": prompt, "answer": f"{count} chairs bring {price * count}, less {spent}.\n#### {left:,}"}


def fractions(rng: random.Random) -> Row:
    top, bottom = rng.randrange(1, 40), rng.randrange(2, 40)
    return {"prompt": f"A rope of {top} metres is cut into {bottom} equal parts. How long is each, in metres?", "answer": f"{top}/{bottom}"}


def functions(rng: random.Random) -> Row:
    factor, more = rng.randrange(2, 50), rng.randrange(1, 100)
    return {
        "prompt": f"Write a Python function f(x) that gives {factor} times x, and {more} more.",
        "solution": f"def f(x):\n    return {factor} * x + {more}",
        "entry_point": "f",
        "cases": [[[x], factor * x + more] for x in (0, 1, 7)],
    }


def instructed(rng: random.Random) -> Row:
    """Its `solution` keeps to them: words in lower case, without a comma, at least so many."""
    least = rng.randrange(5, 40)
    return {
        "prompt": f"Describe the sea in at least {least} words, in lower case and without commas.",
        "solution": "the sea is wide and grey and it never rests " * 5,
        "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{"relation": "at least", "num_words": least}, {}, {}],
    }


def plain(rng: random.Random) -> Row:
    return {
        "prompt": f"Tell me something about the number {rng.randrange(10**6)}.",
        "solution": "It is a number, and it is neither small nor prime.",
    }


SLOW = {"code": 8}  # starts a process for every test: so many problems at most
# Families that take 10 to 140 ms to make an item, seven of eight of which fall on the other side of the split: so many draws at most.
DEAR = {"zebra_puzzles": 20, "sudoku": 50, "quantum_lock": 50, "polynomial_equations": 100, "rearc": 100, "advanced_geometry": 100,
        "game_of_life": 100, "jugs": 100}  # fmt: skip
# Name of a verifier -> how a row is made, and whether the verifier judges form alone.
SAMPLES: dict[str, tuple[Callable[[random.Random], Row], bool]] = {
    "integer": (stories, False),
    "expression": (fractions, False),
    "math": (fractions, False),
    "code": (functions, False),
    "instructions": (instructed, True),
    "format": (plain, True),
    "language": (plain, True),
}


def sample(name: str, count: int, folder: Path) -> Path:
    rng = random.Random(0)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(SAMPLES[name][0](rng)) + "\n" for _ in range(count)))
    return path


def families() -> list[str]:
    """Of reasoning-gym, as names of puzzles."""
    try:
        from pascaline.data.puzzles import gym

        return [name if name.startswith("gym:") else f"gym:{name}" for name in gym.families()]
    except (ImportError, BadInput) as error:
        print(f"reasoning-gym's families are left out: {error}", file=sys.stderr)
        return []


def told(found: Row) -> list[str]:
    """A row of the table."""
    checks = {one["check"]: one for one in found["checks"]}
    value = {name: one["value"] for name, one in checks.items()}
    constant, best = checks["constant"], checks["constant"]["answer"]
    best = " ".join(best.split())
    which = f" (`{best if len(best) < 24 else best[:21] + '...'}`)" if constant["value"] else ""
    unique = f"{value['different prompts per 10,000']:,}" if found["kind"] == "puzzle" else "-"
    failed = ", ".join(one["check"] for one in found["checks"] if one["verdict"] == "fail")
    rate = "-" if value["oracle"] is None else f"{value['oracle']:.3f}"
    shares = [f"{value[name]:.3f}" for name in ("echo", "empty")]
    times = f"{value['ms per answer, alone']:.3f} ({value['ms per answer, in a batch']:.3f})"
    return [found["name"], rate, f"{constant['value']:.3f}{which}", *shares, times, unique, failed or "-"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--names", nargs="+", help="of verifiers and puzzles (default: all)")
    parser.add_argument("--problems", type=int, default=100, help="that each is asked about")
    parser.add_argument("--draws", type=int, default=10_000, help="of a puzzle, among which equal ones are counted")
    options = parser.parse_args()
    verifiers = [name for name in BUILT_IN if name != "gym"]  # which judges the families below
    names = options.names or [*verifiers, *puzzles.BUILT_IN, *families()]
    results: dict[str, Any] = {}
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", file=sys.stderr if options.json else sys.stdout)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                if name in BUILT_IN and name not in SAMPLES:
                    raise BadInput("bench/hygiene.py has no problems for it")
                data = sample(name, min(options.problems, SLOW.get(name, options.problems)), Path(folder)) if name in BUILT_IN else None
                limits = Limits(form=data is not None and SAMPLES[name][1])
                draws = min(options.draws, DEAR.get(name.removeprefix("gym:"), options.draws))
                found = check(name, data, count=min(options.problems, draws), draws=draws, limits=limits, quiet=True)
            except BadInput as error:
                results[name] = {"error": str(error)}
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
                continue
            results[name] = found
            print(f"| {' | '.join(told(found))} |", file=sys.stderr if options.json else sys.stdout, flush=True)
    facts = {"problems": options.problems, "draws": options.draws, "seed": 0}
    finish({**facts, "results": results} if options.json else facts, options.json)


if __name__ == "__main__":
    main()
