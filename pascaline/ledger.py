"""What a run has cost: OUT/ledger.jsonl, a line for every attempt at every stage, whether it ended well or not.

The line of the attempt under way is written again every few seconds, in place, so that a killed one has told nearly all of its cost.
Every line is as wide as WIDTH: none crosses a page of the disk cache, inside which a write is whole or absent whatever is killed.
`pascaline run --fresh` leaves the ledger where it is and draws a line under it: what the runs set aside have cost stays in the sum.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pascaline.runs import read_json
from pascaline.stopping import Stopped
from pascaline.tables import Ledger as Rates

WIDTH = 512  # bytes of a line; pages are a multiple
BEAT = 5.0  # seconds, at most, between two writings of a line: what kill -9 can hide
DEAD = 60.0  # seconds without one, and the process is gone


COST = ("seconds", "tokens", "flops")


@dataclass
class Totals:
    """Seconds of work, tokens and FLOPs."""

    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0

    def add(self, seconds: float, tokens: int, flops: float) -> None:
        self.seconds += seconds
        self.tokens += tokens
        self.flops += flops


class Attempt:
    """`with Attempt(out, "pretrain") as attempt:` one try at a stage, from here to its end, on `devices` devices.

    A stage that goes on where it stopped tells with `follow` what it has worked off in this attempt and what stands of the stage, over
    all attempts (its parts, one by one); of one that starts over each time, the last attempt is what stands. Raises OSError on a full
    disk, at the start only.
    """

    def __init__(self, out: Path, stage: str, devices: int = 1) -> None:
        self._path = out / "ledger.jsonl"
        self._facts = {"stage": stage, "began": time.strftime("%Y-%m-%dT%H:%M:%S"), "devices": devices}
        self._looks: list[Callable[[], tuple[Totals, Totals]]] = []
        self._over = threading.Event()

    def follow(self, look: Callable[[], tuple[Totals, Totals]]) -> None:
        """look: called now and then, gives (worked off in this attempt, what stands of the stage) for one part of it."""
        self._looks.append(look)

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            size = os.fstat(self._fd).st_size
            gap = -size % WIDTH  # after a line that a power cut tore, or that somebody edited
            self._place = size + gap
            os.pwrite(self._fd, b"\n".rjust(gap) if gap else b"", size)
            self._write("running")
        except BaseException:
            os.ftruncate(self._fd, size)
            os.close(self._fd)
            raise
        self._thread = threading.Thread(target=self._beat, name="ledger", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        stopped = kind is not None and issubclass(kind, Stopped | KeyboardInterrupt)
        with contextlib.suppress(OSError):  # the last beat stands, and what was wrong is said by whoever found it
            self._write("done" if kind is None else "stopped" if stopped else "failed")
            os.fsync(self._fd)
        os.close(self._fd)

    def _beat(self) -> None:
        while not self._over.wait(min(BEAT, 0.1 + (time.perf_counter() - self._began) / 20)):
            with contextlib.suppress(OSError):
                self._write("running")

    def _write(self, end: str) -> None:
        seconds = time.perf_counter() - self._began
        spent, stands = Totals(), Totals()
        for own, stand in (look() for look in self._looks):
            spent.add(*astuple(own))
            stands.add(*astuple(stand))
        # overhead: of starting, loading and saving; an undisturbed run has it once. stands: None until a step, or a checkpoint, tells.
        told = {**self._facts, "end": end, "seconds": seconds, "tokens": spent.tokens, "flops": spent.flops,
                "overhead": max(seconds - spent.seconds, 0.0), "stands": asdict(stands) if stands.seconds else None}  # fmt: skip
        line = json.dumps(told).encode().ljust(WIDTH - 1) + b"\n"
        if os.pwrite(self._fd, line, self._place) < WIDTH:
            raise OSError(28, os.strerror(28), str(self._path))


def set_aside(out: Path, old: Path) -> None:
    """Draw a line under `out`'s ledger: what stands above it was the cost of runs set aside, the last one in `old`, which gets a copy."""
    path = out / "ledger.jsonl"
    if path.exists():
        shutil.copyfile(path, old / "ledger.jsonl")
        with open(path, "ab") as file:
            file.write(json.dumps({"aside": old.name}).encode().ljust(WIDTH - 1) + b"\n")


