"""The parity gate before publishing: engines, run without torch, against golden samples from float32 torch.

The whole pipeline is run as the server runs it (noise from seed and origin, encoder, branches), at each corner of the
batch profiles. The comparison is in grey levels, which are what a user gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic.dataclasses import dataclass

from staindiffuser.export.builders.base import Engine
from staindiffuser.export.description import QUALITY, GraphSet, TensorSpec
from staindiffuser.export.errors import GraphsError, ParityError
from staindiffuser.records import STRICT
from staindiffuser.triton_models.noise import philox

__all__ = [
    "LIMITS",
    "MAX_LEVELS",
    "MAX_QUALITY",
    "MAX_SHARE_OVER_ONE",
    "EngineParity",
    "EngineRun",
    "Golden",
    "Limits",
    "check_parity",
    "engine_runs",
    "run_pipeline",
]

MAX_LEVELS = 2
"""Largest difference anywhere, grey levels; of reduced precisions see :data:`LIMITS`."""
MAX_SHARE_OVER_ONE = 0.001
"""Largest share of values that differ by more than one grey level."""
MAX_QUALITY = 0.05
"""Largest difference of a measure of quality, as a share of its value, of 1 if that is more (ours)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How far engines may be from torch in float32."""

    levels: int = MAX_LEVELS
    """Largest difference anywhere, grey levels."""
    over_one: float = MAX_SHARE_OVER_ONE
    """Largest share of values that differ by more than one grey level."""
    quality: float = MAX_QUALITY
    """As :data:`MAX_QUALITY`."""
    dab_dice: float | None = None
    """Smallest Dice of a stain's DAB-positive area with torch's; None: not asked."""


EXACT = Limits()
LIMITS = {
    "bf16": Limits(levels=8, over_one=0.05, quality=0.2, dab_dice=0.995),
    "int8": Limits(levels=64, over_one=0.15, quality=0.2, dab_dice=0.95),
}
"""Of reduced precisions (ours); all others are :data:`EXACT`. bfloat16 has eight bits.

