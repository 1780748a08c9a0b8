"""The processor and the GPU of this machine, asked without torch or CuPy."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

from staindiffuser.export.builders.base import Device

__all__ = ["find_gpu", "processor"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


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
    """An NVIDIA GPU by the driver's own library, or None where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    if failed:
        return None
    return Device(kind="cuda", name=name.value.decode(), compute_capability=f"{major.value}.{minor.value}")
