"""What decoding remembers of each token and layer, in blocks: one latent and one rotary key, or the keys and values of grouped attention
(config.cache_width numbers); and one step's tokens as attention meets them.

Shapes: L layers, C numbers a token, n tokens of a step, r rows (requests), W blocks of a row, P rows of a part, T new tokens of each,
S positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pascaline.engine.blocks import BLOCK
from pascaline.model.attention import Part
from pascaline.model.config import ModelConfig
from pascaline.model.paged import attend_paged

FEW = 4  # new tokens of a row, up to which a kernel that reads its entries for each of them is the better one
MASK = 1 << 22  # numbers in the mask of a part with more than one row


def bytes_per_token(config: ModelConfig, dtype: torch.dtype, layers: int | None = None) -> int:
    """Bytes of cache that a token costs over all layers; DeepSeek-V3 in bf16: 61 * (512 + 64) * 2 = 70,272."""
    return (layers or config.num_hidden_layers) * config.cache_width * dtype.itemsize


def batch_width(tokens: int) -> int:
    """Tokens to compute for so many real ones: a power of two up to 32, then a multiple of 32.

    Matmul kernels are made for a shape at its first use (a tenth of a second a decode step in bf16 on the CPU), and a shrinking batch
    would bring a new shape every step.
    """
    return 1 << (tokens - 1).bit_length() if tokens <= 32 else -(-tokens // 32) * 32


@contextmanager
def one_row_kernels(rows: int) -> Iterator[None]:
    """For one row PyTorch's own matrix-vector product: oneDNN, its first choice for bf16 on the CPU, repacks the weights every time."""
    before = bool(torch.backends.mkldnn.enabled)
    torch.backends.mkldnn.enabled = before and rows > 1  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before  # type: ignore[assignment]


class Store:
    """The cache's memory. pool [L, blocks, BLOCK, C]: zeros, for masked positions must hold numbers (0 * nan is nan); on the CPU memory is
    touched when it is used first. routes [M, blocks, BLOCK, K]: the experts that each of the M layers with experts chose, if recorded."""

    def __init__(self, config: ModelConfig, layers: int, blocks: int, dtype: torch.dtype, device: torch.device, record: bool):
        self.pool = torch.zeros(layers, blocks, BLOCK, config.cache_width, dtype=dtype, device=device)
        sparse = config.num_hidden_layers - config.first_k_dense_replace if record and config.n_routed_experts else 0
        shape = (sparse, blocks, BLOCK, config.num_experts_per_tok)
        self.routes = torch.zeros(shape, dtype=torch.int16, device=device) if sparse > 0 else None
        self.experts = config.n_routed_experts

    def copy(self, old: int, new: int) -> None:
        for tensor in (self.pool, self.routes):
            if tensor is not None:
                tensor[:, new] = tensor[:, old]

    def routed(self, blocks: Sequence[int], computed: int, tokens: int) -> np.ndarray | None:
        """The experts of a row's tokens, [tokens, M, K], E behind those that were computed; None where nothing is recorded."""
        if self.routes is None:
            return None
        found = self.routes[:, list(blocks)].flatten(1, 2)[:, :computed].transpose(0, 1).cpu().numpy()
        out = np.full((tokens, *found.shape[1:]), self.experts, np.uint8 if self.experts < 256 else np.int16)
        out[: len(found)] = found
        return out


class Batch:
    """One step: n tokens of r rows, each of which sees its own row's positions up to its own. Attention first stores all n entries of a
    layer, then reads them through the rows' tables: tokens of one row may see each other, and rows may share blocks."""

    def __init__(self, pool: Tensor, tables_rW: np.ndarray, starts_r: Sequence[int], counts_r: Sequence[int], routes: Tensor | None = None):
        """pool, routes: of a Store; row i brings counts_r[i] tokens, the first at position starts_r[i]; rows one after the other."""
        self.pool, self.routes, there = pool, routes, pool.device
        self.starts, self.counts = np.asarray(starts_r), np.asarray(counts_r)
        self.offsets = self.counts.cumsum() - self.counts
        row_n = np.repeat(np.arange(len(self.counts)), self.counts)
        position_n = np.arange(len(row_n)) + (self.starts - self.offsets)[row_n]
        slot_n = tables_rW[row_n, position_n // BLOCK].astype(np.int64) * BLOCK + position_n % BLOCK
        arrays = (tables_rW, row_n.astype(np.int32), position_n, slot_n)
        self.tables_rW, self.row_n, self.position_n, self.slot_n = (torch.from_numpy(a).to(there) for a in arrays)
        self._parts: list[Part] | None = None

    def append(self, layer: int, entries_nC: Tensor) -> None:
        """Store the step's entries of a layer."""
        self.pool[layer].view(-1, self.pool.shape[-1])[self.slot_n] = entries_nC

    def routed(self, layer: int, chosen_nK: Tensor) -> None:
        """Note a layer's experts; not those of an MTP module, which comes behind the others."""
        if self.routes is not None and layer < len(self.routes):
            self.routes[layer].view(-1, self.routes.shape[-1])[self.slot_n] = chosen_nK.to(torch.int16)

    def entries(self, layer: int, part: Part) -> Tensor:
        """All entries of a part's rows, [P, S, C]."""
        P, W = part.blocks_PW.shape
        return self.pool[layer].index_select(0, part.blocks_PW.reshape(-1)).view(P, W * BLOCK, -1)

    @property
    def few(self) -> bool:
        return int(self.counts.max()) <= FEW

    def attend(self, layer: int, q_nHC: Tensor, value_width: int, scale: float) -> Tensor:
        """Each token's attention to its row's entries where they lie, [n, H, value_width]."""
        return attend_paged(q_nHC, self.pool[layer], self.tables_rW, self.row_n, self.position_n, value_width, scale)

    @property
    def parts(self) -> list[Part]:
        """The step in parts, made when first asked for: kernels that read the tables need none."""
        if self._parts is None:
            order = np.argsort(-self.counts, kind="stable")
            ends, groups = self.starts + self.counts, [[int(order[0])]]
            widest = ends[order[0]]
            for row in order[1:].tolist():
                head, widest = self.counts[groups[-1][0]], max(widest, ends[row])
                if 2 * self.counts[row] < head or (len(groups[-1]) + 1) * head * widest > MASK:
                    groups.append([])
                    widest = ends[row]
                groups[-1].append(row)
            self._parts = [self._part(np.array(group)) for group in groups]
        return self._parts

    def _part(self, rows: np.ndarray) -> Part:
        there, T = self.pool.device, int(self.counts[rows[0]])
        W = -(-int((self.starts + self.counts)[rows].max()) // BLOCK)
        step_T = np.arange(T)
        real_PT = step_T < self.counts[rows, None]
        position_PT = torch.from_numpy(self.starts[rows, None] + step_T).to(there)
        hidden_PTS = torch.arange(W * BLOCK, device=there) > position_PT[:, :, None]
        mask = torch.zeros(hidden_PTS.shape, dtype=self.pool.dtype, device=there).masked_fill_(hidden_PTS, -torch.inf)
        if len(rows) == len(self.slot_n):
            return Part(self.tables_rW[:, :W], None, None, None, mask)
        take_PT = np.where(real_PT, self.offsets[rows, None] + step_T, 0)
        put = np.flatnonzero(real_PT)
        blocks = self.tables_rW[torch.from_numpy(rows).to(there), :W]
        take, place, to = (torch.from_numpy(a).to(there) for a in (take_PT, put, take_PT.reshape(-1)[put]))
        return Part(blocks, take, place, to, mask)
