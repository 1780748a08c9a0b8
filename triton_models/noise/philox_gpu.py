"""The noise of ``philox.py`` on a GPU: CuPy launches ``philox.cu`` once for the whole batch; the bits are the same.

Copied beside the noise model into the model repository; imports nothing of the project except ``philox`` beside it.
CuPy is imported only when noise is made. No GPU has run this file yet; the tests compile the kernel as C, launch it
through a simulated CuPy and compare the result with NumPy.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from staindiffuser.triton_models.noise import philox
else:
    import philox  # type: ignore[no-redef] # in a model repository

__all__ = ["KERNEL_SOURCE", "GpuNoise"]

KERNEL_SOURCE = Path(__file__).with_name("philox.cu")
_THREADS = 256
_MOST_BLOCKS = 65536
"""With fewer threads than items, each thread strides over several."""


class GpuNoise:
    """Makes noise on one GPU.

    Args:
        device: GPU index.

    Raises:
        ModuleNotFoundError: CuPy is not installed.
    """

    def __init__(self, device: int = 0) -> None:
        self._cupy: Any = importlib.import_module("cupy")
        self._device = self._cupy.cuda.Device(device)
        with self._device:
            self._kernel = self._cupy.RawKernel(KERNEL_SOURCE.read_text(encoding="utf-8"), "tile_noise")
            self._table = self._cupy.asarray(philox.table())

    def tile_noise(
        self, seeds: Any, origins: Any, *, steps: int, height: int, width: int, cells: bool = True
    ) -> tuple[Any, Any]:
        """Like :func:`philox.tile_noise`, with CuPy arrays that are complete on return.

        Args:
            seeds: int64 [B, 1], on the host.
            origins: int64 [B, 2], on the host.
            steps, height, width: sampler steps k of the images and the tile's size, pixels.
            cells: whether to make the noise of the cell maps; if not, the second result is None.

        Raises:
            ValueError: an origin is not a multiple of 16.
        """
        philox.check_origins(origins)
        cp, batch = self._cupy, len(origins)
        with self._device:
            image = cp.empty((batch, steps, philox.IMAGE_CHANNELS, height, width), dtype=np.float16)
            cell = cp.empty((batch, 1, height, width), dtype=np.float16) if cells else None
            items = batch * ((steps + 1) // 2) * height * width
            blocks = min(-(-items // _THREADS), _MOST_BLOCKS)
            arguments = (
                cp.asarray(np.ascontiguousarray(seeds, dtype=np.int64)),
                cp.asarray(np.ascontiguousarray(origins, dtype=np.int64)),
                self._table,
                image,
                cell if cell is not None else np.uintp(0),
                np.int64(items),
                np.int32(steps),
                np.int32(height),
                np.int32(width),
            )
            self._kernel((blocks,), (_THREADS,), arguments)
            # Triton, and engines with their own streams, do not wait for ours.
            cp.cuda.get_current_stream().synchronize()
        return image, cell
