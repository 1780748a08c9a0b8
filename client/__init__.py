"""The client: H&E slides in, virtual stains out, through a Triton server.

The public names below are loaded on first use, so that the command line answers ``--help`` at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from staindiffuser.client.connection import StainClient as StainClient
    from staindiffuser.client.contract import ModelContract as ModelContract
    from staindiffuser.client.contract import Stainer as Stainer
    from staindiffuser.client.options import StainingOptions as StainingOptions
    from staindiffuser.client.staining import stain_slide as stain_slide
    from staindiffuser.imaging.slides import open_slide as open_slide

_HOME = {
    "StainClient": "connection",
    "ModelContract": "contract",
    "Stainer": "contract",
    "open_slide": "slides",
    "StainingOptions": "options",
    "stain_slide": "staining",
}
__all__ = ["ModelContract", "StainClient", "Stainer", "StainingOptions", "open_slide", "stain_slide"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
