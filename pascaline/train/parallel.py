"""Several processes that train one model together (torchrun), or this one alone: FSDP2 on torch.distributed.

Each rank holds a share of the rows of every weight, gradient and moment; a layer's weights are put together while it computes. Ranks
differ in the rows of a batch that they see and in nothing else: losses, norms, loads and decisions are those of all of them.
"""

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pascaline.device import place
from pascaline.model.moe import Router
from pascaline.model.transformer import Model

PATIENCE = timedelta(days=30)  # ranks wait for stages that one of them does alone; torchrun ends them all if one dies


@dataclass(frozen=True)
class Ranks:
    """Who trains. mesh: of their devices; hosts: the group in which their hosts talk, no two threads at a time."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    hosts: Any = field(default=None, repr=False)

    @property
    def leader(self) -> bool:
        """Whether this rank writes the files and speaks to the user."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` added up over the ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over the ranks, element by element, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, self.mesh.get_group())
        return tensor

    def gather(self, thing: Any) -> list[Any]:
        """What each rank brought, in the order of ranks, on every rank. Pickled, but only between the processes of one run."""
        found: list[Any] = [thing]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, thing, group=self.hosts)
        return found

    def beside(self) -> "Ranks":
        """The same ranks with a group of their own, for another thread. All of them must ask."""
        return self if self.size == 1 else replace(self, hosts=dist.new_group(backend="gloo", timeout=PATIENCE))

    def tell(self, thing: Any = None) -> Any:
        """What the leader brought, on every rank. An exception is raised on all of them."""
        told = [thing]
        if self.size > 1:
            dist.broadcast_object_list(told, src=0, group=self.hosts)
        if isinstance(told[0], Exception):
            raise told[0]
        return told[0]


ALONE = Ranks()


def start(device: torch.device) -> Ranks:
    """Meet the other processes that torchrun started. Without torchrun, ALONE."""
    rank, size = place()
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo" if device.type == "cpu" else None)
        atexit.register(dist.destroy_process_group)  # its threads abort a process that ends with them running
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("data",))
    return Ranks(rank, size, mesh, dist.new_group(backend="gloo", timeout=PATIENCE))


class _Whole(nn.Module):
    """The root of the shards: what runs inside its forward finds the weights that are no layer's put together."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(self.model, *arguments)


def shard(model: Model, dtype: torch.dtype, ranks: Ranks) -> Callable[..., Any]:
    """Cut the float32 `model` into the ranks' shares, in place. Returns what runs `work(model, *arguments)` with the weights put
    together in `dtype`; gradients are added up over the ranks in float32. Every rank must run the same work as often."""

    def cut(module: nn.Module, compute: torch.dtype) -> Any:
        policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        return fully_shard(module, mesh=ranks.mesh, mp_policy=policy)

    for module in model.modules():
        if isinstance(module, Router):
            cut(module, torch.float32)  # a rounded score picks another expert
    for layer in model.model.layers:
        cut(layer, dtype)
    whole = cut(_Whole(model), dtype)
    for module in whole.modules():
        if isinstance(module, FSDPModule):  # losses are shares of the whole step's: their gradients add up, they have no mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def run(work: Callable[..., Any], *arguments: Any) -> Any:
        found = whole(work, *arguments)
        if not torch.is_grad_enabled():  # else the backward puts them away
            whole.reshard()
        return found

    return run


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(share: Tensor, whole: Tensor) -> Tensor:
    """This rank's `share` as part of a tensor that is cut as `whole` is; as it is where that is not cut."""
    if not isinstance(whole, DTensor):
        return share
    return DTensor.from_local(share, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def full(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows(tensor: Tensor) -> slice:
    """Which of its rows this rank holds."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    each = -(-len(tensor) // tensor.device_mesh.size())
    first = min(tensor.device_mesh.get_local_rank() * each, len(tensor))
    return slice(first, first + len(tensor.to_local()))
