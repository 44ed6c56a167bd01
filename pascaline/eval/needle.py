"""Needle recall over length and depth as `extend` measures it: RULER's S-NIAH-1 (arXiv 2404.06654) as the puzzle `needle` writes it.

A line stands for RULER's blank before the answer prefix, as in the traces that a model here was trained on (eval/niah.py asks as RULER
does). Greedy; right is the whole number and nothing but it (RULER's own score also counts a number inside a longer one). No training stage
draws these needles: they are the held-out side of the puzzle's split, from a seed of their own.
"""

import bisect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, needle
from pascaline.engine import Engine, Sampling
from pascaline.eval import passk
from pascaline.tokenizer import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEED = 1_000_003
ANSWER_TOKENS = needle.DIGITS + 2  # a space, the digits one by one, and what ends them


def recall(
    engine: Engine, lengths: Sequence[int], count: int, seed: int = SEED, watch: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Recall at each length, over all depths with its 95 % interval and by depth; `count` needles for each of the two together.

    lengths: tokens of prompt and answer together. One that holds no haystack at all is left out. watch is called after each length.
    """
    own, found = engine.tokenizer, []
    assert own is not None
    cells = len(DEPTHS) * count
    drawn = puzzles.problems("needle", cells * len(lengths), seed, held_out=True)
    for i, length in enumerate(lengths):
        written = [fill(p, own, length, DEPTHS[j // count]) for j, p in enumerate(drawn[i * cells : (i + 1) * cells])]
        problems = [p for p in written if p is not None]
        if problems and len(problems) == len(written):
            outputs = engine.generate([prompt(p, own) for p in problems], Sampling(temperature=0.0, max_tokens=ANSWER_TOKENS))
            right = [score(p, group[0].text) for p, group in zip(problems, outputs, strict=True)]
            found.append({"length": length, **mean(right), "by_depth": [
                {"depth": depth, **mean(right[k * count : (k + 1) * count])} for k, depth in enumerate(DEPTHS)
            ]})  # fmt: skip
        watch()
    return found


def fill(problem: Problem, tokenizer: Tokenizer, length: int, depth: float) -> Problem | None:
    """The same needle in as many refrains as fit into `length` tokens, `depth` of them before it; None if not even one fits."""
    key, value = problem.data["key"], problem.data["value"]
    return fit(
        lambda refrains: needle.write(key, value, refrains, round(depth * refrains)),
        lambda written: prompt(written, tokenizer),
        length - ANSWER_TOKENS,
    )


def fit(write: Callable[[int], Problem], ids: Callable[[Problem], Sequence[int]], most: int) -> Problem | None:
    """write(n) for the largest n >= 1 whose ids are at most `most`; None if there is none. ids(write(n)) must grow with n."""

    def tokens(n: int) -> int:
        return len(ids(write(n)))

    least = tokens(1)
    each = max((tokens(9) - least) / 8, 1)
    low, step = max(1 + math.floor((most - least) / each), 0), 1  # exact where parts are of one length, else a guess
    while low and tokens(low) > most:
        low, step = max(low - step, 0), 2 * step
    high, step = low + 1, 1
    while tokens(high) <= most:
        low, high, step = high, high + step, 2 * step
    n = low + bisect.bisect_right(range(low + 1, high), most, key=tokens)
    return write(n) if n else None


def prompt(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """Plain text for a model that has seen no chat, up to where the number stands."""
    return [*tokenizer.prefix, *tokenizer.encode(f"{problem.prompt}\n{needle.opening(problem)}")]


def score(problem: Problem, continuation: str) -> bool:
    """Whether the continuation begins with the value, a word of its own up to punctuation after it."""
    return re.match(rf"\s*{re.escape(problem.data['value'])}(?![\w,]|\.[0-9])", continuation) is not None


def mean(right: Sequence[float]) -> dict[str, Any]:
    recall, low, high = passk.mean_interval(right)
    return {"recall": recall, "low": low, "high": high, "n": len(right)}
