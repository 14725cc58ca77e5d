"""Several processes that train one model: each its rows of the batch, or also its share of weights.

Started by torchrun. `data`: every process holds the whole model, gradients are added up. `sharded`:
weights, gradients and optimizer state are split by rows (FSDP2) and gathered layer by layer, for a
checkpoint tensor by tensor.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from drawplate.core.errors import UserError

T = TypeVar("T")
Mode = Literal["data", "sharded"]
BUCKET = 1 << 24
"""Gradient entries added up in one message."""
PATIENCE = timedelta(days=1)
"""How long processes wait for one that is busy; one that is gone is noticed at once."""


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    mode: Mode = "data"

    @property
    def alone(self) -> bool:
        """True in a run of one process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """True in the process that writes what all of them made."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """True where each process holds a part of every weight."""
        return self.size > 1 and self.mode == "sharded"

    @property
    def factor(self) -> int:
        """What a loss has to be multiplied by: FSDP averages gradients, ours are to be added up."""
        return self.size if self.sharded else 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over all processes; equal on all of them, NaN and infinity included."""
        if self.alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, here: bool) -> bool:
        """True if it is true in one process."""
        return self.sum([float(here)])[0] > 0

    def share(self, count: int) -> range:
        """Which of `count` items are this process': a run of them, all runs about equally long."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, mine: Sequence[T]) -> list[T]:
        """The items of all processes in the order of their ranks; equal on all of them."""
        if self.alone:
            return list(mine)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, list(mine))
        return list(chain.from_iterable(found))

    def split(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Split the parameters of `module` over the processes, in place.

        Each layer of the longest list of layers is a unit, what remains is another. Parameters stay
        in 32 bits and are gathered in `dtype`.
        """
        mesh = init_device_mesh(device.type, (self.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
        for layer in max(lists, key=len, default=nn.ModuleList()):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up gradients over processes that hold whole models; FSDP does it by itself."""
        if self.alone or self.sharded:
            return
        wanted = [p for p in parameters if p.requires_grad]
        present = self.sum([float(p.grad is not None) for p in wanted])
        grads = []
        for parameter, count in zip(wanted, present, strict=True):
            if count:
                if parameter.grad is None:
                    kind = parameter.grad_dtype or parameter.dtype
                    parameter.grad = torch.zeros_like(parameter, dtype=kind)
                grads.append(parameter.grad)
        for bucket in _buckets(grads):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            parts = torch.split(flat, [g.numel() for g in bucket])
            for grad, total in zip(bucket, parts, strict=True):
                grad.copy_(total.view_as(grad))

    def norm(self, gradients: Sequence[Tensor]) -> float:
        """Root of the sum of squares of all entries; NaN or infinity if one entry is."""
        if not gradients:
            return 0.0
        parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in parts])
        square = float(norms.double().square().sum())
        return float((self.sum([square])[0] if self.sharded else square) ** 0.5)


ALONE = World()


@contextmanager
def join(mode: Mode = "data") -> Iterator[World]:
    """Take part in the run that torchrun started; without torchrun, a world of one.

    Raises:
        UserError: torchrun's variables are incomplete.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(mode=mode)
        return
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise UserError("WORLD_SIZE is set but RANK or MASTER_ADDR is not; start with torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), size, mode)
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` with every tensor whole and on the CPU, where all of them have to fit.

    All processes of a sharded run call it.
    """
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        for name, value in model.state_dict().items()
    }


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, up to `BUCKET` entries together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in bucket) + tensor.numel() > BUCKET
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
