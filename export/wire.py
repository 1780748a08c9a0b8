"""What goes over the wire: the ensemble's inputs and outputs, and the parameters from which a client learns the rest.

Every flavour of a repository offers the same, and whoever asks, probes, counts or routes requests goes by these names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Protocol

from staindiffuser.export.description import QUALITY, ExportedStain, GraphSet, Quality, TensorSpec
from staindiffuser.export.errors import GraphsError
from staindiffuser.triton_models.noise.philox import IMAGE_CHANNELS, ORIGIN_MULTIPLE

__all__ = [
    "ENCODER",
    "ENSEMBLE",
    "Contract",
    "check_ensemble",
    "contract_parameters",
    "noise_outputs",
    "noise_read",
    "version_folder",
    "wire_inputs",
    "wire_outputs",
]

ENSEMBLE = "staindiffuser"
ENCODER = "he_encoder"


class Contract(Protocol):
    """What a client must know, as both :class:`GraphSet` and :class:`Manifest` provide it."""

    @property
    def stains(self) -> tuple[ExportedStain, ...]: ...
    @property
    def tile(self) -> int: ...
    @property
    def margin(self) -> int: ...
    @property
    def mpp(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def notice(self) -> str: ...
    @property
    def model_version(self) -> str: ...
    @property
    def gate(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def thresholds(self) -> Mapping[str, float]: ...
    @property
    def quality(self) -> Quality | None: ...


def contract_parameters(contract: Contract, model_name: str) -> dict[str, str]:
    """The ensemble's ``parameters``, from which a client learns everything it needs."""
    quality = contract.quality
    return {
        "stains": json.dumps([{"name": s.name, "label": s.label} for s in contract.stains], ensure_ascii=False),
        "tile": str(contract.tile),
        "margin": str(contract.margin),
        "mpp": repr(contract.mpp),
        "steps": str(contract.steps),
        "origin_multiple": str(ORIGIN_MULTIPLE),
        "model_version": contract.model_version,
        "model_name": model_name,
        "notice": contract.notice,
        **({"gate": json.dumps(contract.gate)} if contract.gate else {}),
        **({"thresholds": json.dumps(contract.thresholds)} if contract.thresholds else {}),
        **({} if quality is None else {"quality": json.dumps(dataclasses.asdict(quality), ensure_ascii=False)}),
    }


def version_folder(model: str, contract: Contract) -> str:
    """Name of a model's version folder, which Triton requires to be a number.

    The ensemble's is derived from the model version: Triton reports it in every answer and refuses a request for
    another one, so that a client notices at once if a server with another model has taken over the address.
    """
    return str(int(contract.model_version[:15], 16) or 1) if model == ENSEMBLE else "1"  # Triton's limit is 2^63


def wire_inputs(tile: int) -> tuple[TensorSpec, ...]:
    """The ensemble's inputs."""
    return (
        TensorSpec(name="HE", dtype="uint8", shape=(tile, tile, 3)),
        TensorSpec(name="ORIGIN", dtype="int64", shape=(2,)),
        TensorSpec(name="SEED", dtype="int64", shape=(1,)),
    )


def noise_outputs(tile: int, steps: int) -> tuple[TensorSpec, ...]:
    """What the noise model can make."""
    return (
        TensorSpec(name="NOISE", dtype="float16", shape=(steps, IMAGE_CHANNELS, tile, tile)),
        TensorSpec(name="NOISE_CELLS", dtype="float16", shape=(1, tile, tile)),
    )


def noise_read(graphs: GraphSet) -> tuple[TensorSpec, ...]:
    """What engines read of it; without any, the ensemble has no noise model."""
    read = {spec.name for engine in graphs.engines.values() for spec in engine.inputs}
    return tuple(spec for spec in noise_outputs(graphs.tile, graphs.steps) if spec.name in read)


def wire_outputs(contract: Contract) -> tuple[TensorSpec, ...]:
    """The ensemble's outputs."""
    specs = []
    for stain in contract.stains:
        name = stain.name.upper()
        specs.append(TensorSpec(name=f"STAIN_{name}", dtype="uint8", shape=(contract.tile, contract.tile, 3)))
        specs.append(TensorSpec(name=f"CELLS_{name}", dtype="uint8", shape=(contract.tile, contract.tile, 1)))
    if contract.quality is not None:
        specs.append(TensorSpec(name="QUALITY", dtype="float32", shape=(len(contract.quality.tile),)))
        shape = (len(contract.quality.stain),)
        for stain in contract.stains if contract.quality.stain else ():
            specs.append(TensorSpec(name=f"QUALITY_{stain.name.upper()}", dtype="float32", shape=shape))
    return tuple(specs)


def check_ensemble(graphs: GraphSet) -> None:
    """Check that every engine's inputs exist with their dtype and shape, and that every wire output is produced.

    Raises:
        GraphsError: names the engine and the tensor.
    """
    expected = [ENCODER] + [f"{kind}_{stain.name}" for stain in graphs.stains for kind in ("stain", "cells")]
    if graphs.quality is not None:  # after the branches, whose outputs they read
        expected += [QUALITY, *(f"{QUALITY}_{stain.name}" for stain in graphs.stains if graphs.quality.stain)]
    if sorted(expected) != sorted(graphs.engines):
        raise GraphsError(f"graphs hold the engines {sorted(graphs.engines)}, but the stains need {sorted(expected)}")
    tensors: dict[str, TensorSpec] = {}
    for spec in (*wire_inputs(graphs.tile), *noise_outputs(graphs.tile, graphs.steps)):
        tensors[spec.name] = spec
    for name in expected:
        for spec in graphs.engines[name].inputs:
            if tensors.get(spec.name) != spec:
                raise GraphsError(f"{name} takes {_show(spec)}, but the ensemble has {_show(tensors.get(spec.name))}")
        for spec in graphs.engines[name].outputs:
            if spec.name in tensors:
                raise GraphsError(f"{name} gives {spec.name}, which another model gives too")
            tensors[spec.name] = spec
    for spec in wire_outputs(graphs):
        if tensors.get(spec.name) != spec:
            raise GraphsError(f"clients expect {_show(spec)}, but the ensemble has {_show(tensors.get(spec.name))}")


def _show(spec: TensorSpec | None) -> str:
    return "no such tensor" if spec is None else f"{spec.name} {spec.dtype} {list(spec.shape)}"
