"""The model contract: everything a client needs to know about a model, read from the ensemble's config ``parameters``.

Tensors, with batch size B and tile side T: the inputs are ``HE`` uint8 [B,T,T,3], ``ORIGIN`` int64 [B,2] and ``SEED``
int64 [B,1]; the outputs, per stain, are ``STAIN_<NAME>`` uint8 [B,T,T,3] and ``CELLS_<NAME>`` uint8 [B,T,T,1].
A model that judges tiles also gives ``QUALITY`` float32 [B,M] and, per stain, ``QUALITY_<NAME>`` float32 [B,N].
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from staindiffuser.client.errors import ContractError, UnknownStainError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.instances import HALF
from staindiffuser.records import STRICT, RecordError, decode

__all__ = ["ENSEMBLE", "QUALITY", "ModelContract", "QualityContract", "ServedStain", "Stainer"]

ENSEMBLE = "staindiffuser"
QUALITY = "QUALITY"
"""The output that judges tiles, and the prefix of those that judge stains."""
_JSON_PARAMETERS = (
    "stains",
    "tile",
    "margin",
    "mpp",
    "steps",
    "origin_multiple",
    "gate",
    "quality",
    "thresholds",
    "batch",
)
"""Parameters whose text is JSON; the others are plain text. Parameters not listed in the contract are ignored, so that
a newer server can serve an older client."""
_TEXT_PARAMETERS = ("model_name", "model_version", "notice")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServedStain:
    """A stain's identifier (``ck818``) and display name (``CK8/18``)."""

    name: str
    """Matches ``[a-z][a-z0-9_]*``; part of file and tensor names."""
    label: str
    """The name shown to people."""
    threshold: float = HALF
    """Probability of its cell map from which on a pixel belongs to a cell and a nucleus is positive; see
    :meth:`ModelContract.select`."""

    @property
    def image_tensor(self) -> str:
        """The output tensor that holds the image."""
        return f"STAIN_{self.name.upper()}"

    @property
    def cells_tensor(self) -> str:
        """The output tensor that holds the cell map."""
        return f"CELLS_{self.name.upper()}"

    @property
    def quality_tensor(self) -> str:
        """The output tensor that judges image and cell map."""
        return f"{QUALITY}_{self.name.upper()}"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QualityContract:
    """What a model says about the quality of each tile."""

    tile: tuple[str, ...]
    """Names of the values of ``QUALITY``, in order; ``tissue`` is one of them."""
    stain: tuple[str, ...]
    """Names of the values of ``QUALITY_<NAME>``, in order."""
    limits: Mapping[str, float]
    """Values of ``tile`` above which a tile is flagged."""
    reference: str
    """The tissue that the model knows."""

    def __post_init__(self) -> None:
        if "tissue" not in self.tile:
            raise ValueError("quality: tile does not name the share of tissue")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelContract:
    """Inputs, outputs and identity of the served model."""

    stains: tuple[ServedStain, ...]
    """In the model's order."""
    tile: int
    """Side of a tile, pixels."""
    margin: int
    """Context at each side of a tile that is cropped from the result, pixels."""
    mpp: float
    """Pixel size the model was trained at, µm per pixel."""
    steps: int
    """Sampler steps of the image branches."""
    origin_multiple: int
    """Tile origins must be multiples of this, pixels."""
    max_batch: int
    """Largest number of tiles in one request."""
    model_name: str
    """Such as ``demo``."""
    model_version: str
    """Hash of everything that determines the pixels, 64 hex digits."""
    notice: str
    """The statement that accompanies every output."""
    gate: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Per stain that the model's gate judged, what it fails on; empty if it passed."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """By stain, the probability from which on its cell map shows a cell; for the others, one half."""
    quality: QualityContract | None = None
    """None for a model that does not judge its tiles."""
    batch: int = field(default=4, compare=False)
    """Tiles in a request that suit the server, which are the same model's on another one."""

    def __post_init__(self) -> None:
        if not self.stains:
            raise ValueError("stains: the model has none")
        for stain in self.stains:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", stain.name):
                raise ValueError(f"stains: {stain.name!r} does not match [a-z][a-z0-9_]*")
        if self.origin_multiple < 1 or self.tile < 1 or self.tile % self.origin_multiple:
            raise ValueError(f"tile: {self.tile} is not a multiple of origin_multiple = {self.origin_multiple}")
        if not 0 <= 2 * self.margin <= self.tile - self.origin_multiple:
            raise ValueError(f"margin: {self.margin} leaves nothing of a tile of {self.tile} pixels")
        if not 0 < self.mpp < 100:
            raise ValueError(f"mpp: {self.mpp} is not a pixel size in µm")
        for name, threshold in self.thresholds.items():
            if not 0 < threshold < 1:
                raise ValueError(f"thresholds: {name} {threshold:g} is not between 0 and 1")
        if self.max_batch < 1 or self.steps < 1 or self.batch < 1:
            raise ValueError("max_batch, batch and steps must be at least 1")

    def tiles_per_request(self, asked: int | None = None) -> int:
        """How many tiles to send at once: as many as are asked for, else what suits the server, up to its limit."""
        return min(asked or self.batch, self.max_batch)

    def select(
        self, names: Sequence[str] | None, thresholds: Mapping[str, float] | None = None
    ) -> tuple[ServedStain, ...]:
        """The stains with these names, with their thresholds, in the model's order; all of them for ``None``.

        Args:
            names: of the stains.
            thresholds: by stain, instead of the model's own.

        Raises:
            UnknownStainError: the model does not have one of them.
        """
        known = {stain.name for stain in self.stains}
        asked = known if names is None else names
        given = thresholds or {}
        unknown = [name for name in (*asked, *given) if name not in known]
        if unknown or not asked:
            problem = f"unknown stain {', '.join(map(repr, unknown))}" if unknown else "no stain was named"
            raise UnknownStainError(f"{problem}: the model {self.model_name!r} has {', '.join(sorted(known))}")
        own = {**self.thresholds, **given}
        return tuple(
            dataclasses.replace(stain, threshold=own.get(stain.name, HALF))
            for stain in self.stains
            if stain.name in asked
        )

    @classmethod
    def from_config(cls, parameters: Mapping[str, str], *, max_batch: int, server: str) -> ModelContract:
        """Decode the ensemble's parameters.

        Raises:
            ContractError: a parameter is missing or malformed; the message names it and ``server``.
        """
        try:
            return decode(cls, {**_parsed(parameters), "max_batch": max_batch})
        except RecordError as error:
            raise ContractError(
                f"the ensemble {ENSEMBLE!r} of {server} lacks what this client needs (parameter {error}): "
                "rebuild its model repository with `staindiffuser export build`"
            ) from error


