"""Fields of other laboratories with rough masks, drawn by hand over what is unmistakable.

They judge a model on tissue that no training saw. Nothing is chosen by them. To see a checkpoint's numbers:
``python -m tests.rough_masks CHECKPOINT DATA``, DATA being the folder that ``STAINDIFFUSER_TEST_DATA`` names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import openslide
import tifffile

from staindiffuser.imaging.arrays import BoolArray, UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.imaging.instances import HALF, lowest_grey
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.infer import stain_tiles

__all__ = ["REGIONS", "Region", "cell_values", "positive_share"]

Points = str
"""Corners of a polygon, ``x,y x,y …``."""
MPP = 0.5
ORION = "orion-crc-he-tiles"
"""Its tiles stand in the order of their paths."""
EVERYTHING = "0,0 9999,0 9999,9999 0,9999"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A rectangle of an image."""

    file: str
    """In the data folder; of ORION the number of the tile."""
    mpp: float
    """Pixel size, µm: of the TCGA files by the size of their nuclei, since they do not say."""
    window: tuple[int, int, int, int]
    """Left, top, width and height, in the image's pixels."""
    polygons: tuple[Points, ...] = (EVERYTHING,)
    """What is meant, in pixels of 0.5 µm if ``fine``, else the image's."""
    fine: bool = False

    def read(self, data: Path) -> tuple[UInt8Array, BoolArray]:
        """The H&E at 0.5 µm, uint8 [H, W, 3], and its mask [H, W]; sides are multiples of 16."""
        left, top, width, height = self.window
        path = data / self.file
        if self.file.startswith(ORION):
            path = sorted((data / ORION).glob("topic*/*"))[int(self.file.removeprefix(f"{ORION}/"))]
        if path.suffix == ".svs":
            with openslide.OpenSlide(path) as slide:
                image = np.asarray(slide.read_region((left, top), 0, (width, height)).convert("RGB"))
        else:
            image = tifffile.imread(path) if path.suffix == ".tif" else read_image(path)
            image = image[top : top + height, left : left + width]
        mask = np.zeros(image.shape[:2], np.uint8)
        scale = self.mpp / MPP
        for points in self.polygons:
            corners = np.array([point.split(",") for point in points.split()], np.float64)
            corners = corners / scale if self.fine else corners
            cv2.fillPoly(mask, [np.rint(corners - (left, top)).astype(np.int32)], (1.0,))
        size = (round(image.shape[1] * scale) // 16 * 16, round(image.shape[0] * scale) // 16 * 16)
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        he = np.asarray(cv2.resize(image, size, interpolation=way), np.uint8)
        return he, np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) > 0)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A kind of tissue, in one or several fields."""

    name: str
    fields: tuple[Field, ...]
    unmarked: bool = False
    """No stain marks anything here."""


def _os1(*polygons: Points) -> tuple[Field, ...]:
    file = "crops/OS-1-detail.ome.tif"
    return (Field(file=file, mpp=0.2271, window=(0, 0, 1101, 1101), polygons=polygons, fine=True),)


def _cmu(window: tuple[int, int, int, int], *polygons: Points) -> Field:
    return Field(file="slides/CMU-1-Small-Region.svs", mpp=0.499, window=window, polygons=polygons or (EVERYTHING,))


def _tcga(window: tuple[int, int, int, int], *polygons: Points) -> Field:
    return Field(file="slides/tcga-cr-7395-01a-01-ts1.svs", mpp=1.0, window=window, polygons=polygons)


def _orion(number: int, *polygons: Points) -> Field:
    return Field(file=f"{ORION}/{number}", mpp=0.325, window=(0, 0, 224, 224), polygons=polygons or (EVERYTHING,))


def _pen(*polygons: Points) -> Field:
    return Field(file="crops/high-nuclei-score-red-pen-level1.png", mpp=1.0, window=(0, 0, 512, 512), polygons=polygons)


REGIONS = (
    Region(
        name="breast carcinoma, tumour nests (OS-1)",
        fields=_os1(
            "165,190 200,130 225,105 235,150 225,200 205,235 165,215",
            "252,262 285,255 320,290 340,315 330,330 285,315 258,290",
            "405,265 480,255 490,280 470,315 430,320 405,300",
            "105,430 135,425 150,450 145,499 105,499",
            "0,425 40,422 52,460 45,495 0,495",
            "450,375 498,370 498,420 455,425",
        ),
    ),
    Region(
        name="skin, epidermis (CMU-1)",
        fields=(
            _cmu(
                (1080, 1700, 320, 672),
                "1110,1720 1190,1720 1230,1860 1220,1960 1185,2050 1185,2160 1240,2210 1330,2200 1290,2340 1200,2350 "
                "1110,2250",
            ),
            _cmu(
                (580, 2560, 256, 400),
                "610,2700 690,2620 790,2600 800,2720 700,2800 690,2940 600,2940",
            ),
        ),
    ),
    Region(
        name="squamous carcinoma, tumour (TCGA)",
        fields=(
            _tcga((2600, 2500, 208, 240), "2610,2510 2780,2510 2780,2680 2700,2720 2620,2700"),
            _tcga((3104, 2540, 384, 264), "3150,2700 3480,2560 3480,2790 3120,2790"),
        ),
    ),
    Region(
        name="the same slide, dense inflammation",
        fields=(
            _tcga(
                (1000, 2500, 440, 504),
                "1010,2520 1220,2520 1220,2700 1330,2800 1420,2900 1400,2980 1180,2970 1060,2820",
            ),
        ),
    ),
    Region(
        name="colon, glands (ORION)",
        fields=(
            _orion(
                28,
                "0,15 45,30 55,100 90,115 130,85 180,85 223,60 223,90 150,105 110,130 70,130 30,90 0,60",
                "65,223 60,215 75,160 110,145 150,130 223,110 223,150 190,145 150,165 110,165 90,200 80,223",
            ),
            _orion(3, "150,0 223,0 223,170 190,170 165,100 150,50"),
        ),
    ),
    Region(name="smooth muscle (ORION)", unmarked=True, fields=tuple(_orion(n) for n in (34, 35, 36, 38))),
    Region(
        name="blood (ORION)",
        unmarked=True,
        fields=(
            _orion(26, "0,0 223,0 223,75 90,115 0,105"),
            _orion(12, "150,155 223,140 223,223 150,223"),
        ),
    ),
    Region(
        name="mucin (ORION)",
        unmarked=True,
        fields=(
            _orion(1, "0,110 110,110 110,223 0,223"),
            _orion(3, "0,110 130,110 130,223 0,223"),
        ),
    ),
    Region(name="red pen (TCGA)", unmarked=True, fields=(_pen("210,0 290,0 300,180 280,250 230,150"),)),
    Region(
        name="dark fold under the pen",
        fields=(_pen("0,235 250,270 500,345 500,385 250,300 0,260"),),
    ),
    Region(name="glass (CMU-1)", unmarked=True, fields=(_cmu((100, 1900, 512, 512)),)),
)


def cell_values(checkpoint: Checkpoint, region: Region, data: Path) -> Mapping[str, UInt8Array]:
    """Per stain what the cell map says of a region's pixels."""
    sigmas = checkpoint.config.sigmas[str(checkpoint.config.steps)]
    found: dict[str, list[UInt8Array]] = {stain: [] for stain in checkpoint.config.model.stain_names}
    for field in region.fields:
        he, mask = field.read(data)
        seeds, origins = np.zeros((1, 1), np.int64), np.zeros((1, 2), np.int64)
        results = stain_tiles(checkpoint.network, he[None], sigmas=sigmas, seeds=seeds, origins=origins)
        for stain, values in found.items():
            values.append(results[f"CELLS_{stain.upper()}"][0, ..., 0][mask])
    return {stain: np.concatenate(values) for stain, values in found.items()}


def positive_share(values: UInt8Array, threshold: float) -> float:
    """Share of the pixels that the cell map calls positive."""
    return float((values >= lowest_grey(threshold)).mean())


def main() -> None:
    """Print the numbers of a checkpoint: at its thresholds, and at one half."""
    checkpoint, data = Checkpoint.load(Path(sys.argv[1])), Path(sys.argv[2])
    for region in REGIONS:
        parts = []
        for stain, values in cell_values(checkpoint, region, data).items():
            shares = [positive_share(values, t) for t in (checkpoint.config.thresholds.get(stain, HALF), HALF)]
            parts.append(f"{stain} {shares[0]:.1%} ({shares[1]:.1%})")
        print(f"{region.name}: {', '.join(parts)}")


if __name__ == "__main__":
    main()
