"""Several processes that train one model together (torchrun), or this one alone: FSDP2 and expert parallelism on torch.distributed.

Each rank holds a share of the rows of every weight, gradient and moment; a layer's weights are put together while it computes, but its
experts only among the ranks that hold the same ones: tokens go to the others (train/dispatch.py). Replicas are groups of ranks that hold
the whole model each: only gradients, which are added up over all of them, go from one to another. Ranks differ in the rows of a batch
that they see and in nothing else: losses, norms, loads and decisions are those of all of them.
"""

import atexit
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from pascaline.device import place
from pascaline.model.moe import Experts, Router
from pascaline.model.transformer import Model
from pascaline.train.dispatch import Dispatch

Rows = Callable[[str, torch.Size, slice], Tensor]  # of a tensor by its name and whole shape; asked in the order of a model's tensors
PATIENCE = timedelta(days=30)  # ranks wait for stages that one of them does alone; torchrun ends them all if one dies


@dataclass(frozen=True)
class Ranks:
    """Who trains. mesh: of their devices; hosts: the group in which their hosts talk, no two threads at a time; experts: so many of them,
    neighbours, share out the experts of a layer; replicas: groups of neighbours, each with the whole model."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    hosts: Any = field(default=None, repr=False)
    experts: int = 1
    replicas: int = 1

    @property
    def leader(self) -> bool:
        """Whether this rank writes the files and speaks to the user."""
        return self.rank == 0

    @property
    def device(self) -> torch.device | None:
        """Where this rank computes; None: wherever the model is, for it is alone."""
        return torch.device(self.mesh.device_type) if self.mesh is not None else None

    def __str__(self) -> str:
        """The mesh in words."""
        own = self.size // self.replicas
        way = f" (among {self.experts}, each one's over {own // self.experts})" if 1 < self.experts < own else ""
        alike = f"all over {own}" if own > 1 else "the whole model on each"
        apart = f"experts over {own}{way} by all-to-all, the rest over {own}" if self.experts > 1 else alike
        return f"{self.size} ranks: {f'{self.replicas} replicas of {own}, ' if self.replicas > 1 else ''}{apart}"

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


def start(device: torch.device, experts: int = 1, replicas: int = 1) -> Ranks:
    """Meet the other processes that torchrun started, of which so many share out the experts, in so many replicas. Without torchrun,
    ALONE."""
    rank, size = place()
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo" if device.type == "cpu" else None, store=_meet(rank, size), rank=rank, world_size=size)
        atexit.register(dist.destroy_process_group)  # its threads abort a process that ends with them running
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("data",))
    return Ranks(rank, size, mesh, dist.new_group(backend="gloo", timeout=PATIENCE), experts, replicas)


@cache
def _grid(kind: str, size: int, experts: int, replicas: int) -> DeviceMesh:
    order = torch.arange(size).view(replicas, -1, experts).transpose(1, 2)
    return DeviceMesh(kind, order, mesh_dim_names=("replica", "experts", "data"))


def grid(ranks: Ranks, experts: int | None = None) -> DeviceMesh:
    """The mesh of tensors that are cut between experts first. Ranks that share out the experts of a layer are neighbours, so that
    tokens stay inside a machine, and so are those of a replica."""
    assert ranks.mesh is not None
    return _grid(ranks.mesh.device_type, ranks.size, experts or ranks.experts, ranks.replicas)


def _holders(ranks: Ranks, experts: int = 1) -> DeviceMesh | None:
    """The mesh of the ranks that hold parts of the same weights, for FSDP2: with replicas two dimensions, and it adds up gradients along
    the first one (HSDP)."""
    if ranks.replicas == experts == 1:
        return ranks.mesh
    return grid(ranks, experts)[("replica", "data") if ranks.replicas > 1 else "data"]


def _meet(rank: int, size: int) -> dist.Store:
    """A store of these processes alone. torchrun restarts them with the store that the dead ones had, whose addresses still stand there
    (pytorch issue 135712), and a restart's number is not the same on all nodes: so the leader draws a word that is new."""
    store, *_ = next(dist.rendezvous("env://", rank, size))
    own = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", own)
        word = store.get(f"answer/{own}").decode()  # waits
        store.set(f"{word}/{rank}", "heard")
        return dist.PrefixStore(word, store)
    missing = set(range(1, size))
    while missing:  # who says hello may be dead; the living one says it later
        for other in sorted(missing):
            if store.check([f"{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", own)
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


class _Whole(nn.Module):
    """The root of the shards: what runs inside its forward finds the weights that are no layer's put together."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(self.model, *arguments)


def shard(model: Model, dtype: torch.dtype, ranks: Ranks, first: Rows | None = None) -> Callable[..., Any]:
    """Cut the float32 `model` into the ranks' shares, in place. Returns what runs `work(model, *arguments)` with the weights put
    together in `dtype`; gradients are added up over the ranks in float32. Every rank must run the same work as often.

    first: of a model without memory (device "meta"), what gives the rows of each tensor that a rank holds (train/initial.py)."""

    rest = _holders(ranks)

    def cut(module: nn.Module, compute: torch.dtype, mesh: DeviceMesh | None = rest) -> Any:
        policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        return fully_shard(module, mesh=mesh, mp_policy=policy)

    for module in model.modules():
        if isinstance(module, Router):
            cut(module, torch.float32)  # a rounded score picks another expert
        elif isinstance(module, Experts) and ranks.experts > 1:
            cut(_share_out(module, ranks), dtype, _holders(ranks, ranks.experts))
    for layer in model.model.layers:
        cut(layer, dtype)
    whole = cut(_Whole(model), dtype)
    for module in whole.modules():
        if isinstance(module, FSDPModule):  # losses are shares of the whole step's: their gradients add up, they have no mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if first is not None:
        _fill(whole, ranks, first)

    def run(work: Callable[..., Any], *arguments: Any) -> Any:
        found = whole(work, *arguments)
        if not torch.is_grad_enabled():  # else the backward puts them away
            whole.reshard()
        return found

    return run


@torch.no_grad()
def _fill(whole: _Whole, ranks: Ranks, first: Rows) -> None:
    """Give the shares memory, and their rows of each tensor."""
    whole.to_empty(device=ranks.device)
    shares = {**whole.model.state_dict(), **cuts(whole.model, ranks)}  # in the first one's order
    for name, share in shares.items():
        local(share).copy_(first(name, share.shape, rows(share)))


def _share_out(experts: Experts, ranks: Ranks) -> Experts:
    """Keep this rank's experts of a layer, in place, and let it ask the others for theirs."""
    mesh = grid(ranks)
    each = len(experts.gate_up_proj) // ranks.experts
    first = mesh.get_local_rank("experts") * each
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(parameter.detach()[first : first + each].clone()))
    experts.dispatch = Dispatch(mesh.get_group("experts"), each)
    return experts


