"""The processor and the GPU of this machine, without torch or CuPy."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from staindiffuser.export.builders.base import Device

__all__ = ["find_gpu", "processor"]


def processor() -> Device:
    """The CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return Device(kind="cpu", name=line.partition(":")[2].strip())
    except OSError:
        pass
    return Device(kind="cpu", name=platform.processor() or platform.machine())


def find_gpu(index: int = 0) -> Device | None:
    """The NVIDIA GPU that CUDA programs see as ``index``, as the driver's management library (NVML) describes it.

    ``CUDA_VISIBLE_DEVICES`` is respected. On a machine with different GPUs set ``CUDA_DEVICE_ORDER=PCI_BUS_ID``: NVML
    counts in that order, CUDA by default from the fastest.

    Returns:
        None where there is no such GPU, no driver, or no ``nvidia-ml-py``.
    """
    try:
        import pynvml
    except ImportError:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(index)] if visible is None else visible.split(",")[index : index + 1]
    if not numbers:
        return None
    number_or_uuid = numbers[0].strip()
    try:
        pynvml.nvmlInit()
        try:
            if number_or_uuid.isdecimal():
                gpu = pynvml.nvmlDeviceGetHandleByIndex(int(number_or_uuid))
            else:
                gpu = pynvml.nvmlDeviceGetHandleByUUID(number_or_uuid)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(gpu)
            return Device(kind="cuda", name=pynvml.nvmlDeviceGetName(gpu), compute_capability=f"{major}.{minor}")
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
