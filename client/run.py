"""``run.json``: what was stained, by what, how, and how long each stage took."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import staindiffuser
from staindiffuser.client.contract import ModelContract

__all__ = ["FORMAT", "SYNTHETIC", "description", "model_record", "now", "versions"]

FORMAT = 1
SYNTHETIC = "Synthetic image, computed from H&E; research use only."
_LIBRARIES = (
    "imagecodecs",
    "numpy",
    "openslide-bin",
    "openslide-python",
    "pillow",
    "scikit-image",
    "scipy",
    "tifffile",
    "tritonclient",
)


def versions() -> dict[str, str]:
    """Of Python, this package and the libraries that touch the pixels."""
    found = {"staindiffuser": staindiffuser.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # OpenSlide may come from the system instead of its wheel
            found[name] = "not a package"
    return found


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def model_record(contract: ModelContract) -> dict[str, Any]:
    """What identifies the model."""
    return {
        "name": contract.model_name,
        "version": contract.model_version,
        "notice": contract.notice,
        "mpp": contract.mpp,
        "steps": contract.steps,
        "tile": contract.tile,
        "margin": contract.margin,
    }


def description(contract: ModelContract, seed: int, source: Path) -> str:
    """The text inside an image file that says what it is."""
    parts: Mapping[str, object] = {
        "model": f"{contract.model_name} {contract.model_version}",
        "steps": contract.steps,
        "seed": seed,
        "source": source.name,
        "software": f"StainDiffuser {staindiffuser.__version__}",
    }
    return " ".join([SYNTHETIC, contract.notice, *(f"{key}: {value};" for key, value in parts.items())])
