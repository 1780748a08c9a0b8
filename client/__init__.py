"""The client: stains whole H&E slides and single tiles through a Triton server.

Public names are imported on first use (PEP 562), so that the command line starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from staindiffuser.client.connection import StainClient as StainClient
    from staindiffuser.client.contract import ModelContract as ModelContract
    from staindiffuser.client.contract import Stainer as Stainer
    from staindiffuser.client.lazyslide import LazySlideModel as LazySlideModel
    from staindiffuser.client.options import StainingOptions as StainingOptions
    from staindiffuser.client.run_record import RunRecord as RunRecord
    from staindiffuser.client.run_record import read_run as read_run
    from staindiffuser.client.staining import stain_slide as stain_slide
    from staindiffuser.client.target import Target as Target
    from staindiffuser.imaging.slides import open_slide as open_slide

_MODULES = {
    "LazySlideModel": "staindiffuser.client.lazyslide",
    "ModelContract": "staindiffuser.client.contract",
    "RunRecord": "staindiffuser.client.run_record",
    "StainClient": "staindiffuser.client.connection",
    "Stainer": "staindiffuser.client.contract",
    "StainingOptions": "staindiffuser.client.options",
    "Target": "staindiffuser.client.target",
    "open_slide": "staindiffuser.imaging.slides",
    "read_run": "staindiffuser.client.run_record",
    "stain_slide": "staindiffuser.client.staining",
}
__all__ = [
    "LazySlideModel",
    "ModelContract",
    "RunRecord",
    "StainClient",
    "Stainer",
    "StainingOptions",
    "Target",
    "open_slide",
    "read_run",
    "stain_slide",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