def cost(out: Path, rates: Rates | None = None) -> dict[str, Any]:
    """What the run in `out` has cost, {} without a ledger: for each stage and in total the final run against all attempts.

    "final" is what a run without any disturbance would have cost: the steps that stand, and starting once. "all" has every attempt, and in
    the total also the runs that were set aside. Each: seconds, device_hours, flops, and, where the recipe gives watts and a price, kwh
    (an estimate: watts * device-hours) and money. ratio: all over final, in device-hours. rates: other ones than the run's own.
    """
    rates = rates or told(out)
    now: dict[str, list[dict[str, Any]]] = {}
    aside: list[list[dict[str, Any]]] = []
    for line in _read(out / "ledger.jsonl"):
        if "aside" in line:
            aside += now.values()
            now = {}
        else:
            now.setdefault(line["stage"], []).append(line)
    stages = [{"name": name, **_compared(_final(lines), _all(lines), rates), "ends": _ends(lines)} for name, lines in now.items()]
    if not stages and not aside:
        return {}
    before = _sum(map(_all, aside))
    everything = _sum([before, *map(_all, now.values())])
    found: dict[str, Any] = {"stages": stages, "total": _compared(_sum(map(_final, now.values())), everything, rates)}
    if aside:
        found["aside"] = {"all": _priced(before, rates), "ends": _ends([line for lines in aside for line in lines])}
    return found | {"watts": rates.watts or None, "price": rates.price or None, "currency": rates.currency}


def stage_cost(out: Path, stage: str) -> dict[str, Any]:
    """The entry of one stage in `cost`."""
    return next((entry for entry in cost(out).get("stages", []) if entry["name"] == stage), {})


def told(out: Path) -> Rates:
    """Watts and price of the recipe that the run in `out` was last started with."""
    return Rates(**(read_json(out / "recipe.json") or {}).get("ledger", {}))


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole (the rest of a sum is worth more than a refusal), with "killed" for an attempt that never told its end."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and ("aside" in entry or "stands" in entry):
                found.append(entry)
    alive = time.time() - path.stat().st_mtime < DEAD
    for i, entry in enumerate(found):
        if entry.get("end") == "running" and not (alive and i == len(found) - 1):
            entry["end"] = "killed"
    return found


def _sum(parts: Iterable[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*parts, strict=True)] or [0.0] * 3


def _stands(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What stands of a stage, as its attempts last told."""
    return next((line["stands"] for line in reversed(lines) if line["stands"]), asdict(Totals()))


def _all(lines: list[dict[str, Any]]) -> list[float]:
    """[seconds, device-hours, FLOPs] of all attempts at a stage; what stands was worked off, also where a kill hid it from the sum."""
    hours = sum(line["seconds"] * line["devices"] for line in lines) / 3600
    return [sum(line["seconds"] for line in lines), hours, max(sum(line["flops"] for line in lines), _stands(lines)["flops"])]


def _final(lines: list[dict[str, Any]]) -> list[float]:
    """[seconds, device-hours, FLOPs] of what stands of a stage. Where attempts had different numbers of devices, their mean by time."""
    stands = _stands(lines)
    seconds, hours, _ = _all(lines)
    needed = min(stands["seconds"] + lines[-1]["overhead"], seconds)
    return [needed, hours * needed / seconds if seconds else 0.0, stands["flops"]]


def _ends(lines: list[dict[str, Any]]) -> dict[str, int]:
    """How often an attempt ended how: done, stopped, failed, killed, or running."""
    return dict(Counter(line["end"] for line in lines))


def _compared(final: list[float], everything: list[float], rates: Rates) -> dict[str, Any]:
    ratio = everything[1] / final[1] if final[1] else None
    return {"final": _priced(final, rates), "all": _priced(everything, rates), "ratio": ratio}


def _priced(spent: list[float], rates: Rates) -> dict[str, Any]:
    seconds, hours, flops = spent
    kwh = hours * rates.watts / 1000 if rates.watts else None
    money = hours * rates.price if rates.price else None
    return {"seconds": seconds, "device_hours": hours, "flops": flops, "kwh": kwh, "money": money}
