"""From logits to tokens. A token depends on its own logits, seed and position alone, never on its neighbours in the batch.

Shapes: n rows, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pascaline.errors import BadInput

FEW = 1 << 14
HEAD = 64  # top-p usually keeps fewer tokens than this, and a partial sort is far cheaper than a whole one


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; top_p keeps the smallest set of tokens that holds that much probability; n answers
    a prompt; `seed` fixes them all; `stop_ids` end an answer besides the end token."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 256
    n: int = 1
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value, good in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf")),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1),
            ("n", self.n, self.n >= 1),
            ("seed", self.seed, 0 <= self.seed < 2**64),
        ):
            if not good:
                raise BadInput(f"sampling: {name} = {value} is out of range.")


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in (0, 1) for each (seed, position), float64: the splitmix64 hash (Steele et al. 2014) as a counter-based generator."""
    with np.errstate(over="ignore"):
        x = mix(seeds.astype(np.uint64) + mix(positions.astype(np.uint64)))
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def sample(logits_nV: Tensor, temperature_n: np.ndarray, top_p_n: np.ndarray, uniform_n: np.ndarray) -> tuple[Tensor, Tensor]:
    """Tokens [n] and their log-probabilities [n] under the model itself (temperature 1, nothing cut off).

    The settings are NumPy arrays: what has to be done is decided without waiting for an accelerator.
    """

    def there(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(logits_nV.device)

    log_p = logits_nV.float().log_softmax(-1)
    greedy_n, cut_n = temperature_n == 0, top_p_n < 1
    if greedy_n.all():
        token_n = log_p.argmax(-1)
    else:
        # The best token's exponent is 0 before the division: a tiny temperature must not push all of them to -inf.
        heat = None if (temperature_n == 1).all() else there(np.where(greedy_n, 1, temperature_n)).unsqueeze(1)
        p_nV = log_p.exp() if heat is None else ((log_p - log_p.amax(-1, keepdim=True)) / heat).softmax(-1)
        uniform = there(uniform_n)
        token_n = _top_p(p_nV, there(top_p_n), uniform) if cut_n.all() else _invert(p_nV, uniform)
        if cut_n.any() and not cut_n.all():
            token_n = torch.where(there(cut_n), _top_p(p_nV, there(top_p_n), uniform), token_n)
        if greedy_n.any():
            token_n = torch.where(there(greedy_n), log_p.argmax(-1), token_n)
    return token_n, log_p.gather(1, token_n.unsqueeze(1)).squeeze(1)


def _invert(p: Tensor, uniform_n: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first index whose cumulated probability reaches uniform * total; [n].

    Of many numbers first the block of HEAD, then the index in it: cumulated sums are slow.
    """
    if p.numel() <= FEW:
        cdf = p.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(cdf, (uniform_n * cdf[:, -1]).unsqueeze(1)).squeeze(1)
    blocks = F.pad(p, (0, -p.shape[1] % HEAD)).unflatten(1, (-1, HEAD))
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    reach = (uniform_n * ends[:, -1]).unsqueeze(1)
    block = torch.searchsorted(ends, reach)
    inside = blocks[torch.arange(len(p), device=p.device), block.squeeze(1)].cumsum(-1, dtype=torch.float64)
    # Rounding must not carry the rest past the ends of the block, where probabilities may be 0.
    rest = torch.minimum((reach - ends.gather(1, block) + inside[:, -1:]).clamp(min=torch.finfo(torch.float64).tiny), inside[:, -1:])
    return (block * HEAD + torch.searchsorted(inside, rest)).squeeze(1)


def _top_p(p_nV: Tensor, top_p_n: Tensor, uniform_n: Tensor) -> Tensor:
    values, indices = p_nV.topk(min(HEAD, p_nV.shape[1]), -1)
    if bool((values.sum(-1) < top_p_n).any()):
        values, indices = p_nV.sort(-1, descending=True)
    before = values.cumsum(-1) - values
    kept = values.masked_fill(before >= top_p_n.unsqueeze(1), 0.0)
    return indices.gather(1, _invert(kept, uniform_n).unsqueeze(1)).squeeze(1)
