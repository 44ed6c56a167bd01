"""AdamW, and Muon for the layers' matrices, on float32 master weights whatever dtype the model computes in."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pascaline.model.transformer import Model
from pascaline.tables import Optim
from pascaline.train import parallel
from pascaline.train.parallel import ALONE, Ranks

NS_STEPS = 5
NS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz coefficients of Jordan's Muon
CHUNK = 1 << 20  # bytes of matrices that are orthogonalised together on the CPU


def orthogonalise(g_nAB: Tensor) -> Tensor:
    """Each matrix's singular values moved to about 1 (0.7..1.2) by five Newton-Schulz steps; [n, A, B] -> [n, A, B]."""
    a, b, c = NS
    tall = g_nAB.shape[1] > g_nAB.shape[2]
    x = g_nAB.transpose(1, 2) if tall else g_nAB
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32) + 1e-7).to(x.dtype)
    for _ in range(NS_STEPS):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon:
    """Momentum, orthogonalised, times 0.2 sqrt(max(A, B)), which gives AdamW's update size, so both share one learning rate
    (Moonlight, arXiv 2502.16982 section 2.2). Stacked experts are orthogonalised one by one, gate and up apart."""

    def __init__(self, masters: dict[str, nn.Parameter], wholes: dict[str, Tensor], optim: Optim, dtype: torch.dtype):
        """masters: what this rank holds of `wholes` (all of them, if it is alone)."""
        self.masters, self.wholes, self.optim, self.dtype = masters, wholes, optim, dtype
        self.cut = any(isinstance(whole, DTensor) for whole in wholes.values())
        self.momentum = {name: torch.zeros_like(m) for name, m in masters.items()}

    def step(self, lr: float, fine: Tensor) -> None:
        """Where `fine` does not hold, nothing changes, whatever the gradients are."""
        keep, rate = 1 - lr * self.optim.weight_decay * fine, 0.2 * lr * fine
        for name, master in self.masters.items():
            if master.grad is None:  # MTP modules while their loss is off
                continue
            whole, own = self.wholes[name], (master.data, master.grad, self.momentum[name])
            if master.dim() == 2 and self.cut:  # experts are cut between experts; of any other matrix the ranks put the rows together
                weight, gradient, momentum = own
                look = _matrices(name, parallel.full(parallel.like(self._look(gradient, momentum, fine), whole)))
                update = orthogonalise(look).reshape(whole.shape)[parallel.rows(whole)]
                weight.mul_(keep).sub_(update.float().mul_(rate * max(look.shape[1:]) ** 0.5))
                continue
            stacks = [_matrices(name, tensor) for tensor in own]
            n, *sides = stacks[0].shape
            # Everything that a few matrices need is done while the CPU's cache holds them; an accelerator wants all of them at once.
            some = max(CHUNK // (sides[0] * sides[1] * self.dtype.itemsize), 1) if master.device.type == "cpu" else max(n, 1)
            for weight, gradient, momentum in zip(*(stack.split(some) for stack in stacks), strict=True):
                update = orthogonalise(self._look(gradient, momentum, fine))
                weight.mul_(keep).sub_(update.float().mul_(rate * max(sides) ** 0.5))

    def _look(self, gradient: Tensor, momentum: Tensor, fine: Tensor) -> Tensor:
        """Move the momentum; Nesterov's look ahead of it, in the compute dtype."""
        gradient = torch.where(fine, gradient, momentum)
        momentum.lerp_(gradient, 1 - self.optim.momentum)
        return gradient.lerp(momentum, self.optim.momentum).to(self.dtype)


def _matrices(name: str, tensor: Tensor) -> Tensor:
    """A weight as the stack of matrices it is, [n, A, B]."""
    if "gate_up_proj" in name:
        return tensor.unflatten(-2, (2, -1)).flatten(0, -3)
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)


