"""Which block of the cache holds which tokens: reference counts, reuse of prefixes, eviction. No tensors here.

A full block is known by its tokens and by the block before it, so two prompts share exactly their common beginning. Token ids are
compared themselves, never a hash of them, and every chain starts at a root of its own: one for each tenant's salt.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count

BLOCK = 16  # positions; a prefix is reused in whole blocks


class Blocks:
    """Numbers 1..total-1; block 0 is scratch, which nobody owns. A block is referred to (by one or several requests), or idle, or kept:
    nobody refers to it but its tokens may come again. Kept blocks are given away last, the one that was let go longest ago first."""

    def __init__(self, total: int):
        self.total = total
        self.references = [0] * total
        self._unused = 1  # from here on no block was ever taken, and its memory never touched
        self._idle: list[int] = []
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._serials = count(1)
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}  # (serial of the block before, own tokens) -> block
        self._name: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._serial: dict[int, int] = {}
        self._roots: dict[str, int] = {}

    @property
    def available(self) -> int:
        """How many can be taken now."""
        return self.total - self._unused + len(self._idle) + len(self._kept)

    @property
    def used(self) -> int:
        """How many are referred to."""
        return self.total - 1 - self.available

    def root(self, salt: str) -> int:
        """The serial that chains of this salt begin with."""
        if salt not in self._roots:
            self._roots[salt] = next(self._serials)
        return self._roots[salt]

    def take(self) -> int:
        """A block with one reference; IndexError if there is none."""
        if self._idle:
            block = self._idle.pop()
        elif self._unused < self.total:
            block, self._unused = self._unused, self._unused + 1
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        else:
            raise IndexError("no block is free")
        self.references[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each."""
        for block in blocks:
            if not self.references[block]:
                del self._kept[block]
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each. The last of a chain go first: without its beginning a chain is of no use."""
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block]:
                continue
            if block in self._name:
                self._kept[block] = None
            else:
                self._idle.append(block)

    def find(self, tokens: Sequence[int], serial: int) -> list[int]:
        """The longest known beginning of `tokens` on the chain of that root, in blocks. One token at least is left to be computed."""
        found = []
        for start in range(0, (len(tokens) - 1) // BLOCK * BLOCK, BLOCK):
            block = self._known.get((serial, tuple(tokens[start : start + BLOCK])))
            if block is None:
                break
            found.append(block)
            serial = self._serial[block]
        return found

    def serial(self, block: int) -> int:
        """What the chain's next block is named after."""
        return self._serial[block]

    def name(self, block: int, serial: int, tokens: Sequence[int]) -> int:
        """Make a full block known; returns the serial for the next one. Where another block holds the same already, that one stays."""
        key = (serial, tuple(tokens))
        known = self._known.setdefault(key, block)
        if known == block:
            self._name[block] = key
            self._serial[block] = next(self._serials)
        return self._serial[known]

    def forget(self, blocks: Iterable[int]) -> None:
        """Make blocks unknown whose contents are not to be trusted."""
        for block in blocks:
            if block in self._name:
                self._forget(block)
                if self._kept.pop(block, block) is None:
                    self._idle.append(block)

    def flush(self) -> None:
        """Forget every prefix; roots too, so that a request that still runs cannot bring an old one back."""
        self.forget(list(self._name))
        self._roots.clear()

    def _forget(self, block: int) -> None:
        del self._known[self._name.pop(block)]
        del self._serial[block]
