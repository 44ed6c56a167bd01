"""From logits to tokens. A token depends on its own logits, seed and position alone, never on its neighbours in the batch.

The draw is a race (the Gumbel-max trick, arXiv 1411.0030): token v comes after E_v / p_v, with E_v ~ Exp(1) from a hash of (seed,
position, v), and the first wins. Rounding in another batch moves a token's p by 1e-6 and so changes the winner about once in a million
draws, however large the vocabulary; and two distributions that are alike, a draft's and the model's, mostly draw the same token.

Shapes: n rows, V vocabulary, M candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pascaline.errors import BadInput
from pascaline.model import native

HEAD = 64  # a cut usually keeps fewer tokens than this, and a partial sort is far cheaper than a whole one


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; top_p keeps the smallest set of tokens that holds that much probability, top_k the k best
    (0: all), min_p those with at least that share of the best one's probability. presence and frequency penalties are subtracted from
    the logits of tokens already said (once, and for each time); repetition_penalty divides them (arXiv 1909.05858), the prompt's too.
    n answers a prompt; `seed` fixes them all. `stop` strings end an answer where they occur after the thought, `stop_ids` besides the end
    tokens, which ignore_eos turns off; none of them before min_tokens. thinking=False asks for an answer without a thought (where the
    template can), max_thinking_tokens forces the end of one that has taken so many.
    top_logprobs: so many alternatives are reported for each token; prompt_logprobs: what the model gives the prompt's own tokens."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 256
    n: int = 1
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    thinking: bool = True
    max_thinking_tokens: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, good in (
            ("temperature", 0 <= self.temperature < float("inf")),
            ("top_p", 0 < self.top_p <= 1),
            ("top_k", self.top_k >= 0),
            ("min_p", 0 <= self.min_p <= 1),
            ("presence_penalty", -2 <= self.presence_penalty <= 2),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf")),
            ("max_tokens", self.max_tokens >= (0 if self.prompt_logprobs else 1)),
            ("min_tokens", self.min_tokens >= 0),
            ("n", self.n >= 1),
            ("seed", 0 <= self.seed < 2**64),
            ("stop", all(self.stop)),
            ("logit_bias", all(token >= 0 and -100 <= bias <= 100 for token, bias in self.logit_bias)),
            ("top_logprobs", self.top_logprobs >= 0),
            ("max_thinking_tokens", self.max_thinking_tokens is None or self.max_thinking_tokens >= 0),
        ):
            if not good:
                raise BadInput(f"sampling: {name} = {getattr(self, name)} is out of range.")

    @property
    def by_history(self) -> bool:
        """Whether what was said so far changes the logits."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
            or self.max_thinking_tokens is not None
        )


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014), a step and its finaliser, on uint64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mix(x: Tensor) -> Tensor:
    """`mix` on int64, in place; PyTorch's shift keeps the sign, so its bits are masked off."""
    x += _signed(0x9E3779B97F4A7C15)
    x ^= (x >> 30) & ((1 << 34) - 1)
    x *= _signed(0xBF58476D1CE4E5B9)
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= _signed(0x94D049BB133111EB)
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def exponentials(key_n: Tensor, ids_nM: Tensor) -> Tensor:
    """Exp(1) for each (key, token id), float32 [n, M]."""
    hashed = _mix(ids_nM * _signed(0xD1B54A32D192ED03) ^ key_n.unsqueeze(1))
    uniform = ((hashed >> 32) & 0xFFFFFFFF).float().add_(0.5).mul_(2.0**-32)
    return uniform.neg_().log1p_().neg_()  # of small numbers exact, and those win races


def sample(logits_nV: Tensor, settings_n: Sequence[Sampling], seed_n: np.ndarray, position_n: np.ndarray) -> Tensor:
    """Tokens [n] under each row's temperature and cuts. position: the token's index in its answer."""
    if native.library() and logits_nV.device.type == "cpu":
        return native.draws(logits_nV.float().contiguous(), *_told(settings_n, seed_n, position_n))[0]
    return sample_torch(logits_nV, settings_n, _keys(seed_n, position_n))


