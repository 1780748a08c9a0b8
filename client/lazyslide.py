"""A running server as a virtual-stain model of LazySlide: ``lazyslide.tl.virtual_stain(wsi, LazySlideModel(client))``.

LazySlide takes any object with the right attributes and methods, so neither it nor torch is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from staindiffuser.client.contract import Stainer

__all__ = ["LazySlideModel"]


class LazySlideModel:
    """Satisfies LazySlide's ``VirtualStainModelProtocol`` (0.13).

    LazySlide cuts the tiles, blends the stained ones and keeps each stain as an image of its ``WSIData``. It does not
    say where a tile lies, so every tile gets the same noise; only :func:`~staindiffuser.client.stain_slide` crops the
    tiles' margins, gives noise by place, and finds cells.
    """

    name = "staindiffuser"
    output_mpp = None
    """The output lies on the pixels of the tile."""
    output_range = (0.0, 1.0)

    def __init__(self, client: Stainer, stains: Sequence[str] | None = None, *, seed: int = 0) -> None:
        """Take a server.

        Args:
            client: connected, usually a :class:`~staindiffuser.client.StainClient`.
            stains: their names; by default all that its model has.
            seed: of the noise.

        Raises:
            UnknownStainError: the model does not have one of the stains.
        """
        self._served = client.contract.select(stains)
        self._seed = seed
        self.model = client
        self.stains = tuple(stain.label for stain in self._served)
        """Labels, such as ``CK8/18``."""
        self.notice = client.contract.notice
        """What the server says of its model."""

    @property
    def tiling(self) -> dict[str, float]:
        """The arguments of ``lazyslide.pp.tile_tissues`` that fit the model."""
        contract = self.model.contract
        return {
            "tile_px": contract.tile,
            "stride_px": contract.tile - 2 * contract.margin,
            "mpp": contract.mpp,
        }

    def get_transform(self) -> None:
        """None: tiles come as they were read, uint8 [B, T, T, 3]."""
        return

    def to(self, device: object) -> Self:
        """Where the server computes is its own affair."""
        return self

    def try_compile(self, **settings: object) -> None:
        """Nothing to compile."""

    def predict(self, image: Any) -> Any:
        """Stain a batch.

        Args:
            image: torch tensor, uint8 [B, T, T, 3].

        Returns:
            float32 [B, 3 · stains, T, T] from 0 to 1, on the same device.

        Raises:
            ValueError: the tiles are not those of :attr:`tiling`.
            ServerError: the server failed or was lost.
        """
        contract = self.model.contract
        tiles = np.asarray(image.cpu())
        if tiles.shape[1:] != (contract.tile, contract.tile, 3) or tiles.dtype != np.uint8:
            raise ValueError(
                f"the model stains tiles uint8 {(contract.tile, contract.tile, 3)}, not {tiles.dtype} "
                f"{tiles.shape[1:]}: lazyslide.pp.tile_tissues(wsi, **model.tiling)"
            )
        parts = []
        for first in range(0, len(tiles), contract.tiles_per_request()):
            part = tiles[first : first + contract.tiles_per_request()]
            origins = np.zeros((len(part), 2), np.int64)
            names = [stain.name for stain in self._served]
            found = self.model.stain_tiles(part, origins, self._seed, stains=names, cells=False)
            parts.append(np.concatenate([found[stain.image_tensor] for stain in self._served], axis=-1))
        stained = np.concatenate(parts).transpose(0, 3, 1, 2).astype(np.float32) / 255
        return image[:0].float().new_tensor(stained)
