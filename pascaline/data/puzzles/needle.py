"""Needle in a haystack: one sentence with a number, somewhere in a refrain that says nothing; then what was the number?

The form of RULER's single needle S-NIAH-1 (arXiv 2404.06654, section 3.1): words to numbers in a repeated refrain. Generator, trace
writer, oracle and verifier in one file, and `write` and `hide`, with which the evaluation puts a needle at the length and depth it wants.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pascaline.data.puzzles.base import WHITESPACE, Dial, Problem, Trace, Verdict, share, turn

DIGITS = 7  # of RULER's numbers
LEVELS = {"refrains": Dial(5, 0, 1_000_000), "digits": Dial(DIGITS, 1, 18)}
REFRAIN = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TASK = "A special magic {0} is hidden within the following text. Make sure to memorize it. I will quiz you about the {0} afterwards."

# RULER draws its words from a package of word lists; these stand in for them.
ADJECTIVES = (
    "able amber ancient bitter bold brave brief bright brisk broad calm cheap clean clever cold cosy crisp curly damp dark dear deep "
    "dim dizzy dry dull dusty eager early easy empty faint fair fancy fast fierce firm flat fond fresh gentle giant glad golden grand grey "
    "happy harsh heavy hollow honest humble icy idle jolly keen kind large late lazy light lively lucky loud"
)
NOUNS = (
    "acorn anchor apple arrow badge basket beach bell bench boat bottle bridge brush bucket button cabin candle canyon carpet castle chair "
    "clock cloud coat comet copper corner cradle crown desert drum eagle engine feather fence field flute forest fountain garden glove "
    "hammer harbour helmet hill island jacket kettle ladder lamp lantern lemon letter marble meadow mirror mountain needle ocean orchard "
    "paper pebble pencil pillow"
)


def generate(rng: random.Random, **dials: Any) -> Problem:
    """A needle at any depth of the refrains. Numbers of one digit, then of two, ... are how a small model learns to copy seven."""
    level = turn("needle", LEVELS, dials, rng)
    refrains = level["refrains"]
    key = f"{_word(ADJECTIVES, rng)}-{_word(NOUNS, rng)}"
    least = 10 ** (level["digits"] - 1)
    value = str(least + int(rng.random() * 9 * least))
    return write(key, value, refrains, int(rng.random() * (refrains + 1)))


def write(key: str, value: str, refrains: int, before: int) -> Problem:
    """The problem with the needle after `before` of the refrains. Its key names the needle alone: one that is held out is so at any
    length and depth."""
    prompt = hide(key, value, [REFRAIN] * refrains, before)
    return Problem("needle", prompt, f"needle {key} {value}", {"key": key, "value": value, "refrains": refrains, "before": before})


def hide(key: str, value: str, haystack: Sequence[str], before: int, joint: str = "\n", kind: str = "number") -> str:
    """RULER's prompt up to the question: the needle after `before` parts of the haystack, which `joint` joins. kind: "number" or "uuid"."""
    parts = [*haystack[:before], f"One of the special magic {kind}s for {key} is: {value}.", *haystack[before:]]
    return f"{TASK.format(kind)}\n{joint.join(parts)}\nWhat is the special magic {kind} for {key} mentioned in the provided text?"


def opening(problem: Problem) -> str:
    """What a base model continues with the number, after the question: RULER's answer prefix without the blank before it."""
    return f"The special magic {problem.data.get('kind', 'number')} for {problem.data['key']} mentioned in the provided text is"


def trace(problem: Problem, rng: random.Random, slip: float = 0.0) -> Trace:
    """The question turned into a statement; with share `slip` a digit of the number is off."""
    share("needle", slip=slip)
    value = problem.data["value"]
    if slip and rng.random() < slip:
        at = int(rng.random() * len(value))
        value = value[:at] + str((int(value[at]) + 1 + int(rng.random() * 9)) % 10) + value[at + 1 :]
    return Trace(f"{opening(problem)} {value}.", value)


def solve(problem: Problem) -> str | None:
    """The number, as it must be written."""
    return str(problem.data["value"])


def verify(problem: Problem, answer: str) -> Verdict:
    """RIGHT for exactly the digits of the number; "none" abstains."""
    answer = answer.strip(WHITESPACE)
    if answer == "none":
        return Verdict.ABSTAIN
    return Verdict.RIGHT if answer == solve(problem) else Verdict.WRONG


def _word(words: str, rng: random.Random) -> str:
    among = words.split()
    return among[int(rng.random() * len(among))]