def draw(
    adjusted_nV: Tensor, own_nV: Tensor, settings_n: Sequence[Sampling], seed_n: np.ndarray, position_n: np.ndarray
) -> tuple[Tensor, Tensor]:
    """`sample` of adjusted float32 logits, and the tokens' log-probabilities by the model's own; these are no numbers where there are
    some among the own logits that are none."""
    if native.library() and own_nV.device.type == "cpu":
        return native.draws(adjusted_nV.contiguous(), *_told(settings_n, seed_n, position_n), own_nV.contiguous())
    tokens = sample_torch(adjusted_nV, settings_n, _keys(seed_n, position_n))
    return tokens, own_nV.gather(1, tokens.unsqueeze(1)).squeeze(1) - own_nV.logsumexp(-1)


def _keys(seed_n: np.ndarray, position_n: np.ndarray) -> np.ndarray:
    return mix(seed_n.astype(np.uint64) + mix(position_n.astype(np.uint64)))


def _told(settings_n: Sequence[Sampling], seed_n: np.ndarray, position_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cuts = [(s.temperature, s.top_p, s.min_p, s.top_k) for s in settings_n]
    return np.array(cuts).T, _keys(seed_n, position_n)


def sample_torch(logits_nV: Tensor, settings_n: Sequence[Sampling], key_n: np.ndarray) -> Tensor:
    """The same in PyTorch (parity: tests); key: of a row's seed and position."""
    device = logits_nV.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device).unsqueeze(1)

    greedy = [s.temperature == 0 for s in settings_n]
    best_n = logits_nV.argmax(-1)
    if all(greedy):
        return best_n
    # The best token's exponent is 0 before the division: a tiny temperature must not push all of them to -inf.
    shifted = logits_nV.float() - logits_nV.gather(1, best_n.unsqueeze(1)).float()
    if any(s.temperature != 1 for s in settings_n):
        shifted /= column([s.temperature or 1.0 for s in settings_n])
    p_nV = shifted.softmax(-1)
    keys = torch.from_numpy(key_n.view(np.int64)).to(device)
    cut = [s.top_p < 1 or s.top_k > 0 or s.min_p > 0 for s in settings_n]
    if all(cut):
        token_n = _race(*_kept(p_nV, settings_n, column), keys)
    else:
        token_n = _race(p_nV, torch.arange(p_nV.shape[1], device=device).unsqueeze(0), keys)
        if any(cut):
            token_n = torch.where(torch.tensor(cut, device=device), _race(*_kept(p_nV, settings_n, column), keys), token_n)
    return torch.where(torch.tensor(greedy, device=device), best_n, token_n) if any(greedy) else token_n


def _race(p_nM: Tensor, ids_nM: Tensor, key_n: Tensor) -> Tensor:
    winner = (p_nM / exponentials(key_n, ids_nM.expand(len(p_nM), -1))).argmax(-1, keepdim=True)
    return ids_nM.expand_as(p_nM).gather(1, winner).squeeze(1)


def _kept(p_nV: Tensor, settings_n: Sequence[Sampling], column) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Candidates' probabilities, 0 for those cut off, and their ids, best first, both [n, M]."""
    V = p_nV.shape[1]
    top_k, top_p = column([s.top_k or V for s in settings_n]), column([s.top_p for s in settings_n])
    floor = column([s.min_p for s in settings_n]) * p_nV.amax(-1, keepdim=True)
    values, ids = p_nV.topk(min(HEAD, V), -1)
    enough = (top_k <= HEAD) | ((top_k >= V) & ((values.sum(-1, keepdim=True) >= top_p) | (values[:, -1:] < floor)))
    if not bool(enough.all()):
        values, ids = torch.sort(p_nV, dim=-1, descending=True, stable=True)
    values = values.masked_fill(torch.arange(values.shape[1], device=values.device) >= top_k, 0.0)
    mass = torch.where(top_k < V, values.sum(-1, keepdim=True), 1.0)  # top_p is of what top_k left
    before = values.cumsum(-1) - values
    return values.masked_fill((before >= top_p * mass) | (values < floor), 0.0), ids
