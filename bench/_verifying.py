"""What `bench verify` lets the pool call, and the answers that it judges. Imports no torch: each process of the pool loads it."""

import random
import sys
import time

from pascaline.post.verifiers import latex

HOSTILE = ["\\boxed{9^{9^{9^9}}}", "\\boxed{100000000!}", "\\boxed{10^{10^{10}}}", "\\boxed{" + "(" * 400 + "1" + ")" * 400 + "}"]


def timed(gold: str, answer: str) -> tuple[bool | None, float]:
    """The verdict, and when it was there; this clock is one for all processes."""
    return latex.same(gold, answer), time.monotonic()


def integers(count: int, samples: int, rng: random.Random) -> list[tuple[str, str]]:
    """(gold, answer) as they are for GSM8K: `samples` answers to each of `count` problems, about half of them right."""
    forms = ("{}", "#### {}", "The answer is {}.", "{} apples", "${}", "She has 3 + 4 of them.\n#### {}", "\\boxed{{{}}}")
    pairs = []
    for _ in range(count):
        gold = int(10 ** rng.uniform(0, 5)) * rng.choice((1, 1, 1, 1, -1))
        for _ in range(samples):
            said = gold + rng.choice((0, 0, 1, 10))
            pairs.append((f"{gold:,}", rng.choice(forms).format(f"{said:,}" if rng.random() < 0.5 else said)))
    return pairs


def expressions(count: int, samples: int, rng: random.Random) -> list[tuple[str, str]]:
    """(gold, answer) as they are for MATH: integers, fractions, roots, polynomials, sets."""
    forms = ("{0}", "\\frac{{{0}}}{{{1}}}", "{0}\\sqrt{{{1}}}", "x^2 + {0}x - {1}", "\\{{{0}, {1}\\}}", "\\frac{{{0}\\pi}}{{{1}}}")
    pairs = []
    for _ in range(count):
        form, numbers = rng.choice(forms), (rng.randrange(2, 100), rng.randrange(2, 100))
        for _ in range(samples):
            said = form.format(numbers[0] + rng.choice((0, 0, 1)), numbers[1])
            pairs.append((f"Hence \\boxed{{{form.format(*numbers)}}}.", f"So the answer is $\\boxed{{{said}}}$."))
    return pairs


if __name__ == "__main__":  # a process that is in no pool: for each line, once through all
    mine = expressions(250, 8, random.Random(int(sys.argv[1])))
    for _ in sys.stdin:
        print(sum(latex.same(*pair) is True for pair in mine), flush=True)
