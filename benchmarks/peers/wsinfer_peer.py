"""WSInfer: a classifier of patches, so the network's images are averaged to a number a channel. It writes CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ["WSINFER_FORCE_CPU"] = "1"
import torch
from wsinfer.modellib.run_inference import run_inference
from wsinfer.patchlib import segment_and_patch_one_slide


class Averaged(torch.nn.Module):
    """The network's images as one number a channel, as a classifier gives it."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, T, T] → [B, C]."""
        means: torch.Tensor = self.network(image).mean(dim=(2, 3))
        return means


@dataclasses.dataclass
class Transform:
    """One of WSInfer's transforms."""

    name: str
    arguments: dict[str, Any] | None = None


@dataclasses.dataclass
class Config:
    """What ``run_inference`` reads of a model's configuration."""

    class_names: list[str]
    transform: list[Transform]


@dataclasses.dataclass
class Model:
    """A model on disk."""

    model_path: str
    config: Config


def main(slide: str, network: str, output: str, text: str) -> None:
    """Run over a slide."""
    settings = json.loads(text)
    slides, results = Path(output, "slides"), Path(output, "results")
    slides.mkdir(parents=True)
    results.mkdir()
    copied = shutil.copy(slide, slides)
    overlap = 1 - settings["stride"] / settings["tile"]
    # Of a whole folder, it would log what went wrong with a slide, and go on without patches.
    segment_and_patch_one_slide(copied, results, settings["tile"], settings["mpp"], overlap=overlap)
    loaded: Any = torch.jit.load(network)  # type: ignore[no-untyped-call]
    averaged: Any = torch.jit.script(Averaged(loaded.eval()))
    averaged.save(f"{output}/averaged.pt")
    names = [f"{stain}_{channel}" for stain in (*settings["stains"], "cells") for channel in "rgb"]
    model = Model(f"{output}/averaged.pt", Config(names, [Transform("ToTensor")]))
    run_inference(slides, results, model, batch_size=settings["batch"])  # type: ignore[arg-type, unused-ignore]
    (table,) = (results / "model-outputs-csv").glob("*.csv")
    with table.open(encoding="utf-8") as file:
        tiles = sum(1 for _ in csv.DictReader(file))
    sys.stdout.write("\n" + json.dumps({"tiles": tiles}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
