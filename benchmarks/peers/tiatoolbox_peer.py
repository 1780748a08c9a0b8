"""tiatoolbox: ``SemanticSegmentor``, whose classes are the channels of the images, written as Zarr."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from tiatoolbox.models import IOSegmentorConfig
from tiatoolbox.models.engine.semantic_segmentor import SemanticSegmentor
from tiatoolbox.models.models_abc import ModelABC


class Network(ModelABC):  # type: ignore[misc, unused-ignore]
    """TorchScript in tiatoolbox's protocol."""

    tiles = 0

    def __init__(self, path: str) -> None:
        super().__init__()
        self.network = torch.jit.load(path).eval()  # type: ignore[no-untyped-call]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """One batch."""
        found: torch.Tensor = self.network(image)
        return found

    @staticmethod
    def infer_batch(model: Any, batch_data: Any, *, device: str) -> Any:
        """[B, T, T, 3] in grey levels → [B, T, T, C]."""
        Network.tiles += len(batch_data)
        with torch.inference_mode():
            images = torch.as_tensor(batch_data).permute(0, 3, 1, 2).float() / 255
            return model(images).permute(0, 2, 3, 1).numpy()

    @staticmethod
    def postproc(image: Any) -> Any:
        """Channels are no classes to choose between: the first stands for a choice, which nobody reads."""
        return image[..., 0]


def main(slide: str, network: str, output: str, text: str) -> None:
    """Stain a slide."""
    settings = json.loads(text)
    resolution = [{"units": "mpp", "resolution": settings["mpp"]}]
    shape, stride = (settings["tile"],) * 2, (settings["stride"],) * 2
    engine = SemanticSegmentor(model=Network(network), batch_size=settings["batch"], device="cpu", verbose=False)
    engine.run(
        images=[slide],
        patch_mode=False,
        save_dir=f"{output}/result",
        output_type="zarr",
        auto_get_mask=True,
        return_probabilities=True,
        ioconfig=IOSegmentorConfig(
            input_resolutions=resolution,
            output_resolutions=resolution,
            patch_input_shape=shape,
            patch_output_shape=shape,
            stride_shape=stride,
            save_resolution=resolution[0],
        ),
    )
    sys.stdout.write("\n" + json.dumps({"tiles": Network.tiles}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
