"""Which rank keeps the others waiting. FSDP's collectives make all ranks as slow as the slowest one, so the wall clock does not tell.

A stopwatch runs while a rank reads its batch and while layers, head and loss compute, forward and backward. It stands where a rank waits
for others: while FSDP puts weights together or adds gradients up, and while tokens travel to experts. The optimizer is not timed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median_low
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pascaline.model.moe import Experts
from pascaline.model.transformer import Model
from pascaline.train.dispatch import Dispatch

SHOWN = 1.2  # times the median rank's time, from where on the slowest is told of
PATIENCE = 20  # steps in a row in which the same one is

Mark = Any  # seconds, or an event of the device
Spans = list[tuple[Mark, Mark]]


class Stopwatch:
    """`start` at the beginning of a step; hooks on the sharded `model` do the rest; `spans` are what it measured, for `seconds`."""

    def __init__(self, model: Model):
        self.cuda = model.device.type == "cuda"
        self.spans: Spans = []
        self._since: Mark | None = None
        first = model.model.layers[0]
        for module in model.modules():
            if isinstance(module, FSDPModule):
                self._watch(module, after=module is not first)
            if isinstance(module, Experts) and isinstance(module.dispatch, Dispatch):
                module.dispatch.waiting = self.waiting

    def start(self) -> None:
        self.spans, self._since = [], None
        self.go()

    def go(self, *_: Any) -> None:
        if self._since is None:
            self._since = self._mark()

    def pause(self, *_: Any) -> None:
        if self._since is not None:
            self.spans.append((self._since, self._mark()))
            self._since = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Stand while the block runs."""
        ran = self._since is not None
        self.pause()
        yield
        if ran:
            self.go()

    def _mark(self) -> Mark:
        """Now: by the clock, or on CUDA when the device gets here, which nobody has to wait for."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _watch(self, module: nn.Module, after: bool) -> None:
        """Stand while FSDP's own hooks on the module run: before its forward, before its backward (hooks on the outputs' gradients, in
        the order in which they were put there), and after it (those on the inputs'). after: go on then; else the step's backward is over,
        but for gradients that are still to be added up."""

        def inputs(run: Any, arguments: tuple[Any, ...]) -> None:
            for tensor in _with_gradient(arguments):
                tensor.register_hook(run)

        def outputs(run: Any, found: Any) -> None:
            for tensor in _with_gradient(found if isinstance(found, tuple) else (found,)):
                tensor.register_hook(run)

        def enter(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.pause()
            if after:
                inputs(self.go, arguments)

        def entered(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs(self.pause, arguments)
            self.go()

        apart = torch.compiler.disable  # a compiled layer must not look into its router's hooks
        module.register_forward_pre_hook(apart(enter), prepend=True)
        module.register_forward_pre_hook(apart(entered))
        module.register_forward_hook(apart(lambda _, __, found: outputs(self.pause, found)), prepend=True)
        module.register_forward_hook(apart(lambda _, __, found: outputs(self.go, found)))


def _with_gradient(values: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among the values, and in tuples among them, that get a gradient."""
    flat = [inner for value in values for inner in (value if isinstance(value, tuple) else (value,))]
    return [value for value in flat if isinstance(value, Tensor) and value.requires_grad]


def seconds(spans: Spans) -> float:
    """Their sum. On CUDA the device must have got past them."""
    return sum(b - a if isinstance(b, float) else a.elapsed_time(b) / 1000 for a, b in spans)


class Stragglers:
    """Whether one rank stays slow."""

    def __init__(self) -> None:
        self._rank, self._steps = -1, 0

    def judge(self, own: list[float]) -> tuple[float, str]:
        """own: each rank's seconds in a step. The slowest's over the median's (the lower one of two), and after PATIENCE steps in which the
        same rank was SHOWN times as slow, once, a sentence about it."""
        slowest = max(range(len(own)), key=own.__getitem__)
        ratio = own[slowest] / max(median_low(own), 1e-9)
        if ratio < SHOWN or slowest != self._rank:
            self._rank, self._steps = slowest, 0
        self._steps += ratio >= SHOWN
        if self._steps != PATIENCE:
            return ratio, ""
        often = f"in each of the last {PATIENCE} steps it took longest"
        return ratio, f"rank {slowest} keeps the others waiting: {often}, now {ratio:.2g} times the median"
