"""Runs an engine with ONNX Runtime on the CPU: in the embedded server, and directly in parity checks and benchmarks.

Copied beside ``model.py`` into the model repository; imports nothing of the project.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

# Its official builds report to their maker over the network, from 1.32 on also on Linux, and keep an identifier of the
# machine in the home folder. What serves in a hospital does neither; only this, before the import, prevents both.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

if __package__:
    from staindiffuser.triton_models.shared.cpus import available_cpus
else:  # in a model repository, where the file lies beside this one
    from cpus import available_cpus  # type: ignore[no-redef]

__all__ = ["OnnxRuntimeEngine", "load", "session_options"]


def session_options(threads: int = 0) -> onnxruntime.SessionOptions:
    """The one set of session options that parity, benchmarks and the server share.

    Args:
        threads: threads inside an operator; 0 for as many as the process may use.
    """
    options = onnxruntime.SessionOptions()
    # An explicit number also keeps ONNX Runtime from pinning its threads: several engines share the cores.
    options.intra_op_num_threads = threads or available_cpus()
    options.inter_op_num_threads = 1
    # Idle threads that spin would take the cores from the other engines' processes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


class OnnxRuntimeEngine:
    """One ONNX graph in one session."""

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self._session: Any = onnxruntime.InferenceSession(
            os.fspath(path), session_options(threads), providers=["CPUExecutionProvider"]
        )

    def receive(self, tensor: Any) -> np.ndarray[Any, Any]:
        """Return a NumPy array unchanged."""
        return np.asarray(tensor)

    def join(self, arrays: list[Any]) -> np.ndarray[Any, Any]:
        """Concatenate arrays along the batch."""
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch of NumPy arrays, batch dimension first; returns the outputs named."""
        return dict(zip(outputs, self._session.run(outputs, inputs), strict=True))

    def close(self) -> None:
        """Free the session."""
        self._session = None


def load(path: Path, *, threads: int = 0, device: int = 0) -> OnnxRuntimeEngine:
    """Load an engine file; ``device`` belongs to the runners of GPU engines."""
    del device
    return OnnxRuntimeEngine(path, threads=threads)