def _parsed(parameters: Mapping[str, str]) -> dict[str, Any]:
    """The parameters this client knows, with their texts decoded; missing ones are left to the validation."""
    values: dict[str, Any] = {name: parameters[name] for name in _TEXT_PARAMETERS if name in parameters}
    for name in _JSON_PARAMETERS:
        if name in parameters:
            try:
                values[name] = json.loads(parameters[name])
            except ValueError as error:
                raise RecordError(f"{name}: {parameters[name]!r} is not JSON") from error
    return values


class Stainer(Protocol):
    """Stains tiles: a :class:`~staindiffuser.client.connection.StainClient`, or a substitute in tests."""

    @property
    def url(self) -> str:
        """The server's address, as shown and recorded in ``run.json``."""
        ...

    @property
    def server_version(self) -> str:
        """Name and version of the server."""
        ...

    @property
    def server_id(self) -> str:
        """Random identity of the server's start; empty if unknown."""
        ...

    @property
    def contract(self) -> ModelContract:
        """Inputs, outputs and identity of its model."""
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
        quality: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """Stain a batch of tiles; see :meth:`staindiffuser.client.connection.StainClient.stain_tiles`."""
        ...

    def cancel(self) -> None:
        """Abort all requests, from any thread; later calls fail."""
        ...