In 8 bits, a golden sample of random pixels and saturated squares leaves the calibrated ranges. There only gross errors
are refused; whether the images are good enough on tissue was decided when the copies were made
(:mod:`staindiffuser.export.int8`: a DAB-Dice within 0.005 of float32's).
"""

Arrays = Mapping[str, np.ndarray[Any, Any]]


class HasTensors(Protocol):
    """The part of an engine's description that running it needs."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineParity:
    """One engine's worst values over all samples at one batch size; for the encoder only ``max_feature``."""

    batch: int
    samples: int
    max_levels: int = 0
    """Largest difference, grey levels."""
    share_over_one: float = 0.0
    """Share of values that differ by more than one grey level."""
    mean_levels: float = 0.0
    """Mean absolute difference, grey levels."""
    dab_dice: float | None = None
    """Dice of the DAB-positive area with torch's, over all samples; only of a stain's image in a reduced precision."""
    max_feature: float = 0.0
    """Largest absolute value of the encoder's features (half precision overflows at 65,504)."""
    max_quality: float = 0.0
    """Largest difference of a measure of quality, as in :data:`MAX_QUALITY`; of the engines that judge only."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """``golden.npz``: N tiles, their seeds and origins, and every output as computed by float32 torch."""

    inputs: Arrays
    """``HE`` uint8 [N, T, T, 3], ``ORIGIN`` int64 [N, 2], ``SEED`` int64 [N, 1]."""
    outputs: Arrays
    """``STAIN_<NAME>`` uint8 [N, T, T, 3], ``CELLS_<NAME>`` uint8 [N, T, T, 1], ``QUALITY…`` float32 [N, M]."""

    @property
    def samples(self) -> int:
        """N."""
        return len(self.inputs["HE"])

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read the file without pickle.

        Raises:
            GraphsError: it is unreadable or lacks an input.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            inputs = {name: arrays.pop(name) for name in ("HE", "ORIGIN", "SEED")}
        except (OSError, ValueError, KeyError) as error:
            raise GraphsError(f"{path} holds no golden samples: {error}; export the graphs again") from error
        if len(inputs["HE"]) == 0:
            raise GraphsError(f"{path} holds no golden samples: export the graphs again")
        outputs = ("STAIN_", "CELLS_", "QUALITY")
        return cls(inputs, {name: array for name, array in arrays.items() if name.startswith(outputs)})


@dataclasses.dataclass(frozen=True)
class EngineRun:
    """One engine, and the tensors that it reads and gives."""

    engine: Engine
    names: list[str]
    """Of the graphs that it computes: more than one where graphs are joined."""
    inputs: list[str]
    outputs: list[str]


def engine_runs(engines: Mapping[str, Engine], graphs: Mapping[str, HasTensors]) -> list[EngineRun]:
    """Every engine once, in order; one that stands under several names computes all of these graphs."""
    runs = []
    for engine in dict.fromkeys(engines.values()):
        names = [name for name, other in engines.items() if other is engine]
        outputs = [tensor.name for name in names for tensor in graphs[name].outputs]
        read = dict.fromkeys(tensor.name for name in names for tensor in graphs[name].inputs)
        runs.append(EngineRun(engine, names, [name for name in read if name not in outputs], outputs))
    return runs


def run_pipeline(
    engines: Mapping[str, Engine], graphs: Mapping[str, HasTensors], *, steps: int, tile: int, inputs: Arrays
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    """Compute in this process what the server's ensemble computes for one batch.

    Args:
        engines: by name, ``he_encoder``, the branches to run, and after them the engines that judge their outputs. One
            that stands under several names computes all of these graphs at once.
        graphs: their descriptions, by the same names.
        steps, tile: sampler steps k and tile size, pixels.
        inputs: ``HE``, ``ORIGIN``, ``SEED`` of one batch.

    Returns:
        The features and the other engines' outputs, by tensor name.
    """
    tensors = {"HE": inputs["HE"]}
    runs = engine_runs(engines, graphs)
    if any(name.startswith("NOISE") for run in runs for name in run.inputs):  # of one step, nothing may read it
        image, cells = philox.tile_noise(inputs["SEED"], inputs["ORIGIN"], steps=steps, height=tile, width=tile)
        tensors |= {"NOISE": image, "NOISE_CELLS": cells}
    computed: dict[str, np.ndarray[Any, Any]] = {}
    for run in runs:
        found = run.engine.run({name: tensors[name] for name in run.inputs}, run.outputs)
        computed.update(found)
        tensors.update(found)
    features = {tensor.name: computed.pop(tensor.name) for tensor in graphs["he_encoder"].outputs}
    return features, computed


def check_parity(
    engines: Mapping[str, Engine], graphs: GraphSet, golden: Golden, batches: Sequence[int]
) -> dict[str, list[EngineParity]]:
    """Run the golden samples at each batch size and compare.

    Returns:
        Per engine, one result per batch size.

    Raises:
        ParityError: a difference above the limit, a feature that is not finite, or an output without golden samples.
    """
    results: dict[str, list[EngineParity]] = {name: [] for name in engines}
    for batch in batches:
        for name, result in _check_batch(engines, graphs, golden, batch).items():
            results[name].append(result)
    return results


def _check_batch(
    engines: Mapping[str, Engine], graphs: GraphSet, golden: Golden, batch: int
) -> dict[str, EngineParity]:
    samples = golden.samples
    limits = LIMITS.get(graphs.precision, EXACT)
    largest_feature = 0.0
    # histograms of the absolute difference, 0..255 grey levels; the last batch wraps around to be full
    counts = {
        name: np.zeros(256, dtype=np.int64) for name in engines if name != "he_encoder" and not name.startswith(QUALITY)
    }
    judged = {name: 0.0 for name in engines if name.startswith(QUALITY)}
    areas = {name: np.zeros(2) for name in engines if name.startswith("stain_")} if limits.dab_dice is not None else {}
    for first in range(0, samples, batch):
        rows = np.arange(first, first + batch) % samples
        inputs = {name: array[rows] for name, array in golden.inputs.items()}
        features, outputs = run_pipeline(engines, graphs.engines, steps=graphs.steps, tile=graphs.tile, inputs=inputs)
        for tensor, array in features.items():
            if not np.isfinite(array).all():
                raise ParityError(
                    f"he_encoder returns NaN or infinity in {tensor} at batch {batch}: nothing is published"
                )
            largest_feature = max(largest_feature, float(np.abs(array).max()))
        for name in (*counts, *judged):
            for tensor in (spec.name for spec in graphs.engines[name].outputs):
                if tensor not in golden.outputs:
                    raise ParityError(f"golden samples lack {tensor}: export the graphs again")
                wanted = golden.outputs[tensor][rows]
                if name in judged:
                    apart = np.abs(outputs[tensor] - wanted) / np.maximum(np.abs(wanted), 1.0)
                    judged[name] = float(np.maximum(judged[name], apart.max()))  # of NaN is NaN, which is refused below
                    continue
                difference = np.abs(outputs[tensor].astype(np.int16) - wanted)
                counts[name] += np.bincount(difference.ravel(), minlength=256)
                if name in areas:
                    areas[name] += _dab_areas(outputs[tensor], golden.outputs[tensor][rows])
    results = {"he_encoder": EngineParity(batch=batch, samples=samples, max_feature=largest_feature)}
    for name, count in counts.items():
        dice = None if name not in areas else float(areas[name][0] / areas[name][1]) if areas[name][1] else 1.0
        results[name] = _judge(name, count, dice, limits, batch, samples)
    for name, worst in judged.items():
        if not worst <= limits.quality:
            raise ParityError(
                f"{name} differs from its golden samples by {worst:.3f} at batch {batch} (allowed: {limits.quality}): "
                "nothing is published"
            )
        results[name] = EngineParity(batch=batch, samples=samples, max_quality=worst)
    return results


def _dab_areas(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numerator and denominator of the Dice of two batches' DAB-positive areas."""
    from staindiffuser.imaging.optical_density import dab_mask  # needs SciPy, as only reduced precisions do

    pairs = [(dab_mask(a), dab_mask(b.astype(np.uint8))) for a, b in zip(ours, theirs, strict=True)]
    return np.array([sum(2.0 * (a & b).sum() for a, b in pairs), sum(a.sum() + b.sum() for a, b in pairs)])


def _judge(
    name: str, count: np.ndarray[Any, Any], dab_dice: float | None, limits: Limits, batch: int, samples: int
) -> EngineParity:
    total = int(count.sum())
    result = EngineParity(
        batch=batch,
        samples=samples,
        max_levels=int(np.flatnonzero(count)[-1]),
        share_over_one=float(count[2:].sum() / total),
        mean_levels=float((count * np.arange(256)).sum() / total),
        dab_dice=dab_dice,
    )
    if result.max_levels > limits.levels or result.share_over_one > limits.over_one:
        raise ParityError(
            f"{name} differs from torch by up to {result.max_levels} grey levels, by more than one on "
            f"{result.share_over_one:.3%} of the values, at batch {batch} (allowed: {limits.levels} and "
            f"{limits.over_one:.1%}): nothing is published"
        )
    if dab_dice is not None and limits.dab_dice is not None and dab_dice < limits.dab_dice:
        raise ParityError(
            f"{name}: the DAB-positive area has a Dice of {dab_dice:.4f} with torch's at batch {batch} (allowed: "
            f"{limits.dab_dice}): nothing is published"
        )
    return result
