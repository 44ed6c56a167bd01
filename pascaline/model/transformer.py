"""The model: blocks, head, MTP modules. Module names are those of the Hugging Face files.

Shapes: B batch, T tokens, D hidden, V vocabulary, L expert layers, E experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pascaline.model import native
from pascaline.model.attention import Cache, GroupedAttention, LatentAttention, RMSNorm, visible, visible_blocks
from pascaline.model.config import ModelConfig
from pascaline.model.moe import MLP, MoE, Router, Routing

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# MKL looks at the processor in its first vector function. Two threads that make this first call together race, and in some processes of a
# hundred one of them computes its share on another path, with other bits. One thread makes it here.
torch.zeros(1).exp_()


@dataclass
class View:
    """What every layer of one forward shares: rotary turns, the mask among the new tokens, the cache, which tokens are no padding
    (None: all), and the experts to use, if they are given."""

    turn: Tensor
    mask_BTT: "Tensor | BlockMask | None"
    cache: Cache | None
    real_BT: Tensor | None = None
    routes_BTLK: Tensor | None = None


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (LatentAttention if config.latent else GroupedAttention)(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias) if dense else MoE(config)
        self.expert_layer = layer - config.first_k_dense_replace  # which of those with experts

    def forward(self, x_BTD: Tensor, view: View) -> tuple[Tensor, Routing | None]:
        """[B, T, D] -> [B, T, D] and, for an expert layer, how it routed (not where the kernels compute a step of the engine)."""
        if (y_BTD := native.blocks([self], x_BTD, view.turn, view.cache)) is not None:
            return y_BTD, None
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), view.turn, view.mask_BTT, view.cache)
        normed = self.post_attention_layernorm(x_BTD)
        if not isinstance(self.mlp, MoE):
            return x_BTD + self.mlp(normed), None
        given = None if view.routes_BTLK is None else view.routes_BTLK[:, :, self.expert_layer]
        y, routing = self.mlp(normed, view.real_BT, given)
        if view.cache is not None:
            view.cache.routed(self.expert_layer, routing.chosen)
        return x_BTD + y, routing


class MTPBlock(Block):
    """A multi-token-prediction module: predicts one token further from the hidden state before it and the next token's
    embedding (arXiv 2412.19437, section 2.2). Embedding and head are the model's own."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(self, hidden_BTD: Tensor, view: View, next_BTD: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        both = torch.cat((self.enorm(next_BTD, view.cache), self.hnorm(hidden_BTD, view.cache)), -1)
        x, routing = super().forward(native.linear(self.eh_proj, both, view.cache), view)
        return self.shared_head["norm"](x, view.cache), routing


class Trunk(nn.Module):
    """Everything under `model.` in the files. Layers past num_hidden_layers are the MTP modules, as V3 stores them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        depth = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, i) if i < depth else MTPBlock(config, i) for i in range(depth + config.num_nextn_predict_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class RewardHead(nn.Module):
    """A score for a hidden state, [..., D] -> [...] float32: what a reward model has beside its trunk. It stands in no model folder
    (model/hf.py leaves it out), and begins at zero: all answers are equal at first. Like a router it stays float32."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))  # a vector: the optimizer takes it for no matrix of a layer

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.float() @ self.weight


