"""Counter-based Gaussian noise that depends on a pixel's coordinates in the slide, not on tile, batch or machine.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is run once per pixel:

    key     = (low word, high word) of the seed
    counter = (x mod 2^32, y mod 2^32, step div 2, channel div 4)

and its four 32-bit words give eight 16-bit indices into a table of 65,536 half-precision normal quantiles
(``ndtri((i + 0.5) / 65536)``). Value ``n = (step mod 2) * 4 + channel mod 4`` uses word ``n div 2``: its low half if n
is even, its high half if n is odd. It uses only integers and a table, so the GPU kernel (``philox.cu``, launched by
``philox_gpu.py``) gives the same bits.

This file is copied beside the noise model in Triton's model repository and must import nothing of the project.

Shapes: B tiles, k steps, C channels, H and W the tile's height and width.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "IMAGE_CHANNELS",
    "ORIGIN_MULTIPLE",
    "check_origins",
    "normal_noise",
    "philox4x32",
    "quantiles",
    "table",
    "tile_noise",
]

ORIGIN_MULTIPLE = 16
"""The network is equivariant to shifts by multiples of this many pixels, so origins must lie on this grid."""
IMAGE_CHANNELS = 3
CELL_CHANNEL = 3
"""The cell map's noise: channel 3 of step 0, independent of the image's channels 0..2."""

# Round multipliers and key increments (Weyl sequence) of Philox 4x32, Salmon et al. 2011, Table 2.
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW32, _SHIFT32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_LOW16, _SHIFT16 = np.uint64(0xFFFF), np.uint64(16)
_WORD = 1 << 32
_BLOCK_PIXELS = 8192  # the ten rounds over a block stay in a core's second-level cache


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox 4x32.

    Args:
        counter: four uint64 arrays that hold 32-bit values and broadcast against each other.
        key: two 32-bit words.

    Returns:
        Four uint64 arrays that hold 32-bit values and broadcast to the result.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        # Rows and columns stay vectors through the first rounds; broadcasting makes planes of them when they meet.
        high0, high1 = (p0 >> _SHIFT32) ^ c3, (p1 >> _SHIFT32) ^ c1
        high0 ^= np.uint64(k1)
        high1 ^= np.uint64(k0)
        p0 &= _LOW32
        p1 &= _LOW32
        c0, c1, c2, c3 = high1, p1, high0, p0
        k0, k1 = (k0 + _W0) % _WORD, (k1 + _W1) % _WORD
    return c0, c1, c2, c3


def normal_noise(
    seed: int, x: int, y: int, *, steps: int, channels: int, height: int, width: int
) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Standard normal noise of a rectangle of the slide.

    Args:
        seed: 64 bits; a negative one is taken modulo 2^64.
        x, y: the top-left pixel at the model's resolution; may be negative.
        steps, channels, height, width: the noise's extent.

    Returns:
        float16 [steps, channels, height, width].
    """
    seed, x, y = int(seed) % 2**64, int(x), int(y)
    key = (seed % _WORD, seed >> 32)
    columns = ((np.arange(width, dtype=np.uint64) + np.uint64(x % _WORD)) & _LOW32).reshape(1, width)
    rows = ((np.arange(height, dtype=np.uint64) + np.uint64(y % _WORD)) & _LOW32).reshape(height, 1)
    noise = np.empty((steps, channels, height, width), dtype=np.float16)
    block = max(1, _BLOCK_PIXELS // width)
    for top in range(0, height, block):
        part = slice(top, min(top + block, height))
        for first_step in range(0, steps, 2):
            for first_channel in range(0, channels, 4):
                pair = np.full((1, 1), first_step // 2, dtype=np.uint64)
                quad = np.full((1, 1), first_channel // 4, dtype=np.uint64)
                words = philox4x32((columns, rows[part], pair, quad), key)
                for step in range(first_step, min(first_step + 2, steps)):
                    for channel in range(first_channel, min(first_channel + 4, channels)):
                        word, half = divmod((step % 2) * 4 + channel % 4, 2)
                        index = words[word] >> _SHIFT16 if half else words[word] & _LOW16
                        # "clip" never clips (16 bits index 65,536 entries): it is the mode that writes without a copy.
                        np.take(table(), index.view(np.int64), out=noise[step, channel, part], mode="clip")
    return noise


def tile_noise(
    seeds: Any, origins: Any, *, steps: int, height: int, width: int, cells: bool = True
) -> tuple[np.ndarray[Any, Any], Any]:
    """The noise of a batch of tiles: the images' and, from the same Philox stream, the cell maps'.

    Args:
        seeds: int64 [B, 1].
        origins: int64 [B, 2], x and y of each tile's top-left pixel in the slide, multiples of 16.
        steps, height, width: sampler steps k of the images and the tile's size, pixels.
        cells: whether to make the noise of the cell maps; if not, the second result is None.

    Returns:
        ``NOISE`` float16 [B, k, 3, H, W], and ``NOISE_CELLS`` float16 [B, 1, H, W].

    Raises:
        ValueError: an origin is not a multiple of 16.
    """
    check_origins(origins)
    batch = len(origins)
    channels = CELL_CHANNEL + 1 if cells else IMAGE_CHANNELS
    image = np.empty((batch, steps, IMAGE_CHANNELS, height, width), dtype=np.float16)
    cell = np.empty((batch, 1, height, width), dtype=np.float16) if cells else None
    for index in range(batch):
        seed, x, y = int(seeds[index, 0]), int(origins[index, 0]), int(origins[index, 1])
        noise = normal_noise(seed, x, y, steps=steps, channels=channels, height=height, width=width)
        image[index] = noise[:, :IMAGE_CHANNELS]
        if cell is not None:
            cell[index, 0] = noise[0, CELL_CHANNEL]
    return image, cell


def check_origins(origins: Any) -> None:
    """Refuse tile origins that are off the network's grid, naming the first.

    Raises:
        ValueError: an origin int64 [B, 2] is not a multiple of 16.
    """
    for x, y in origins:
        if int(x) % ORIGIN_MULTIPLE or int(y) % ORIGIN_MULTIPLE:
            raise ValueError(
                f"ORIGIN ({int(x)}, {int(y)}) is not a multiple of {ORIGIN_MULTIPLE} in both coordinates: "
                "move the tile onto that grid of the slide"
            )


def quantiles() -> np.ndarray[Any, Any]:
    """The normal quantile of each 16-bit index: float16 [65536], computed (needs SciPy); the table is shipped."""
    from scipy.special import ndtri

    return np.asarray(ndtri((np.arange(65536) + 0.5) / 65536), dtype=np.float16)


@functools.cache
def table() -> np.ndarray[Any, Any]:
    """The shipped table of :func:`quantiles`.

    Raises:
        ValueError: the file is not that table.
    """
    values = np.load(Path(__file__).with_name("normal_quantiles.npy"), allow_pickle=False)
    if values.shape != (65536,) or values.dtype != np.float16:
        raise ValueError("normal_quantiles.npy is not the table of 65,536 half-precision quantiles: reinstall it")
    return np.asarray(values)
