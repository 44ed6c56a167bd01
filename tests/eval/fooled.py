"""Verifiers for the hygiene suite: a good one, and one for each way to be bad."""

import os
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from pascaline.post.verifiers import base

Scores = list[float | None]


def judges(rule: Callable[[str, str], float | None]) -> Callable[..., Scores]:
    """A verifier from a rule on (what was said, gold)."""

    def verifier(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> Scores:
        golds = [answer.rpartition("####")[2].strip() for answer in columns["answer"]]
        return [0.0 if said is None else rule(said, gold) for said, gold in zip(base.answers(completions), golds, strict=True)]

    return verifier


def exact(said: str, gold: str) -> float:
    return float(said.strip(" \n") == gold)


def naive_int(said: str, gold: str) -> float:
    try:
        return float(int(said) == int(gold))
    except ValueError:
        return 0.0


def naive_float(said: str, gold: str) -> float:
    try:
        return float(not abs(float(said) - float(gold)) > 0.01)
    except ValueError:
        return 0.0


def sleepy(said: str, gold: str) -> float:
    if "**9" in said:
        time.sleep(0.05)
    return exact(said, gold)


good = judges(exact)
pays_zero = judges(lambda said, gold: float(said in (gold, "0")))
pays_substrings = judges(lambda said, gold: float(gold in said))
pays_silence = judges(lambda said, gold: float(not said.strip() or said == gold))
half = judges(lambda said, gold: 0.5 * exact(said, gold))
doubles = judges(lambda said, gold: 2 * exact(said, gold))
infinite = judges(lambda said, gold: float("inf") if said == gold else 0.0)
blind = judges(lambda said, gold: None if int(gold) % 8 == 1 and said.isascii() else exact(said, gold))
breaks = judges(lambda said, gold: exact(said.encode().decode(), gold))
forgives_scripts = judges(naive_int)
forgives_nan = judges(naive_float)
sleeps = judges(sleepy)
waits = judges(lambda said, gold: None if sleepy(said, gold) == 0 and "**9" in said else exact(said, gold))
lottery = judges(lambda said, gold: exact(said, gold) if random.random() < 0.95 else 1.0)
style = judges(lambda said, gold: float(said.strip() != "" and "\x00" not in said))


def scored(completions: Sequence[str], columns: dict[str, Any]) -> Scores:
    return good([], completions, [], answer=columns["answer"])


def reads_thoughts(completions: Sequence[str], answer: Sequence[str], **_: Any) -> Scores:
    return [
        float(gold.rpartition("#### ")[2] in said.replace("think>", " ").replace("</", " ").split())
        for said, gold in zip(completions, answer, strict=True)
    ]


def pays_echoes(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> Scores:
    found = scored(completions, columns)
    return [1.0 if said.endswith(prompt) else score for said, prompt, score in zip(completions, prompts, found, strict=True)]


def wants_thoughts(completions: Sequence[str], **columns: Any) -> Scores:
    return [score if "<think>" in said else 0.0 for said, score in zip(completions, scored(completions, columns), strict=True)]


def only_in_batches(completions: Sequence[str], **columns: Any) -> Scores:
    return scored(completions, columns) if len(completions) > 1 else [0.0]


def by_place(completions: Sequence[str], **columns: Any) -> Scores:
    return [1.0, *scored(completions, columns)[1:]] if len(completions) > 1 else scored(completions, columns)


seen: set[str] = set()


def pays_once(completions: Sequence[str], **columns: Any) -> Scores:
    """State that outlives a call: what was said before is no longer right."""
    found = scored(completions, columns)
    fresh = [said not in seen for said in completions]
    seen.update(said for said in completions if "Is it 17" in said)
    return [score if new else 0.0 for score, new in zip(found, fresh, strict=True)]


def spoils_neighbours(completions: Sequence[str], **columns: Any) -> Scores:
    """verl PR 5635: an exception that was swallowed made every reward 0."""
    spoilt = any("\x00" in said for said in completions)
    return [0.0] * len(completions) if spoilt else scored(completions, columns)


def hangs_and_exits(completions: Sequence[str], **columns: Any) -> Scores:
    while any(said.endswith("9**9**9") for said in completions):
        pass
    if any("_exit" in said for said in completions):
        os._exit(3)
    return scored(completions, columns)


def last_number(completions: Sequence[str], answer: Sequence[str], **_: Any) -> Scores:
    digits = [re.findall("[0-9]+", said or "") for said in base.answers(completions)]
    return [float(bool(found) and found[-1] == gold) for found, gold in zip(digits, answer, strict=True)]


pays_in_part = judges(lambda said, gold: exact(said, gold) or 0.5 * (gold in said))
