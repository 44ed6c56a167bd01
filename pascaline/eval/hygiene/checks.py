"""What the parts of the hygiene suite share: what is still clean, and how a check is told."""

from dataclasses import dataclass
from typing import Any

SHOWN, NOTE = 60, 300  # characters of a text in a note, and of all of it

Check = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What is still clean.

    constant: share of problems that one and the same answer may solve. 0.2 passes every family that asks for a number, and stops what is
    answered by a choice among five or fewer: that may be wanted, but then has to be said. echo: share that the question said again
    may solve (now and then its last number is the answer). near: share of test problems with a near-duplicate in training. unique: of a
    puzzle's draws that must be different. slow: how many times as long as plain text of the same length a hostile answer may take.
    seconds: what one may take in any case, which is the pool's timeout of 5 and the start of a new process. form: the verifier judges
    how an answer is written, so that what one says is the same for every problem: who pays a constant is told, and no failure.
    """

    constant: float = 0.2
    echo: float = 0.05
    near: float = 0.01
    unique: float = 0.1
    slow: float = 100.0
    seconds: float = 6.0
    form: bool = False


def checked(check: str, ok: bool | None, value: Any, limit: Any = None, note: str = "", **facts: Any) -> Check:
    """ok: None is told. The note is made fit for a terminal: a verifier's own message may repeat a hostile answer."""
    verdict = "told" if ok is None else "pass" if ok else "fail"
    note = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in note[:NOTE])
    return {"check": check, "verdict": verdict, "value": value, "limit": limit, "note": note, **facts}


def skipped(check: str, why: str) -> Check:
    return {"check": check, "verdict": "skipped", "value": None, "limit": None, "note": why}


def short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")
