"""AdamW, and Muon for the layers' matrices, on float32 master weights whatever dtype the model computes in."""

import torch
from torch import Tensor, nn

from pascaline.model.transformer import Model
from pascaline.recipe import Optim

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

    def __init__(self, masters: dict[str, nn.Parameter], optim: Optim, dtype: torch.dtype):
        self.masters, self.optim, self.dtype = masters, optim, dtype
        self.momentum = {name: torch.zeros_like(m) for name, m in masters.items()}

    def step(self, lr: float) -> None:
        beta, keep = self.optim.momentum, 1 - lr * self.optim.weight_decay
        for name, master in self.masters.items():
            if master.grad is None:  # MTP modules while their loss is off
                continue
            stacks = [_matrices(name, tensor) for tensor in (master.data, master.grad, self.momentum[name])]
            n, *sides = stacks[0].shape
            # Everything that a few matrices need is done while the CPU's cache holds them; an accelerator wants all of them at once.
            some = max(CHUNK // (sides[0] * sides[1] * self.dtype.itemsize), 1) if master.device.type == "cpu" else n
            for weight, gradient, momentum in zip(*(stack.split(some) for stack in stacks), strict=True):
                momentum.lerp_(gradient, 1 - beta)
                update = orthogonalise(gradient.lerp(momentum, beta).to(self.dtype))
                weight.mul_(keep).add_(update, alpha=-lr * 0.2 * max(sides) ** 0.5)


def _matrices(name: str, tensor: Tensor) -> Tensor:
    """A weight as the stack of matrices it is, [n, A, B]."""
    if "gate_up_proj" in name:
        return tensor.unflatten(-2, (2, -1)).flatten(0, -3)
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)


class Optimizer:
    """Owns the float32 masters. The model's parameters are working copies in the compute dtype (the masters themselves where
    that is float32): matmuls run in bf16, small updates are not lost.

    Matrices of the layers decay; norms, embeddings and head do not.
    """

    def __init__(self, model: Model, optim: Optim, dtype: torch.dtype):
        self.optim = optim
        self.masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()}
        model.cast_(dtype)
        self.working = dict(model.named_parameters())
        for name, parameter in self.working.items():
            if parameter.dtype == torch.float32:
                parameter.data = self.masters[name].data
        hidden = {n: m for n, m in self.masters.items() if m.dim() > 1 and "embed_tokens" not in n and "lm_head" not in n}
        muon = {n: m for n, m in hidden.items() if optim.optimizer == "muon" and not n.endswith("mlp.gate.weight")}
        self.muon = Muon(muon, optim, dtype)
        decay = [m for n, m in hidden.items() if n not in muon]
        plain = [m for n, m in self.masters.items() if n not in hidden]
        groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)

    def collect(self) -> None:
        """Move the gradients of one backward pass into the masters', in float32, so that micro-batches add up exactly."""
        for name, parameter in self.working.items():
            if parameter.grad is None:
                continue
            master = self.masters[name]
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def norm(self) -> Tensor:
        """The norm of all collected gradients."""
        return torch.nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])

    @torch.no_grad()
    def step(self, lr: float, norm: Tensor) -> None:
        """Clip the gradients of that norm, update, copy back, forget the gradients."""
        torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.optim.clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.muon.step(lr)
        for name in self.working:
            self.refresh(name)
        self.drop()

    @torch.no_grad()
    def refresh(self, name: str) -> None:
        """Copy a master to its working parameter, where they are two."""
        if self.working[name].dtype != torch.float32:
            self.working[name].copy_(self.masters[name])

    def drop(self) -> None:
        """Forget the collected gradients."""
        for master in self.masters.values():
            master.grad = None

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, flat: what a checkpoint stores."""
        out = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        out |= {f"momentum.{name}": value for name, value in self.muon.momentum.items()}
        for name, master in self.masters.items():
            out |= {f"{key}.{name}": value for key, value in self.adamw.state.get(master, {}).items()}
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(state[f"master.{name}"])
            if f"exp_avg.{name}" in state:
                self.adamw.state[master] = {k: state[f"{k}.{name}"].to(master.device) for k in ("step", "exp_avg", "exp_avg_sq")}
            if name in self.muon.momentum:
                self.muon.momentum[name].copy_(state[f"momentum.{name}"])
            self.refresh(name)
