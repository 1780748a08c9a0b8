"""The processes of a run: one, or those that torchrun started (torch.distributed: DDP or FSDP2)."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

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
            # Validation is in float32, as evaluation and the engines' golden samples are; training is in bfloat16.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        if world_size() > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        return cls(rank=rank(), world=world_size(), device=device)

    @property
    def computes_bf16(self) -> bool:
        """Whether the device has instructions for bfloat16; emulated, it is many times slower than float32."""
        if self.device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        has = torch.cpu.get_capabilities()
        return bool(has["architecture"] != "x86_64" or has["avx512_bf16"] or has["amx_bf16"])

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
        # The buffers are constants. Torch 2.12 renamed the argument.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        unsent: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return DistributedDataParallel(module, device_ids=devices, **unsent)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must ask at the same point."""
        if self.world == 1:
            return flag
        return self.smallest(0 if flag else 1) == 0

    def smallest(self, value: int) -> int:
        """The smallest value of all processes; all must ask at the same point."""
        if self.world == 1:
            return value
        # A CPU tensor travels by gloo: reading it does not wait for the GPU.
        values = torch.tensor(value)
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return int(values)

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
