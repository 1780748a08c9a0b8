"""Step ``server``: the real Triton server with torch engines, if it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from staindiffuser.benchmarks.gpu.options import GpuOptions, StepResult, grey_levels

__all__ = ["run"]


def run(options: GpuOptions, result: StepResult) -> None:
    """Build a repository, serve it, and stain the golden samples over gRPC."""
    needed = {"pytriton": "nvidia-pytriton", "tritonclient": "'tritonclient[grpc]'", "pynvml": "nvidia-ml-py"}
    missing = [package for name, package in needed.items() if importlib.util.find_spec(name) is None]
    if missing:
        result.skipped = f"not installed: pip install {' '.join(missing)}"
        return
    result.attempt("serve", _serve, options, result)


def _serve(options: GpuOptions, result: StepResult) -> None:
    from staindiffuser.client import StainClient
    from staindiffuser.export.builders import BuildOptions
    from staindiffuser.export.parity import MAX_LEVELS, Golden
    from staindiffuser.export.repository import build
    from staindiffuser.serving.server import TritonServer

    batch = 8 if options.device == "cuda" else 2
    repository = options.output / "repository"
    build(options.graphs, repository, target="torch", options=BuildOptions(max_batch=batch))
    golden = Golden.load(options.graphs / "golden.npz")
    checks: dict[str, Any] = {}
    with TritonServer(repository, log=options.output / "triton.log") as server, StainClient(server.url) as client:
        for row in range(golden.samples):
            he, origins = golden.inputs["HE"][row : row + 1], golden.inputs["ORIGIN"][row : row + 1]
            found = client.stain_tiles(np.ascontiguousarray(he), origins, int(golden.inputs["SEED"][row, 0]))
            for name, array in found.items():
                check = grey_levels(array, golden.outputs[name][row : row + 1])
                worst = checks.setdefault(name, check.as_dict())
                checks[name] = max(worst, check.as_dict(), key=lambda c: c["max_levels"])
        result.data["executions"] = client.execution_counts()
    result.data["apart"] = checks
    far = [name for name, check in checks.items() if check["max_levels"] > MAX_LEVELS]
    if far or not checks:
        raise ValueError(f"the server's results are too far from the golden samples: {far}")
