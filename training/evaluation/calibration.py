"""The temperature of a stain's cell map: fitted on validation tiles, so that its 0.8 means that 80 % are positive.

The map's logit is divided by the temperature (Guo et al., ICML 2017): one half stays one half, so no cell appears or
disappears. A cell's probability is the mean of the map over its nucleus, found in the H&E, as in ``cell_scores``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from staindiffuser.errors import UsageError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.nuclei import label_means, nuclei_of_he
from staindiffuser.imaging.optical_density import he_densities
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.evaluation.cell_scores import calibration_error
from staindiffuser.training.evaluation.evaluate import check_data, evaluate_tiles
from staindiffuser.training.evaluation.record import save_again
from staindiffuser.training.model.network import tempered
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles, spread

__all__ = ["FEWEST", "Calibration", "CellValues", "calibrate"]

FEWEST = 50
"""Positive cells, and negative ones, below which a temperature is not fitted (ours)."""
_RANGE = 8.0
"""Temperatures from its inverse to it are searched."""
_SURE = 1e-3
"""Probabilities are kept so far from 0 and 1 in the likelihood: a single wrong label must not decide it."""


class CellValues:
    """What a cell map says over each nucleus, as a histogram: its calibrated mean is then a product."""

    def __init__(self) -> None:
        self._histograms: list[NDArray[np.float64]] = []
        self._truth: list[NDArray[np.float64]] = []

    def add(self, labels: NDArray[np.int32], cells_HW: UInt8Array, mask_HW: UInt8Array) -> None:
        """Add a tile: labelled nuclei, the cell map and the coarse mask that is the truth."""
        count = int(labels.max(initial=0))
        place = labels.ravel().astype(np.int64) * 256 + cells_HW.ravel()
        histograms = np.bincount(place, minlength=(count + 1) * 256).reshape(count + 1, 256)[1:].astype(np.float64)
        self._histograms.append(histograms / np.maximum(histograms.sum(axis=1, keepdims=True), 1))
        self._truth.append((label_means(labels, mask_HW >= 128) > 0.5).astype(np.float64))

    @property
    def truth(self) -> NDArray[np.float64]:
        """Whether each cell is positive, [N]."""
        return np.concatenate([np.zeros(0), *self._truth])

    def probabilities(self, temperature: float = 1.0) -> NDArray[np.float64]:
        """The probability of each cell at a temperature, [N]."""
        table = tempered(torch.arange(256, dtype=torch.float64) / 255, temperature).numpy()
        return np.concatenate([np.zeros(0), *(histograms @ table for histograms in self._histograms)])

    def temperature(self, before: float = 1.0) -> float:
        """The temperature of the largest likelihood; the one from before where there are fewer than :data:`FEWEST`
        cells of a kind."""
        truth = self.truth
        if min(truth.sum(), len(truth) - truth.sum()) < FEWEST:
            return before

        def loss(log_temperature: float) -> float:
            said = np.clip(self.probabilities(float(np.exp(log_temperature))), _SURE, 1 - _SURE)
            return -float(np.mean(truth * np.log(said) + (1 - truth) * np.log1p(-said)))

        limit = float(np.log(_RANGE))
        found = minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-3})
        return round(float(np.exp(found.x)), 3)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of one stain."""

    temperature: float
    cells: int
    positive_cells: int
    error_before: float
    """Expected calibration error at temperature 1."""
    error_after: float


def calibrate(
    folder: Path,
    tiles: PairedTiles,
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[str, Calibration]:
    """Fit the temperatures of a checkpoint's cell maps on validation tiles, and write them into the checkpoint.

    Args:
        folder: the checkpoint's.
        tiles: whose validation split is used.
        limit: at most this many tiles, evenly spread.
        seed: noise seed of the first tile.
        progress: called with the number of tiles done and the total.

    Returns:
        What was fitted, by stain.

    Raises:
        UsageError: there are no validation tiles of the model's stains.
        CheckpointError, DataError: something cannot be read, or the tiles do not fit the model.
    """
    checkpoint = Checkpoint.load(folder)
    check_data(tiles, checkpoint.config.model)
    stains = checkpoint.config.model.stain_names
    rows = tuple(row for row in tiles.split("val") if row.has_images(stains))
    if not rows:
        raise UsageError(f"{tiles.folder} has no validation tiles with an image of {', '.join(stains)}")
    rows = rows if limit is None else spread(rows, limit)
    network = checkpoint.network
    network.temperatures = {}
    values = {stain: CellValues() for stain in stains}
    done = 0

    def seen(row: PairedTile, data: dict[str, Any], result: dict[str, Any]) -> None:
        nonlocal done
        labels = nuclei_of_he(he_densities(data["he"])[..., 0], row.mpp)
        for stain, collected in values.items():
            collected.add(labels, result[f"CELLS_{stain.upper()}"][..., 0], data[f"{stain}_mask"])
        done += 1
        if progress is not None:
            progress(done, len(rows))

    sigmas = checkpoint.config.sigmas[str(checkpoint.config.steps)]
    evaluate_tiles(network, rows, sigmas=sigmas, seed=seed, seen=seen)
    before = checkpoint.config.temperatures
    found = {stain: _of(collected, before.get(stain, 1.0)) for stain, collected in values.items()}
    temperatures = {stain: one.temperature for stain, one in found.items() if one.temperature != 1}
    of_stains = {name: dataclasses.asdict(one) for name, one in found.items()}
    metrics = {**checkpoint.metrics, "calibration": {"split": "val", "tiles": len(rows), "stains": of_stains}}
    # A threshold was chosen on the map as it was: it stays only where the map does.
    same = {stain for stain, one in found.items() if one.temperature == before.get(stain, 1)}
    if chosen := metrics.pop("thresholds", None):
        left = _only(chosen["stains"], same)
        metrics |= {"thresholds": {**chosen, "stains": left}} if left else {}
    thresholds = _only(checkpoint.config.thresholds, same)
    config = dataclasses.replace(checkpoint.config, temperatures=temperatures, thresholds=thresholds)
    save_again(dataclasses.replace(checkpoint, config=config, metrics=metrics), folder)
    return found


def _only(of_stains: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {stain: value for stain, value in of_stains.items() if stain in names}


def _of(values: CellValues, before: float) -> Calibration:
    truth, temperature = values.truth, values.temperature(before)
    return Calibration(
        temperature=temperature,
        cells=len(truth),
        positive_cells=int(truth.sum()),
        error_before=calibration_error(truth, values.probabilities()),
        error_after=calibration_error(truth, values.probabilities(temperature)),
    )
