"""The processes of a run: one, or those that torchrun started (torch.distributed: DDP or FSDP2)."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Processes", "StrategyName", "rank", "world_size"]

StrategyName = Literal["ddp", "fsdp"]


def world_size() -> int:
    """How many processes torchrun started, on all machines; one without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """This process's number among them; the first writes the files."""
    return int(os.environ.get("RANK", "0")) if dist.is_torchelastic_launched() else 0


@dataclass(frozen=True, kw_only=True)
class Processes:
    """What this process needs to know of the others."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls) -> Processes:
        """Meet the other processes, once per program, and choose this one's device."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if world_size() > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        return cls(rank=rank(), world=world_size(), device=device)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the files."""
        return self.rank == 0

    @property
    def mesh(self) -> DeviceMesh:
        """All processes in a row, for FSDP2."""
        return init_device_mesh(self.device.type, (self.world,))

    def distribute(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the processes (DDP); the module itself if there is one process."""
        if self.world == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        # The buffers are constants.
        return DistributedDataParallel(module, device_ids=devices, forward_sync_buffers=False)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must ask at the same point."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value


@contextlib.contextmanager
def gradients_kept(module: nn.Module) -> Iterator[None]:
    """Accumulate gradients in this process without averaging them over the others yet."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield
