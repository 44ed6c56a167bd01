"""How much memory a training stage takes on each rank, computed from the shapes; nothing is allocated. bench/memory.py holds it against
measured peaks.

Shapes: n tokens of a micro-batch, D hidden, H heads, K experts a token, E experts, V vocabulary.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

import torch

from pascaline.model.attention import QUERY_BLOCK
from pascaline.model.config import ModelConfig
from pascaline.model.moe import FEW, SEGMENT
from pascaline.model.transformer import Model
from pascaline.tables import Extend, Pretrain, Sft, Stage
from pascaline.train.losses import CHUNK
from pascaline.train.optim import CHUNK as MUON_CHUNK

ROOT = -1  # embedding, head and last norm: no layer's


@dataclass(frozen=True)
class Plan:
    """A training stage on `ranks` processes, of which `experts` share out the experts of a layer, in `replicas` that hold the whole model
    each. size: bytes of a number in the compute dtype; host: whether the CPU computes, whose attention and experts keep other things
    than a GPU's kernels."""

    config: ModelConfig
    stage: Stage
    ranks: int = 1
    experts: int = 1
    size: int = 4
    host: bool = True
    replicas: int = 1

    @property
    def row(self) -> int:
        """Tokens a row; in rl a longer answer makes longer rows."""
        longer = self.stage.length if isinstance(self.stage, Extend) else 0
        return self.stage.sequence_length or longer

    @property
    def share(self) -> int:
        """Rows of a step that a rank gets, at most."""
        per_step = self.stage.tokens_per_step if isinstance(self.stage, Pretrain | Extend | Sft) else self.stage.micro_tokens * 2
        return ceil(max(per_step // self.row, 1) / self.ranks)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return min(max(self.stage.micro_tokens // self.row, 1), self.share)

    @property
    def tokens(self) -> int:
        return self.rows * self.row

    @property
    def mtp(self) -> bool:
        return bool(self.stage.mtp) and self.config.num_nextn_predict_layers > 0

    @cached_property
    def weights(self) -> dict[int, dict[str, tuple[int, ...]]]:
        """Layer -> name -> shape."""
        with torch.device("meta"):
            model = Model(self.config)
        out: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for name, parameter in model.named_parameters():
            out[int(name.split(".")[2]) if name.startswith("model.layers.") else ROOT][name] = tuple(parameter.shape)
        return dict(out)

    def whole(self, layer: int) -> int:
        """Numbers of a layer's weights where they are put together: of the experts those that the rank computes."""
        return sum(prod(shape) // (self.experts if ".experts." in name else 1) for name, shape in self.weights[layer].items())

    def held(self, layer: int) -> int:
        """Numbers that a rank holds of them: the rows of the first rank, which has most."""
        return sum(_cut(name, shape, self) for name, shape in self.weights[layer].items())


def _cut(name: str, shape: tuple[int, ...], plan: Plan) -> int:
    apart = plan.experts if ".experts." in name else 1
    return ceil(shape[0] // apart / (plan.ranks // plan.replicas // apart)) * prod(shape[1:])


def peak(plan: Plan) -> dict[str, int]:
    """Bytes of each kind at a rank's worst moment, which "peak" is: kinds that do not meet there are smaller than they become at other
    moments. "host copy": what the next checkpoint is written from; "start": the rank's
    share and the largest tensor, of which it is drawn or read; a rank that is alone has the whole model and the masters."""
    always = {"weights": _weights(plan), "moments": _moments(plan)}
    moments = [*_backward(plan), _update(plan)]
    worst = max(moments, key=lambda kinds: sum(kinds.values()))
    kinds = {**always, **{kind: max(worst.get(kind, 0), 0) for kind in ("gradients", "gathered", "activations", "logits", "temporary")}}
    held, sizes = sum(map(plan.held, plan.weights)), [prod(shape) for layer in plan.weights.values() for shape in layer.values()]
    start = 4 * (held + max(sizes)) if plan.ranks > 1 else 8 * sum(sizes)
    return {**kinds, "peak": sum(kinds.values()), "host copy": 4 * held + always["moments"], "start": start}


def _weights(plan: Plan) -> int:
    """float32 masters, and the working copies of a rank that is alone."""
    held = sum(map(plan.held, plan.weights))
    return held * (4 + (plan.size if plan.ranks == 1 and plan.size != 4 else 0))


def _moments(plan: Plan) -> int:
    """Two of AdamW, one of Muon."""
    out = 0
    for shapes in plan.weights.values():
        for name, shape in shapes.items():
            out += 4 * _cut(name, shape, plan) * (1 if _muon(name, shape, plan) else 2)
    return out


def _muon(name: str, shape: tuple[int, ...], plan: Plan) -> bool:
    plain = len(shape) == 1 or "embed_tokens" in name or "lm_head" in name or name.endswith("mlp.gate.weight")
    return plan.stage.optimizer == "muon" and not plain


def _backward(plan: Plan) -> list[dict[str, int]]:
    """What there is beside weights and moments when the backward begins, and in each layer of it: activations go as gradients come."""
    alone, depth = plan.ranks == 1, plan.config.num_hidden_layers
    order = [i for i in sorted(plan.weights) if i != ROOT and (i < depth or plan.mtp)]
    kept = {i: _kept(i, plan) for i in order}
    common = plan.tokens * plan.row * plan.size + plan.size * plan.tokens * 3 * plan.config.hidden_size  # the mask; around the last norm
    before = 0 if plan.share <= plan.rows else 4 * sum(map(plan.held, plan.weights))
    root = 0 if alone else plan.size * plan.whole(ROOT)
    logits, wide = _logits(plan)
    out = [{"gradients": before, "gathered": root, "activations": common + sum(kept.values()), "logits": logits, "temporary": wide}]
    done = plan.size * plan.config.vocab_size * plan.config.hidden_size  # the head's, not yet cut
    for at, i in reversed(list(enumerate(order))):
        again = _layer(i, plan) - kept[i] if kept[i] < _layer(i, plan) else 0
        own, gathered = plan.size * plan.whole(i), 0
        if not alone:
            gathered, own = root + plan.size * (2 * plan.whole(i) + plan.whole(order[max(at - 1, 0)])), own + 4 * plan.whole(i)
        activations = common + sum(kept[j] for j in order[: at + 1]) + again
        out.append({"gradients": before + done + own, "gathered": gathered, "activations": activations, "temporary": _passing(i, plan)})
        done += plan.size * plan.whole(i) if alone else 4 * plan.held(i)
    return out


def _update(plan: Plan) -> dict[str, int]:
    """All gradients in float32, and what Muon works on."""
    temporary = 0
    for shapes in plan.weights.values():
        for name, shape in shapes.items():
            if _muon(name, shape, plan):
                stacked = len(shape) == 3
                numbers = _cut(name, shape, plan) if stacked or plan.ranks == 1 else prod(shape)
                if plan.host and stacked:  # a few matrices at a time
                    numbers = min(numbers, max(MUON_CHUNK // plan.size, prod(shape[1:])))
                temporary = max(temporary, numbers * (8 + 3 * plan.size))
    return {"gradients": 4 * sum(map(plan.held, plan.weights)), "temporary": temporary}


def _kept(layer: int, plan: Plan) -> int:
    """Bytes of a layer's activations that wait for the backward; with recomputation its input and what the router did."""
    if plan.stage.activation_checkpointing and layer < plan.config.num_hidden_layers:
        return plan.tokens * (plan.size * plan.config.hidden_size + _routing(plan) * (layer >= plan.config.first_k_dense_replace))
    return _layer(layer, plan)


def _layer(layer: int, plan: Plan) -> int:
    """Bytes of all activations of a layer."""
    c = plan.config
    numbers = 4 * c.hidden_size + _attention(plan)  # two norms, each with its output
    more = 0
    if layer < c.first_k_dense_replace:
        numbers += 4 * c.intermediate_size
    else:
        numbers += 4 * c.n_shared_experts * c.moe_intermediate_size
        more = _experts(plan) + plan.tokens * (_routing(plan) + (4 * c.hidden_size if plan.size != 4 else 0))
    if layer >= c.num_hidden_layers:  # a module for multi-token prediction: norms of both inputs, both side by side, its own last norm
        numbers += 7 * c.hidden_size
    return plan.size * plan.tokens * numbers + more


def _attention(plan: Plan) -> int:
    """Numbers a token, without the norm before it. On the CPU keys and values are copied for each block of queries, and weights stay."""
    c = plan.config
    heads, width = c.num_attention_heads, c.qk_head_dim
    if c.model_type != "deepseek_v3":
        value, latent, raw = width, 0, (heads + 2 * c.kv_heads) * width
        pairs = raw + heads * 2 * width
    else:
        value, latent = c.v_head_dim, 2 * (c.q_lora_rank or 0) + 2 * c.kv_lora_rank
        raw = (c.q_lora_rank or heads * width) + c.kv_lora_rank + c.qk_rope_head_dim
        pairs = heads * (width + c.qk_nope_head_dim + value)
    if not plan.host:
        return latent + raw + heads * width + pairs + heads * value + 4 * heads // plan.size
    block = min(QUERY_BLOCK, plan.row)
    seen = (plan.row / block + 1) / 2  # blocks of keys that a block of queries meets, on average
    keys = seen * heads * (width + value) if plan.rows > 1 else pairs
    return latent + int(heads * width + keys + heads * block * seen) + heads * value


def _experts(plan: Plan) -> int:
    """Bytes of the routed experts' activations."""
    c = plan.config
    pairs = plan.tokens * c.num_experts_per_tok
    rows = _rows(plan)
    exchanged = plan.size * plan.tokens * min(c.num_experts_per_tok, plan.experts) * 2 * c.hidden_size if plan.experts > 1 else 0
    return plan.size * (rows * (c.hidden_size + 4 * c.moe_intermediate_size) + pairs * c.hidden_size) + 8 * (rows + pairs) + exchanged


def _rows(plan: Plan) -> int:
    """Rows of the experts' products: on the CPU an expert's share is rounded up."""
    c, local = plan.config, plan.config.n_routed_experts // plan.experts
    pairs = plan.tokens * c.num_experts_per_tok
    if not plan.host:
        return pairs
    if pairs <= FEW * local:
        return local * ceil(2 * pairs / local / SEGMENT) * SEGMENT  # all as long as the longest
    return pairs + local * SEGMENT // 2


def _routing(plan: Plan) -> int:
    """Bytes a token of what a router did: logits, scores, the choice."""
    c = plan.config
    return 4 * c.n_routed_experts * (5 if plan.stage.sequence_balance else 2) + 24 * c.num_experts_per_tok


def _passing(layer: int, plan: Plan) -> int:
    """Bytes that the backward of a layer needs beside what it gives and takes: gradients of activations on their way."""
    c = plan.config
    if layer < c.first_k_dense_replace:
        return plan.size * plan.tokens * (2 * c.hidden_size + 3 * c.intermediate_size)
    wide = _rows(plan) * (c.hidden_size + 3 * c.moe_intermediate_size)
    return plan.size * (plan.tokens * 2 * c.hidden_size + wide + plan.tokens * c.num_experts_per_tok * c.hidden_size)


def _logits(plan: Plan) -> tuple[int, int]:
    """Bytes of a chunk of logits, and of the gradients that the head's backward makes."""
    c = plan.config
    chunk = min(CHUNK, plan.tokens) * c.vocab_size * (4 if plan.size == 4 else 4 + 2 * plan.size)
    return chunk, c.vocab_size * c.hidden_size * (4 + plan.size) + plan.size * plan.tokens * c.hidden_size
