"""What reasoning-gym's families are worth as puzzles: for each, whether its own answer scores, what a constant scores, and what it costs.

Every registered family is measured, those that Pascaline refuses too (never with text that is hostile to an eval). codeio runs programs
that write files where they are started, so this works in a folder that is thrown away. A score is the share of
items that are paid in full, as the verifier `gym` counts. `pascaline bench gym --json`; some 15 minutes on one core.
"""

import argparse
import contextlib
import copy
import random
import signal
import tempfile
import time
from collections import Counter
from types import FrameType
from typing import Any

from _common import finish

from pascaline.data.puzzles import gym

CONSTANTS = ("0", "1", "2", "-1", "nan", "True", "False", "Yes", "No", "none", "[]", "{}", "[NaN]", "1*2*3*4", "hello world")
ALARM = 5  # seconds for one item, and for one score


class Late(BaseException):
    """Not to be caught by the scorers, of which many catch every Exception."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--families", nargs="+", default=sorted(set(gym.ADMITTED) | set(gym.REFUSED) - {"composite"}))
    parser.add_argument("--scored", type=int, default=500, help="items that are scored")
    parser.add_argument("--asked", type=int, default=2000, help="items whose questions are counted")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the items of one family")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, late)
    result: dict[str, Any] = {"seed": options.seed}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for family in options.families:
            result[family] = measured(family, options) | {"refused": gym.REFUSED.get(family, "")}
            if not options.json:
                print(family, result[family], flush=True)
    finish(result, options.json)


def late(number: int, frame: FrameType | None) -> None:
    raise Late


def measured(family: str, options: argparse.Namespace) -> dict[str, Any]:
    """scored, asked: how many items. The shares are of the scored; score_ms and make_ms are means, make_ms_most the longest."""
    items, took, failed = drawn(family, options)
    scored = items[: options.scored]
    began = time.perf_counter()
    oracle = share([paid(*item, item[1]["answer"]) for item in scored])
    score_ms = 1e3 * (time.perf_counter() - began) / max(1, len(scored))
    usual = Counter(str(entry["answer"]) for _, entry in scored).most_common(1)[0][0]
    fixed = {text: share([paid(*item, text) for item in scored[:100]]) for text in CONSTANTS}
    best = max(fixed, key=lambda text: fixed[text])
    return {
        "scored": len(scored), "asked": len(items), "failed": failed, "oracle": oracle,
        "constant": share([paid(*item, usual) for item in scored]), "usual": usual[:40],
        "other_constant": fixed[best], "other": best if fixed[best] else "",
        "empty": share([paid(*item, "") for item in scored]), "echo": share([paid(*item, item[1]["question"]) for item in scored[:100]]),
        "make_ms": 1e3 * sum(took) / len(took), "make_ms_most": 1e3 * max(took), "score_ms": score_ms,
        "unique": len({" ".join(entry["question"].split()) for _, entry in items}),
    }  # fmt: skip


def drawn(family: str, options: argparse.Namespace) -> tuple[list[tuple[Any, Any]], list[float], int]:
    """The items of seeds far apart, the seconds that each took, and how many seeds had none."""
    rng, items, took, failed = random.Random(f"{family} {options.seed}"), [], [], 0
    end = time.perf_counter() + options.seconds
    seeds = 2**32 // gym.SEEDS_APART if family == "pool_matrix" else gym.SEEDS
    while len(items) < options.asked and (time.perf_counter() < end or not items):
        began = time.perf_counter()
        try:
            signal.alarm(10 * ALARM if not items else ALARM)
            items.append(gym._item(family, gym.SEEDS_APART * int(rng.random() * seeds), "{}"))
        except (Exception, Late):  # of a generator
            failed += 1
        finally:
            signal.alarm(0)
        took.append(time.perf_counter() - began)
    return items, took[1:] or took, failed


def paid(dataset: Any, entry: dict[str, Any], answer: str | None) -> bool:
    try:
        signal.alarm(ALARM)
        with gym._quiet():
            return bool(dataset.score_answer(answer, copy.deepcopy(entry)) == 1)
    except (Exception, Late):  # of a scorer
        return False
    finally:
        signal.alarm(0)


def share(hits: list[bool]) -> float:
    return round(sum(hits) / max(1, len(hits)), 3)


if __name__ == "__main__":
    main()