def cuts(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The parameters of a model that `shard` has cut, each as this rank's part of its whole, sharing memory; of any other model the
    parameters."""
    out: dict[str, Tensor] = dict(model.named_parameters())
    for name, parameter in out.items():
        if isinstance(parameter, DTensor) and parameter.device_mesh.size() < ranks.size:  # whole only among the ranks that hold it
            shape = torch.Size((len(parameter) * ranks.experts, *parameter.shape[1:]))
            share, placed = local(parameter.detach()), (Replicate(), Shard(0), Shard(0))
            out[name] = DTensor.from_local(share, grid(ranks), placed, run_check=False, shape=shape, stride=parameter.stride())
    return out


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(share: Tensor, whole: Tensor) -> Tensor:
    """This rank's `share` as part of a tensor that is cut as `whole` is; as it is where that is not cut."""
    if not isinstance(whole, DTensor):
        return share
    return DTensor.from_local(share, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def full(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; put together along one dimension of the mesh after the other, the last first."""
    if not isinstance(tensor, DTensor):
        return tensor
    for dim in reversed(range(1, tensor.device_mesh.ndim)):
        tensor = tensor.redistribute(placements=[*tensor.placements[:dim], *[Replicate()] * (tensor.device_mesh.ndim - dim)])
    return tensor.full_tensor()


def rows(tensor: Tensor) -> slice:
    """Which of its rows this rank holds: a share of a share, for each dimension of the mesh."""
    first, count = 0, len(tensor)
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_shard():  # over replicas
                continue
            each = -(-count // tensor.device_mesh.size(dim))
            before = min(tensor.device_mesh.get_local_rank(dim) * each, count)
            first, count = first + before, min(each, count - before)
    return slice(first, first + count)
