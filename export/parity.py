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
from staindiffuser.export.description import GraphSet, TensorSpec
from staindiffuser.export.errors import GraphsError, ParityError
from staindiffuser.records import STRICT
from staindiffuser.triton_models.noise import philox

__all__ = ["MAX_LEVELS", "MAX_SHARE_OVER_ONE", "EngineParity", "Golden", "check_parity", "run_pipeline"]

MAX_LEVELS = 2
"""Largest difference anywhere, grey levels."""
MAX_SHARE_OVER_ONE = 0.001
"""Largest share of values that differ by more than one grey level."""

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
    max_feature: float = 0.0
    """Largest absolute value of the encoder's features (half precision overflows at 65,504)."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """``golden.npz``: N tiles, their seeds and origins, and every output as computed by float32 torch."""

    inputs: Arrays
    """``HE`` uint8 [N, T, T, 3], ``ORIGIN`` int64 [N, 2], ``SEED`` int64 [N, 1]."""
    outputs: Arrays
    """``STAIN_<NAME>`` uint8 [N, T, T, 3] and ``CELLS_<NAME>`` uint8 [N, T, T, 1]."""

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
        return cls(inputs, {name: array for name, array in arrays.items() if name.startswith(("STAIN_", "CELLS_"))})


def run_pipeline(
    engines: Mapping[str, Engine], graphs: Mapping[str, HasTensors], *, steps: int, tile: int, inputs: Arrays
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    """Compute in this process what the server's ensemble computes for one batch.

    Args:
        engines: by name, ``he_encoder`` and the branches to run.
        graphs: their descriptions, by the same names.
        steps, tile: sampler steps k and tile size, pixels.
        inputs: ``HE``, ``ORIGIN``, ``SEED`` of one batch.

    Returns:
        The features and the branches' outputs, by tensor name.
    """
    features = engines["he_encoder"].run({"HE": inputs["HE"]}, [tensor.name for tensor in graphs["he_encoder"].outputs])
    image, cells = philox.tile_noise(inputs["SEED"], inputs["ORIGIN"], steps=steps, height=tile, width=tile)
    tensors = {**features, "NOISE": image, "NOISE_CELLS": cells}
    outputs: dict[str, np.ndarray[Any, Any]] = {}
    for name, engine in engines.items():
        if name != "he_encoder":
            graph = graphs[name]
            arguments = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
            outputs.update(engine.run(arguments, [tensor.name for tensor in graph.outputs]))
    return features, outputs


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
    largest_feature = 0.0
    # histograms of the absolute difference, 0..255 grey levels; the last batch wraps around to be full
    counts = {name: np.zeros(256, dtype=np.int64) for name in engines if name != "he_encoder"}
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
        for name in counts:
            for tensor in (spec.name for spec in graphs.engines[name].outputs):
                if tensor not in golden.outputs:
                    raise ParityError(f"golden samples lack {tensor}: export the graphs again")
                difference = np.abs(outputs[tensor].astype(np.int16) - golden.outputs[tensor][rows])
                counts[name] += np.bincount(difference.ravel(), minlength=256)
    results = {"he_encoder": EngineParity(batch=batch, samples=samples, max_feature=largest_feature)}
    for name, count in counts.items():
        results[name] = _judge(name, count, batch, samples)
    return results


def _judge(name: str, count: np.ndarray[Any, Any], batch: int, samples: int) -> EngineParity:
    total = int(count.sum())
    result = EngineParity(
        batch=batch,
        samples=samples,
        max_levels=int(np.flatnonzero(count)[-1]),
        share_over_one=float(count[2:].sum() / total),
        mean_levels=float((count * np.arange(256)).sum() / total),
    )
    if result.max_levels > MAX_LEVELS or result.share_over_one > MAX_SHARE_OVER_ONE:
        raise ParityError(
            f"{name} differs from torch by up to {result.max_levels} grey levels, by more than one on "
            f"{result.share_over_one:.3%} of the values, at batch {batch} (allowed: {MAX_LEVELS} and "
            f"{MAX_SHARE_OVER_ONE:.1%}): nothing is published"
        )
    return result
