"""The same engines behind what a user would pick instead of Triton, one module each.

``python -m staindiffuser.benchmarks.rivals.<module> REPOSITORY THREADS PORT`` serves until it gets SIGTERM. Every
module takes a request's bytes, computes noise, encoder and every branch for it, and answers with all outputs.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

__all__ = ["RIVALS", "Rival"]


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A server to compare with."""

    name: str
    module: str
    """In this package."""
    package: str
    """What it needs to be imported."""
    install: str
    """Of pip."""
    grpc: bool = False
    """It speaks Triton's protocol; the others take ``POST /`` with raw bytes."""

    @property
    def absent(self) -> str:
        """Why it cannot be started here; empty if it can."""
        if importlib.util.find_spec(self.package) is None:
            return f"not installed: pip install {self.install}"
        return ""


RIVALS = (
    Rival(name="FastAPI + uvicorn", module="fastapi_server", package="fastapi", install="fastapi uvicorn"),
    Rival(name="LitServe", module="litserve_server", package="litserve", install="litserve"),
    Rival(name="BentoML", module="bentoml_server", package="bentoml", install="bentoml"),
    Rival(name="Ray Serve", module="ray_server", package="ray", install="'ray[serve]'"),
    Rival(
        name="PyTriton @batch",
        module="pytriton_server",
        package="pytriton",
        install="'staindiffuser[serve]'",
        grpc=True,
    ),
)