class Model(nn.Module):
    """model(tokens [B, T]) -> logits [B, T, V]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.flex = False  # attend by FlexAttention where there is no cache
        self.model = Trunk(config)
        self.reward_head: RewardHead | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, document_ids_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]. Tokens see earlier tokens of their own document only."""
        return self.head(self.hidden(tokens_BT, positions_BT, document_ids_BT)[0])

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        routes_BTLK: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Normed last hidden states [B, T, D], and what the expert layers' routers did. routes_BTLK: the K experts that each of these L
        layers is to use, in place of its routers' choice."""
        view = self.view(tokens_BT, positions_BT, document_ids_BT, cache)
        view.routes_BTLK = None if routes_BTLK is None else routes_BTLK.long()
        x = self.model.embed_tokens(tokens_BT)
        routings: list[Routing] = []
        layers = list(self.model.layers)[: self.config.num_hidden_layers]
        if (y := native.blocks(layers, x, view.turn, cache)) is not None:
            return self.model.norm(y, cache), routings
        for layer in layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, routing = checkpoint(layer, x, view, use_reentrant=False, preserve_rng_state=False)
            else:
                x, routing = layer(x, view)
            if routing is not None:
                routings.append(routing)
        return self.model.norm(x, cache), routings

    def view(self, tokens_BT: Tensor, positions_BT: Tensor | None, document_ids_BT: Tensor | None, cache: Cache | None = None) -> View:
        B, T = tokens_BT.shape
        if positions_BT is None:
            positions_BT = torch.arange(T, device=tokens_BT.device).expand(B, T)
        turn = native.turns(self.config, positions_BT, cache)
        real = None if document_ids_BT is None else document_ids_BT >= 0
        mask: Tensor | BlockMask | None = None  # a cache brings its own
        if cache is None and self.flex:
            mask = visible_blocks(document_ids_BT, B, T, tokens_BT.device)
        elif cache is None:
            mask = visible(document_ids_BT, B, T, tokens_BT.device, self.dtype)
        return View(turn, mask, cache, real)

    def mtp_hidden(
        self,
        hidden_BTD: Tensor,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        apart: bool = False,
    ) -> list[tuple[Tensor, Routing | None]]:
        """For depth k = 1, 2, ...: states [B, T, D] whose head predicts token t + 1 + k, and how the module routed.

        hidden_BTD are the states of `hidden`. The last k positions see wrapped-around tokens: mask them in the loss. apart: gradients
        reach the modules only, neither the embedding nor what hidden_BTD come from.
        """
        view, out = self.view(tokens_BT, positions_BT, document_ids_BT), []
        hidden_BTD = hidden_BTD.detach() if apart else hidden_BTD
        for module in self.model.layers[self.config.num_hidden_layers :]:
            tokens_BT = tokens_BT.roll(-1, 1)
            next_BTD = self.model.embed_tokens(tokens_BT)
            hidden_BTD, routing = cast(MTPBlock, module)(hidden_BTD, view, next_BTD.detach() if apart else next_BTD)
            out.append((hidden_BTD, routing))
        return out

    def head(self, hidden: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits [..., V] of normed hidden states [..., D]; with the cache of the engine's step they are of."""
        return native.product(hidden, self.head_weight, cache=cache)

    @property
    def head_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def routers(self) -> list[Router]:
        """The routers in layer order, the MTP modules' last."""
        return [m for m in self.modules() if isinstance(m, Router)]

    def cast_(self, dtype: torch.dtype) -> "Model":
        """Change the compute dtype in place. Routers stay float32: a rounded score picks another expert."""
        for module in self.modules():
            if not isinstance(module, Router | RewardHead):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        return self

    def reposition_(self, config: ModelConfig) -> "Model":
        """Read positions as `config` says, in place: another `rope` or `max_position_embeddings`, the same shapes."""
        for module in self.modules():
            if hasattr(module, "config"):
                module.config = config  # type: ignore[assignment]
        return self

    @torch.no_grad()
    def init_(self, seed: int) -> "Model":
        """Random weights, in place: `begin_` for each tensor in turn."""
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in self.state_dict().items():
            begin_(name, tensor, self.config.initializer_range, generator)
        return self

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder (config.json, model.safetensors, generation_config.json). Byte-stable."""
        from pascaline.model import hf

        hf.save(folder, self.config, self.state_dict().items(), self.dtype)


def begin_(name: str, tensor: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """What a tensor of a model has before training, in place: Normal(0, deviation) a matrix, ones a norm, zeros a bias (V3)."""
    if tensor.dim() > 1:
        return tensor.normal_(0.0, deviation, generator=generator)
    return tensor.fill_(0.0 if name.endswith("bias") else 1.0)


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters in total, active per token, and the MTP modules' own; embeddings and head counted as DeepSeek does (both in)."""
    with torch.device("meta"):
        model = Model(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    mtp = {f"model.layers.{config.num_hidden_layers + i}." for i in range(config.num_nextn_predict_layers)}
    own = sum(size for name, size in sizes.items() if name.startswith(tuple(mtp)))
    routed = sum(size for name, size in sizes.items() if ".experts." in name and not name.startswith(tuple(mtp) or "-"))
    total = sum(sizes.values()) - own
    active = total - routed + routed * config.num_experts_per_tok // max(config.n_routed_experts, 1)
    return {"total": total, "active": active, "mtp": own}
