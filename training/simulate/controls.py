"""Controls of the simulator: is it hard enough to tell methods apart, and similar enough to real H&E?

(a) A random forest that sees patches of 7 x 7 colours must fail: what a cell carries must not follow from its colour.
(b) An oracle that knows everything but the undecidable cells gives the ceiling of what can be learned.
(c) Stain amounts and nuclei, measured the same way on real and simulated H&E, must agree.

Uses scikit-learn and scikit-image, which the simulator itself does not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.imaging.optical_density import HE_MATRIX, dab_mask, optical_density
from staindiffuser.parallel import process_pool
from staindiffuser.training.simulate.config import STAINS
from staindiffuser.training.simulate.render import Rule
from staindiffuser.training.simulate.tiles import simulate_tile

__all__ = [
    "FIELD",
    "MEASURES",
    "PooledDice",
    "RealField",
    "colour_forest",
    "measure",
    "oracle_ceiling",
    "real_fields",
    "simulated_fields",
    "throughput",
]

_PATCH = 7


@dataclass
class PooledDice:
    """Dice of binary masks, pooled over all pixels of a set."""

    both: int = 0
    either: int = 0
    """Pixels of the one plus pixels of the other."""

    def add(self, predicted: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> None:
        """Count one more pair of masks."""
        self.both += int(np.count_nonzero(predicted & true))
        self.either += int(np.count_nonzero(predicted)) + int(np.count_nonzero(true))

    @property
    def value(self) -> float:
        """Between 0 and 1; 1 for two empty sets."""
        return 2 * self.both / self.either if self.either else 1.0


def colour_forest(
    *,
    train: int = 240,
    val: int = 80,
    test: int = 120,
    per_tile: int = 400,
    trees: int = 80,
    jobs: int = 2,
    seed: int = 900,
) -> dict[str, float]:
    """Control (a): DAB-Dice, per stain, of a random forest on 7 x 7 colour patches of unseen slides.

    Its threshold is the best one on the validation tiles. Tiles are drawn three apart, so that most slides differ.

    Args:
        train: tiles to fit on.
        val: tiles to choose the threshold on.
        test: tiles to score.
        per_tile: pixels drawn from each.
        trees: of the forest.
        jobs: threads.
        seed: of the simulation; two further seeds follow for val and test.
    """
    from sklearn.ensemble import RandomForestClassifier

    sets = [_patches(seed + i, tiles, per_tile) for i, tiles in enumerate((train, val, test))]
    scores = {}
    for stain in STAINS:
        forest = RandomForestClassifier(
            trees, min_samples_leaf=3, class_weight="balanced_subsample", n_jobs=jobs, random_state=0
        )
        forest.fit(sets[0][0], sets[0][1][stain])
        chance = forest.predict_proba(sets[1][0])[:, 1]
        threshold = max(np.linspace(0.05, 0.95, 37), key=lambda t: _dice(chance >= t, sets[1][1][stain]))
        scores[stain] = _dice(forest.predict_proba(sets[2][0])[:, 1] >= threshold, sets[2][1][stain])
    return scores


def _dice(predicted: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    dice = PooledDice()
    dice.add(predicted, true)
    return dice.value


def _patches(seed: int, tiles: int, per_tile: int) -> tuple[UInt8Array, dict[str, npt.NDArray[np.bool_]]]:
    rng = np.random.default_rng(seed)
    patches, labels = [], {stain: [] for stain in STAINS}  # type: ignore[var-annotated]
    reach = _PATCH // 2
    for index in range(tiles):
        tile = simulate_tile(seed, 3 * index, masks=False)
        padded = np.pad(tile.he, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (_PATCH, _PATCH, 3))[:, :, 0]
        y, x = rng.integers(0, tile.he.shape[0], (2, per_tile))
        patches.append(windows[y, x].reshape(per_tile, -1))
        for stain in STAINS:
            labels[stain].append(dab_mask(tile.stains[stain])[y, x])
    return np.concatenate(patches), {stain: np.concatenate(values) for stain, values in labels.items()}


def oracle_ceiling(*, tiles: int = 200, seed: int = 910, rule: Rule = "context") -> dict[str, float]:
    """Control (b): DAB-Dice, per stain, of the oracle that knows everything but the undecidable cells.

    Args:
        tiles: how many to score.
        seed: of the simulation.
        rule: ``context`` is the oracle; ``lymphocytes`` knows everything but the neighbourhood rule and calls every
            lymphocyte a T cell: what a method gets that recognises cells but not where they lie.
    """
    dice = {stain: PooledDice() for stain in STAINS}
    for index in range(tiles):
        tile = simulate_tile(seed, 3 * index, masks=False, oracle=rule)
        for stain in STAINS:
            dice[stain].add(dab_mask(tile.oracle[stain]), dab_mask(tile.stains[stain]))
    return {stain: pooled.value for stain, pooled in dice.items()}


# --- (c) real and simulated H&E, measured the same way -------------------------------------------------------------

FIELD = 144
"""Edge of a field that is measured, pixels of 0.5 µm: the smallest real tile gives one."""
_HE_UNMIX = np.linalg.inv(HE_MATRIX).astype(np.float32)
_SMALLEST_NUCLEUS = 24
"""Area from which an object counts as a nucleus, pixels (6 µm²)."""

MEASURES: Mapping[str, str] = {
    "hematoxylin_mean": "hematoxylin, mean OD",
    "hematoxylin_sd": "hematoxylin, deviation of OD",
    "eosin_mean": "eosin, mean OD",
    "eosin_sd": "eosin, deviation of OD",
    "nuclei_per_mm2": "nuclei per mm² of tissue",
    "nuclear_area": "median nuclear area, µm²",
}
"""What is measured of a field, and what the chart calls it."""


@dataclass(frozen=True)
class RealField:
    """A piece of real H&E, 144 x 144 pixels of 0.5 µm."""

    source: str
    image: UInt8Array


def measure(image: UInt8Array) -> dict[str, float] | None:
    """Stain amounts over the tissue, and nuclei, of uint8 [H, W, 3] at 0.5 µm; None where there is little tissue.

    Stains are taken apart with Ruifrok's vectors of hematoxylin and eosin; nuclei are Otsu's threshold on smoothed
    hematoxylin, split by a watershed on the distance to their edge.
    """
    from skimage.feature import peak_local_max
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed

    density = optical_density(image)
    tissue = ndimage.gaussian_filter(density.mean(axis=-1), 2.0) > 0.06
    if tissue.mean() < 0.35:
        return None
    amounts = density @ _HE_UNMIX
    hematoxylin, eosin = amounts[..., 0], amounts[..., 1]
    smooth = ndimage.gaussian_filter(hematoxylin, 1.0)
    threshold = max(float(threshold_otsu(smooth[tissue])), 0.1)
    nuclei = ndimage.binary_opening(ndimage.binary_fill_holes((smooth > threshold) & tissue))
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(nuclei).astype(np.float32), 0.7)
    peaks = peak_local_max(distance, min_distance=4, labels=ndimage.label(nuclei)[0], exclude_border=False)
    markers = np.zeros(nuclei.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-distance, markers, mask=nuclei)
    areas = np.bincount(labels.ravel())[1:]
    areas = areas[areas >= _SMALLEST_NUCLEUS]
    if len(areas) < 4:
        return None
    return {
        "hematoxylin_mean": float(hematoxylin[tissue].mean()),
        "hematoxylin_sd": float(hematoxylin[tissue].std()),
        "eosin_mean": float(eosin[tissue].mean()),
        "eosin_sd": float(eosin[tissue].std()),
        "nuclei_per_mm2": float(len(areas) / (tissue.sum() * 0.25e-6)),
        "nuclear_area": float(np.median(areas) * 0.25),
    }


def real_fields(folder: Path, *, per_source: int = 24) -> list[RealField]:
    """Fields of the real H&E in the folder of test data, evenly spread, at most ``per_source`` of each source.

    Images that state no pixel size are taken to have 0.5 µm; the Orion tiles have 0.325 µm.
    """
    sources: list[tuple[str, Callable[[], Iterable[UInt8Array]]]] = [
        ("CMU-1 skin", lambda: [_slide(folder / "slides/CMU-1-Small-Region.svs")]),
        ("TCGA head and neck", lambda: [_slide(folder / "slides/tcga-cr-7395-01a-01-ts1.svs")]),
        ("OS-1", lambda: [_resized(_tiff(folder / "crops/OS-1-detail.ome.tif"), 0.2271 / 0.5)]),
        (
            "TCGA crops",
            lambda: [
                read_image(folder / "crops/medium-nuclei-score-level1.png"),
                read_image(folder / "crops/high-nuclei-score-red-pen-level1.png"),
            ],
        ),
        (
            "Orion colorectal",
            lambda: (_resized(_tiff(file), 0.65) for file in sorted((folder / "orion-crc-he-tiles").glob("*/*.tif"))),
        ),
    ]
    fields = []
    for source, images in sources:
        found = [piece for image in images() for piece in _pieces(image)]
        chosen = np.linspace(0, len(found) - 1, min(per_source, len(found))).round().astype(int)
        fields += [RealField(source, found[i]) for i in chosen]
    return fields


def throughput(*, tiles: int = 200, processes: int = 2) -> dict[str, float]:
    """Tiles of 256 px per second, processor's milliseconds per tile, and the machine's load before.

    Both IHCs and their coarse masks are included.
    """
    load = os.getloadavg()[0]
    with process_pool(processes) as pool:
        list(pool.map(_timed, range(8 * processes)))
        begun = time.perf_counter()
        spent = sum(pool.map(_timed, range(1000, 1000 + tiles), chunksize=4))
        elapsed = time.perf_counter() - begun
    return {
        "tiles_per_second": round(tiles / elapsed, 1),
        "processor_ms_per_tile": round(1e3 * spent / tiles, 1),
        "load": round(load, 1),
    }


def _timed(index: int) -> float:
    begun = time.process_time()
    simulate_tile(0, index)
    return time.process_time() - begun


def simulated_fields(count: int, *, seed: int = 920) -> list[UInt8Array]:
    """Fields of simulated H&E that hold tissue, from as many tiles, most of different slides."""
    found: list[UInt8Array] = []
    index = 0
    while len(found) < count:
        image = simulate_tile(seed, 3 * index, masks=False, stains=()).he
        index += 1
        found += _pieces(image)[:1]
    return found


def _pieces(image: UInt8Array) -> Sequence[UInt8Array]:
    h, w = image.shape[:2]
    pieces = [
        image[y : y + FIELD, x : x + FIELD]
        for y in range(0, h - FIELD + 1, FIELD)
        for x in range(0, w - FIELD + 1, FIELD)
    ]
    return [piece for piece in pieces if (piece.mean(axis=-1) < 225).mean() > 0.4]


def _slide(path: Path) -> UInt8Array:
    import openslide

    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def _tiff(path: Path) -> UInt8Array:
    import tifffile

    return np.asarray(tifffile.imread(path)).astype(np.uint8)


def _resized(image: UInt8Array, factor: float) -> UInt8Array:
    height, width = image.shape[:2]
    size = (round(width * factor), round(height * factor))
    resample = Image.Resampling.BOX if factor < 0.5 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize(size, resample))
