"""A few live lines for a long stage on a terminal; a few plain lines elsewhere, so that a log shows life."""

import sys
import time
from collections import deque
from types import TracebackType
from typing import Any, Self, TextIO

from pascaline.stopping import Screen

REDRAW = 0.1  # seconds between two renderings, so that a loop of 1000 steps a second is not slowed
QUIET_GAP = 1.0  # seconds between two plain lines, so that a stage of a second does not write ten
BAR = 40  # columns, at most
WINDOW = 64  # samples of (time, step) for the speed: steps get longer as responses do


class Progress:
    """`with Progress(stage="rl", total=500, unit="step") as p: p.update(step, loss=1.2, tokens_per_s=9000.0)`.

    step: steps done so far, out of `total` (None: unknown). A resumed stage begins at its first update's step.
    facts: numbers or short strings, shown in order; None and lists are left out; `_per_` in a name reads "/".
    On a terminal a bar with elapsed time and ETA, and the facts below it; else a line at the start, at most one per tenth, one at the end.
    enabled=False shows nothing (other ranks, --json).
    """

    def __init__(
        self,
        stage: str,
        total: int | None = None,
        unit: str = "step",
        *,
        enabled: bool = True,
        file: TextIO | None = None,
    ) -> None:
        self.stage, self.total, self.unit, self.enabled = stage, total, unit, enabled
        self.step = 0
        self.facts: dict[str, Any] = {}
        self._file = file if file is not None else sys.stderr
        self._live: Any = None
        self._widths: dict[str, int] = {}
        self._began = self._shown = self._said = time.monotonic()
        self._tenth = 0
        self._speed: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def __enter__(self) -> Self:
        self._began = self._said = time.monotonic()
        self._shown = self._began - REDRAW  # the first update is drawn
        if self.enabled and self._file.isatty():
            self._start_live()
        elif self.enabled:
            self._say(f"{self.stage}: " + (self._count(0) if self.total is None else f"{self.total} {self.unit}s"))
        return self

    def update(self, step: int, **facts: Any) -> None:
        """Tell how many steps are done, and what to show beside; cheap, most calls draw nothing."""
        self.step = step
        self.facts = facts
        now = time.monotonic()
        if not self.enabled or now - self._shown < REDRAW:
            return
        self._shown = now
        if not self._speed:  # the first update ends one step, also after a resume
            self._speed.append((self._began, step - 1))
        self._speed.append((now, step))
        if self._live is not None:
            return  # it looks by itself, four times a second
        tenth = 10 * step // self.total if self.total else int((now - self._began) / 30)
        if now - self._said >= QUIET_GAP and tenth > self._tenth and step != self.total:
            self._tenth, self._said = tenth, now
            self._say(f"{self.stage}: {self._text(now)}")

    def note(self, line: str) -> None:
        """Say something that must not be overlooked, above the live line."""
        if self._live is not None:
            self._live.console.print(f"{self.stage}: {line}", markup=False, highlight=False, style="yellow")
        elif self.enabled:
            self._say(f"{self.stage}: {line}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self.enabled:
            return
        whole = kind is None and (self.total is None or self.step >= self.total)
        said = f"{self.stage}: {'done' if whole else 'stopped'}, {self._text(time.monotonic(), eta=False)}"
        if self._live is not None:
            self._live.stop()
            Screen.live = False
            while len(said) > self._live.console.width and "  " in said:  # whole facts, no wrapped ones
                said = said.rpartition("  ")[0]
        self._say(said)

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._file)
        # What is printed to the terminal meanwhile goes above the block; a piped stdout is not touched (--json).
        self._live = Live(
            get_renderable=lambda: self._block(console.width),
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            refresh_per_second=4,
        )
        Screen.live, Screen.wish = True, ""
        self._live.start()

    def _block(self, width: int) -> Any:
        """Bar, count, time and ETA; below, in lines of `width` columns, the facts."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        right = "  ".join(self._clock(time.monotonic()))
        room = width - len(self.stage) - len(right) - 2
        first = Table.grid(padding=(0, 1))
        if room >= 5:
            bar = ProgressBar(self.total, self.step, width=min(room, BAR), pulse=self.total is None)
            first.add_row(Text(self.stage, style="bold"), bar, Text(right, no_wrap=True))
        else:
            first.add_row(Text(f"{self.stage} {right}", no_wrap=True, overflow="ellipsis"))
        rest = [Text(line, no_wrap=True, overflow="ellipsis") for line in self._lines(width)]
        return Group(first, *rest, *[Text(Screen.wish, style="yellow")] * bool(Screen.wish))

    def _lines(self, width: int) -> list[str]:
        """The facts, each as wide as it has ever been, so that they do not dance."""
        lines = [""]
        for name, value in self.facts.items():
            if _shows(value):
                text = f"{label(name)} {number(value, name)}"
                self._widths[name] = max(len(text), self._widths.get(name, 0))
                if lines[-1] and len(lines[-1]) + self._widths[name] > width:
                    lines.append("")
                lines[-1] += text.ljust(self._widths[name] + 2)
        return [line.rstrip() for line in lines if line]

    def _text(self, now: float, eta: bool = True) -> str:
        # Facts last: whoever cuts the line cuts its end.
        return "  ".join(
            self._clock(now, eta) + [f"{label(name)} {number(value, name)}" for name, value in self.facts.items() if _shows(value)]
        )

    def _clock(self, now: float, eta: bool = True) -> list[str]:
        parts = [self._count(self.step), duration(now - self._began)]
        left = self._left() if eta else None
        return parts if left is None else [*parts, f"ETA {duration(left)}"]

    def _count(self, step: int) -> str:
        return f"{step} {self.unit}s" if self.total is None else f"{step}/{self.total} {self.unit}s"

    def _left(self) -> float | None:
        if self.total is None or len(self._speed) < 2:
            return None
        (early, first), (late, last) = self._speed[0], self._speed[-1]
        return (late - early) / (last - first) * (self.total - last) if last > first else None

    def _say(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()


def label(name: str) -> str:
    """`tokens_per_s` -> `tokens/s`, `grad_norm` -> `grad norm`."""
    return name.replace("_per_", "/").replace("_", " ").replace("gemm", "GEMM").replace("mfu", "MFU")


def number(value: Any, name: str = "") -> str:
    """Three significant digits, a letter for large numbers: 0.0123, 1.23, 12.3k, 4.5M; small whole numbers in full. A share of the
    machine's peak, by its name, in percent."""
    if name in ("gemm_share", "mfu"):
        return f"{100 * value:.1f}%"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) and abs(value) < 10_000:
        return str(value)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """4.2 s, 1:05, 2:03:04."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = int(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shows(value: Any) -> bool:
    return isinstance(value, int | float | str)
