"""Targets that engines are built for: one file each, found by name."""

from __future__ import annotations

import importlib
from typing import cast

from staindiffuser.export.builders.base import Builder, BuildOptions, Device, Engine, Profile, engine_key
from staindiffuser.export.errors import ExportUsageError

__all__ = ["TARGETS", "BuildOptions", "Builder", "Device", "Engine", "Profile", "engine_key", "get"]

TARGETS = {
    "onnxruntime": "OnnxRuntimeBuilder",
    "openvino": "OpenVINOBuilder",
    "tensorrt": "TensorRTBuilder",
    "tensorrt-rtx": "TensorRTRtxBuilder",
    "torch": "TorchBuilder",
}
"""Target to its builder's class, in the module of this package named like the target."""


def get(target: str) -> Builder:
    """The builder of a target; its module is imported only now.

    Raises:
        ExportUsageError: there is no such target.
    """
    if target not in TARGETS:
        raise ExportUsageError(f"unknown target {target!r}: choose {', '.join(TARGETS)}")
    module = importlib.import_module(f"{__name__}.{target.replace('-', '_')}")
    return cast(Builder, getattr(module, TARGETS[target])())
