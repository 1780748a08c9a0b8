"""StainDiffuser: virtual immunohistochemistry from H&E, for research use only.

Training (:mod:`staindiffuser.training`), export (:mod:`staindiffuser.export`), serving
(:mod:`staindiffuser.serving`) and the client (:mod:`staindiffuser.client`) are separate packages: the client and the
server never import torch. The names below are the client's, imported on first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from staindiffuser.client import StainClient as StainClient
    from staindiffuser.client import StainingOptions as StainingOptions
    from staindiffuser.client import stain_slide as stain_slide

__version__ = "0.1.0"
__all__ = ["StainClient", "StainingOptions", "__version__", "stain_slide"]


def __getattr__(name: str) -> Any:
    if name not in ("StainClient", "StainingOptions", "stain_slide"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("staindiffuser.client"), name)
