"""LazySlide: ``tl.virtual_stain`` with the network as a model of its own kind, written as SpatialData."""

from __future__ import annotations

import json
import sys
from typing import Any

import lazyslide
import torch
from lazyslide_models.base import VirtualStainModel
from torchvision.transforms import v2
from wsidata import open_wsi


class Network(VirtualStainModel):  # type: ignore[misc, unused-ignore]
    """TorchScript in LazySlide's protocol."""

    name = "network"
    output_range = (0.0, 1.0)

    def __init__(self, path: str, stains: tuple[str, ...]) -> None:
        self.model = torch.jit.load(path).eval()  # type: ignore[no-untyped-call]
        self.stains = stains

    def get_transform(self) -> Any:
        """uint8 to 0..1, and nothing else."""
        return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def predict(self, image: torch.Tensor) -> torch.Tensor:
        """One batch."""
        found: torch.Tensor = self.model(image)
        return found


def main(slide: str, network: str, output: str, text: str) -> None:
    """Stain a slide."""
    settings = json.loads(text)
    wsi = open_wsi(slide, store=f"{output}/slide.zarr")
    lazyslide.pp.find_tissues(wsi)
    # By default it leaves out tiles of which less than 70 % are tissue: the tissue at the edges would stay unstained.
    lazyslide.pp.tile_tissues(
        wsi, settings["tile"], stride_px=settings["stride"], mpp=settings["mpp"], edge=True, background_filter=False
    )
    model = Network(network, (*settings["stains"], "cells"))
    lazyslide.tl.virtual_stain(wsi, model, device="cpu", batch_size=settings["batch"], pbar=False)
    wsi.write()
    sys.stdout.write("\n" + json.dumps({"tiles": len(wsi.shapes["tiles"])}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