class Optimizer:
    """Owns the float32 masters. The model's parameters are working copies in the compute dtype (the masters themselves where
    that is float32): matmuls run in bf16, small updates are not lost. Of a model cut by `parallel.shard` the parameters are float32
    and the masters this rank's shares of them.

    Matrices of the layers decay; norms, embeddings and head do not. mtp_apart: the MTP modules' gradients have a norm of their own and are
    clipped by it, so that they do not shorten the steps of the rest.
    """

    def __init__(self, model: Model, optim: Optim, dtype: torch.dtype, ranks: Ranks = ALONE, mtp_apart: bool = False):
        self.optim, self.ranks = optim, ranks
        if ranks.size > 1:
            self.working = dict(model.named_parameters())
            self.wholes = parallel.cuts(model, ranks)
            self.masters = {name: nn.Parameter(parallel.local(p.detach())) for name, p in self.working.items()}
        else:
            self.masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()}
            self.working = dict(model.cast_(dtype).named_parameters())
            self.wholes = parallel.cuts(model, ranks)
            for name, parameter in self.working.items():
                if parameter.dtype == torch.float32:
                    parameter.data = self.masters[name].data
        own = tuple(f"model.layers.{model.config.num_hidden_layers + i}." for i in range(model.config.num_nextn_predict_layers))
        self.apart = [m for n, m in self.masters.items() if mtp_apart and n.startswith(own)]
        self.together = [m for n, m in self.masters.items() if not (mtp_apart and n.startswith(own))]
        hidden = {n: m for n, m in self.masters.items() if m.dim() > 1 and "embed_tokens" not in n and "lm_head" not in n}
        muon = {n: m for n, m in hidden.items() if optim.optimizer == "muon" and not n.endswith("mlp.gate.weight")}
        self.muon = Muon(muon, self.wholes, optim, dtype)
        decay = [m for n, m in hidden.items() if n not in muon]
        plain = [m for n, m in self.masters.items() if n not in hidden]
        groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)

    def collect(self) -> None:
        """Move the gradients of one backward pass into the masters', in float32, so that micro-batches add up exactly."""
        for name, parameter in self.working.items():
            if parameter.grad is None:
                continue
            master, gradient = self.masters[name], parallel.local(parameter.grad)
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad += gradient
            parameter.grad = None

    def norm(self) -> Tensor:
        """The norm of all collected gradients but those that stand apart, of all ranks; replicas hold the same ones, which count once."""
        return self._norm(self.together)

    def _norm(self, masters: list[nn.Parameter]) -> Tensor:
        own = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
        return (self.ranks.sum(own.square()) / self.ranks.replicas).sqrt() if self.ranks.size > 1 else own

    @torch.no_grad()
    def step(self, lr: float, norm: Tensor, fine: Tensor | None = None) -> None:
        """Clip the gradients of that norm, update, copy back, forget the gradients. Where `fine` (a bool on the device) does not hold,
        weights and moments stay as they were, and nobody has had to wait for the device to say so."""
        fine = torch.ones((), dtype=torch.bool, device=norm.device) if fine is None else fine
        torch.nn.utils.clip_grads_with_norm_(self.together, self.optim.clip, norm)
        if self.apart:
            own = self._norm(self.apart)
            fine = fine & own.isfinite()
            torch.nn.utils.clip_grads_with_norm_(self.apart, self.optim.clip, own)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.found_inf = (~fine).float()  # type: ignore[attr-defined]  # what a GradScaler tells a fused optimizer
        self.adamw.step()
        self.muon.step(lr, fine)
        for name in self.working:
            self.refresh(name)
        self.drop()

    @torch.no_grad()
    def refresh(self, name: str) -> None:
        """Copy a master to its working parameter, where they are two."""
        if self.working[name].dtype != torch.float32:
            self.working[name].copy_(self.masters[name])

    @torch.no_grad()
    def scale_rows(self, name: str, factor: Tensor) -> None:
        """Multiply each row of a weight [A, B], or of a bias [A], by its own factor [A]."""
        own = factor[parallel.rows(self.wholes[name])]
        self.masters[name].mul_(own.view(-1, *[1] * (self.masters[name].dim() - 1)))
        self.refresh(name)

    def drop(self) -> None:
        """Forget the collected gradients."""
        for master in self.masters.values():
            master.grad = None

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, flat: what a checkpoint stores. A rank's shares come as parts of their whole."""
        out: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            moments = self.adamw.state.get(master, {})
            own = {"master": master.detach(), **({"momentum": self.muon.momentum[name]} if name in self.muon.momentum else {}), **moments}
            out |= {f"{key}.{name}": parallel.like(t, self.wholes[name]) if t.dim() else t for key, t in own.items()}
        return out

    def room(self, names: set[str]) -> dict[str, Tensor]:
        """The live tensors of `state` for a state that has `names`: to be written over, then `reload`. Moments come into being with a
        weight's first gradient, so a state need not have all of them."""
        for name, master in self.masters.items():
            self.adamw.state.pop(master, None)
            if f"exp_avg.{name}" in names:
                zeros = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
                self.adamw.state[master] = {"step": torch.zeros((), device=master.device), **zeros}
        return self.state()

    def reload(self) -> None:
        """After the tensors of `room` were written."""
        for name in self.working:
            self.refresh(name)
