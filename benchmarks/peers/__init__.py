"""Other programs that run a network over a slide, one script each.

Every script runs in the Python that has the program, which need not have this package:
``python SCRIPT SLIDE NETWORK OUTPUT SETTINGS``. ``NETWORK`` is TorchScript: float32 [B, 3, T, T] in 0 to 1 →
[B, 3 (S + 1), T, T] in 0 to 1, the images of S stains and a last one of their cell maps. ``SETTINGS`` is JSON: tile,
stride, mpp, batch, stains. A script prints one line of JSON: the tiles that it ran.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PEERS", "Peer"]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A program to compare with."""

    name: str
    script: str
    """File in this folder."""
    image: bool
    """It writes an image of the slide."""
    leaves_out: str
    """What ours writes and it does not."""


PEERS = (
    Peer(
        name="LazySlide",
        script="lazyslide_peer.py",
        image=True,
        leaves_out="no pyramid, float32 in Zarr (SpatialData); no cells",
    ),
    Peer(
        name="tiatoolbox",
        script="tiatoolbox_peer.py",
        image=True,
        leaves_out="no pyramid, float32 in Zarr, taken for probabilities of classes; no cells",
    ),
    Peer(
        name="WSInfer",
        script="wsinfer_peer.py",
        image=False,
        leaves_out="no image at all: a number a class and tile, as CSV",
    ),
)
