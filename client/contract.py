"""What a client must know of a model. It learns all of it from the server: the ensemble's config ``parameters``.

The tensors (T is the tile's side, B the batch): ``HE`` uint8 [B,T,T,3], ``ORIGIN`` int64 [B,2], ``SEED`` int64 [B,1]
in; per stain ``STAIN_<NAME>`` uint8 [B,T,T,3] and ``CELLS_<NAME>`` uint8 [B,T,T,1] out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from staindiffuser.client.errors import ContractError, UnknownStainError
from staindiffuser.imaging.arrays import UInt8Array

__all__ = ["ENSEMBLE", "ModelContract", "ServedStain", "Stainer", "UInt8Array"]

ENSEMBLE = "staindiffuser"


@dataclass(frozen=True, kw_only=True)
class ServedStain:
    """A stain as machines (``ck818``) and as people (``CK8/18``) name it."""

    name: str
    """Matches ``[a-z][a-z0-9_]*``; names files and tensors."""
    label: str
    """What is shown to people."""

    @property
    def image_tensor(self) -> str:
        """Name of the output that holds the image."""
        return f"STAIN_{self.name.upper()}"

    @property
    def cells_tensor(self) -> str:
        """Name of the output that holds the cell map."""
        return f"CELLS_{self.name.upper()}"


@dataclass(frozen=True, kw_only=True)
class ModelContract:
    """What the served model takes and gives."""

    stains: tuple[ServedStain, ...]
    """In the model's order."""
    tile: int
    """Side of a tile, pixels."""
    margin: int
    """Context at each side of a tile that is cropped from the result, pixels."""
    mpp: float
    """Pixel size the model was trained at, µm."""
    steps: int
    """Sampler steps of the image branches."""
    origin_multiple: int
    """A tile's origin must be a multiple of this, pixels."""
    max_batch: int
    """Largest number of tiles in one request."""
    model_name: str
    """Such as ``demo``."""
    model_version: str
    """Hash of what decides the pixels, 64 hex digits."""
    notice: str
    """What every output must say of itself."""

    def __post_init__(self) -> None:
        if not self.stains:
            raise ValueError("stains: the model has none")
        for stain in self.stains:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", stain.name):
                raise ValueError(f"stains: {stain.name!r} does not match [a-z][a-z0-9_]*")
        if self.origin_multiple < 1 or self.tile < 1 or self.tile % self.origin_multiple:
            raise ValueError(f"tile: {self.tile} is no multiple of origin_multiple = {self.origin_multiple}")
        if not 0 <= 2 * self.margin <= self.tile - self.origin_multiple:
            raise ValueError(f"margin: {self.margin} leaves nothing of a tile of {self.tile}")
        if not 0 < self.mpp < 100:
            raise ValueError(f"mpp: {self.mpp} is not a pixel size in µm")
        if self.max_batch < 1 or self.steps < 1:
            raise ValueError("max_batch and steps must be at least 1")

    def select(self, names: Sequence[str] | None) -> tuple[ServedStain, ...]:
        """The stains of these names, in the model's order; all of them for ``None``.

        Raises:
            UnknownStainError: a name the model does not have.
        """
        if names is None:
            return self.stains
        known = {stain.name for stain in self.stains}
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            wrong = f"unknown stain {', '.join(map(repr, unknown))}" if unknown else "no stain was named"
            raise UnknownStainError(f"{wrong}: the model {self.model_name!r} has {', '.join(sorted(known))}")
        return tuple(stain for stain in self.stains if stain.name in names)

    @classmethod
    def from_config(cls, parameters: Mapping[str, str], *, max_batch: int, server: str) -> ModelContract:
        """Read the ensemble's parameters.

        Raises:
            ContractError: a parameter is missing or malformed; the message names it and ``server``.
        """
        try:
            return cls(
                stains=tuple(ServedStain(name=s["name"], label=s["label"]) for s in json.loads(parameters["stains"])),
                tile=int(parameters["tile"]),
                margin=int(parameters["margin"]),
                mpp=float(parameters["mpp"]),
                steps=int(parameters["steps"]),
                origin_multiple=int(parameters["origin_multiple"]),
                max_batch=max_batch,
                model_name=parameters["model_name"],
                model_version=parameters["model_version"],
                notice=parameters["notice"],
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"parameter {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ContractError(
                f"the ensemble {ENSEMBLE!r} of {server} does not describe itself as this client needs ({what}): "
                "build its repository again with `staindiffuser export build`"
            ) from error


class Stainer(Protocol):
    """What stains tiles: a :class:`~staindiffuser.client.connection.StainClient`, or a stand-in for tests."""

    @property
    def url(self) -> str:
        """Where it works, for people and for ``run.json``."""
        ...

    @property
    def server_version(self) -> str:
        """Name and version of the server."""
        ...

    @property
    def contract(self) -> ModelContract:
        """What its model takes and gives."""
        ...

    def stain_tiles(
        self,
        tiles_BTT3: UInt8Array,
        origins_B2: NDArray[np.int64],
        seed: int,
        *,
        stains: Sequence[str] | None = None,
        images: bool = True,
        cells: bool = True,
    ) -> dict[str, UInt8Array]:
        """ServedStain a batch; see :meth:`staindiffuser.client.connection.StainClient.stain_tiles`."""
        ...

    def cancel(self) -> None:
        """End what is under way, from another thread; later calls fail."""
        ...
