"""What decoding remembers of each token and layer: one latent and one rotary key, or the keys and values of grouped attention
(config.cache_width numbers).

Shapes: L layers, n active rows (always the first n), S positions in use, C numbers a token.
"""

import torch
from torch import Tensor

from pascaline.model.config import ModelConfig

BLOCK = 64  # capacity grows in steps of this many positions
SPAN = 32  # and attention reads multiples of this many


class PrefillCache:
    """Keeps the entries of fresh prompts, so that `TokenCache.put` can store them row by row."""

    fresh = True

    def __init__(self) -> None:
        self.layers: list[Tensor] = []  # each [P, T, C]

    def append(self, layer: int, entries_BTC: Tensor) -> tuple[Tensor, Tensor]:
        self.layers.append(entries_BTC)
        return entries_BTC, entries_BTC  # a fresh forward attends to its own tokens in the expanded form and reads neither


class TokenCache:
    """Rows of growing length in one tensor [L, rows, capacity, C]."""

    fresh = False

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device):
        self.width = config.cache_width
        self.entries = torch.zeros(config.num_hidden_layers, rows, BLOCK, self.width, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # tokens stored, a row
        self.longest = 0

    def bytes_per_token(self) -> int:
        """Bytes of cache a token costs over all layers."""
        return self.entries.shape[0] * self.width * self.entries.element_size()

    def put(self, rows: Tensor, prompt: Tensor, prefill: PrefillCache, lengths: Tensor) -> None:
        """Store prefilled prompts: row rows[i] becomes a copy of prompt[i] with lengths[i] tokens; both [m]."""
        span = prefill.layers[0].shape[1]
        self._reserve(span)
        for layer, entries in enumerate(prefill.layers):
            self.entries[layer, rows, :span] = entries.index_select(0, prompt)
        self.lengths[rows] = lengths
        self.longest = max(self.longest, span)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows over rows, to close the holes that finished rows leave."""
        self.entries[:, target, : self.longest] = self.entries[:, source, : self.longest]
        self.lengths[target] = self.lengths[source]

    def begin(self, rows: int, longest: int) -> None:
        """Prepare one decode step of the first `rows` rows, the longest of which holds `longest` tokens."""
        self.rows, self.longest = rows, longest + 1
        self._reserve(self.longest)
        self.span = min(-(-self.longest // SPAN) * SPAN, self.entries.shape[2])
        at = self.lengths[:rows]
        hidden = torch.arange(self.span, device=at.device) > at.view(rows, 1, 1)
        self.mask = self.entries.new_zeros(rows, 1, self.span).masked_fill_(hidden, -torch.inf)
        self.index = torch.arange(rows, device=at.device), at

    def append(self, layer: int, entries_BTC: Tensor) -> tuple[Tensor, Tensor]:
        row = self.entries[layer, : self.rows]
        row[self.index] = entries_BTC[:, 0]  # scatter_ is a hundred times slower here in bf16 on the CPU
        return row[:, : self.span], self.mask

    def advance(self, rows: int) -> None:
        """The step's tokens of the first `rows` rows now count; what the idle rows wrote does not."""
        self.lengths[:rows] += 1

    def release(self, first: int, last: int) -> None:
        """Rows first..last - 1 are idle from now on."""
        self.lengths[first:last] = 0

    def _reserve(self, positions: int) -> None:
        missing = positions - self.entries.shape[2]
        if missing > 0:
            more = -(-missing // BLOCK) * BLOCK
            L, rows, _, C = self.entries.shape
            # Unwritten positions are masked, but 0 * nan is nan: they must hold numbers.
            self.entries = torch.cat((self.entries, self.entries.new_zeros(L, rows, more, C)), 2)
