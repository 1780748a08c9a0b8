"""The position-bound noise: bits, distribution, tiling."""

import time
from typing import Any

import numpy as np
import pytest
from scipy import stats

from staindiffuser.triton_models.noise import philox, philox_gpu
from tests.simulated_gpu import cupy as simulated_cupy


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python's integers, straight from Salmon et al. 2011."""
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def philox_one(counter: list[int], key: list[int]) -> list[int]:
    arrays = [np.array([word], dtype=np.uint64) for word in counter]
    words = philox.philox4x32((arrays[0], arrays[1], arrays[2], arrays[3]), (key[0], key[1]))
    return [int(word[0]) for word in words]


ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox_one(counter, key) == expected
    assert reference_philox(counter, key) == expected


def test_table_is_the_shipped_quantiles() -> None:
    table = np.load(philox.__file__.replace("philox.py", "normal_quantiles.npy"))
    np.testing.assert_array_equal(table, philox.quantiles())
    assert np.isfinite(table).all()
    np.testing.assert_array_equal(table, -table[::-1])
    assert table.astype(np.float64).std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (-48, 16), (2**32 - 16, -(2**32)), (2**40, -(2**63))])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1])
def test_each_value_is_the_contracts(seed: int, x: int, y: int) -> None:
    noise = philox.normal_noise(seed, x, y, steps=4, channels=6, height=32, width=48)
    assert noise.shape == (4, 6, 32, 48)
    assert noise.dtype == np.float16
    table = philox.quantiles()
    generator = np.random.default_rng(0)
    for _ in range(50):
        step, channel, row, column = (int(generator.integers(size)) for size in noise.shape)
        counter = [(x + column) % 2**32, (y + row) % 2**32, step // 2, channel // 4]
        words = reference_philox(counter, [seed % 2**32, (seed % 2**64) >> 32])
        value = (step % 2) * 4 + channel % 4
        index = (words[value // 2] >> (16 * (value % 2))) & 0xFFFF
        assert noise[step, channel, row, column] == table[index]


def test_distribution_is_normal_and_independent() -> None:
    noise = philox.normal_noise(11, 0, 0, steps=2, channels=4, height=256, width=256).astype(np.float64)
    flat = noise.reshape(8, -1)
    assert np.abs(flat.mean(axis=1)).max() < 0.02
    assert np.abs(flat.std(axis=1) - 1).max() < 0.01
    assert stats.kstest(flat[0], "norm").pvalue > 1e-3
    correlations = np.corrcoef(flat) - np.eye(8)
    assert np.abs(correlations).max() < 0.02
    # neighbouring pixels, rows, and seeds
    assert abs(np.corrcoef(noise[0, 0, :, 1:].ravel(), noise[0, 0, :, :-1].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(noise[0, 0, 1:].ravel(), noise[0, 0, :-1].ravel())[0, 1]) < 0.02
    other = philox.normal_noise(12, 0, 0, steps=1, channels=1, height=256, width=256).astype(np.float64)
    assert abs(np.corrcoef(noise[0, 0].ravel(), other.ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(("x", "y"), [(64, 32), (-96, -160), (-32, 16)])
def test_a_pixel_has_the_same_noise_in_whichever_tile(x: int, y: int) -> None:
    whole = philox.normal_noise(5, -256, -256, steps=2, channels=4, height=512, width=512)
    tile = philox.normal_noise(5, x, y, steps=2, channels=4, height=96, width=80)
    np.testing.assert_array_equal(tile, whole[:, :, y + 256 : y + 352, x + 256 : x + 336])


def test_tile_noise_is_normal_noise_per_tile() -> None:
    seeds, origins = np.array([[3], [-4]]), np.array([[16, -32], [0, 160]])
    image, cells = philox.tile_noise(seeds, origins, steps=3, height=32, width=64)
    assert image.shape == (2, 3, 3, 32, 64)
    assert cells.shape == (2, 1, 32, 64)
    for index in range(2):
        x, y = origins[index]
        noise = philox.normal_noise(int(seeds[index, 0]), x, y, steps=3, channels=4, height=32, width=64)
        np.testing.assert_array_equal(image[index], noise[:, :3])
        np.testing.assert_array_equal(cells[index, 0], noise[0, 3])
    assert philox.tile_noise(seeds, origins, steps=3, height=32, width=64, cells=False)[1] is None


@pytest.mark.parametrize("origin", [(8, 0), (0, -1), (-17, 32)])
def test_origin_off_the_grid_is_refused(origin: tuple[int, int]) -> None:
    origins = np.array([[0, 0], origin])
    with pytest.raises(ValueError, match=rf"ORIGIN \({origin[0]}, {origin[1]}\) is not a multiple of 16"):
        philox.tile_noise(np.zeros((2, 1), np.int64), origins, steps=1, height=16, width=16)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("cells", [True, False])
def test_the_gpus_kernel_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, steps: int, cells: bool) -> None:
    """Its CUDA source compiled as C, launched through a simulated CuPy for the whole batch at once."""
    simulated_cupy.install(monkeypatch)
    seeds = np.array([[3], [-4], [2**63 - 1]])
    origins = np.array([[16, -32], [-(2**33) - 16, 2**32 - 16], [0, -(2**63)]])
    arguments: dict[str, Any] = {"steps": steps, "height": 32, "width": 48, "cells": cells}
    found = philox_gpu.GpuNoise(1).tile_noise(seeds, origins, **arguments)
    expected = philox.tile_noise(seeds, origins, **arguments)
    assert found[0].device == 1
    np.testing.assert_array_equal(found[0].values, expected[0])  # no wait: it must be complete already
    if cells:
        np.testing.assert_array_equal(found[1].values, expected[1])
    else:
        assert found[1] is None


def test_the_kernel_strides_over_what_the_grid_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated_cupy.install(monkeypatch)
    monkeypatch.setattr(philox_gpu, "_MOST_BLOCKS", 3)
    arguments: dict[str, Any] = {"steps": 2, "height": 32, "width": 48}
    seeds, origins = np.array([[5]]), np.array([[-16, 16]])
    found = philox_gpu.GpuNoise().tile_noise(seeds, origins, **arguments)
    for array, expected in zip(found, philox.tile_noise(seeds, origins, **arguments), strict=True):
        np.testing.assert_array_equal(array.values, expected)


def test_the_gpu_refuses_an_origin_off_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated_cupy.install(monkeypatch)
    with pytest.raises(ValueError, match=r"ORIGIN \(8, 0\) is not a multiple of 16"):
        philox_gpu.GpuNoise().tile_noise(np.array([[0]]), np.array([[8, 0]]), steps=1, height=16, width=16)


@pytest.mark.timing
def test_fast_enough_for_a_tile() -> None:
    best = min(_seconds() for _ in range(10))
    assert best < 0.02, f"{best * 1e3:.1f} ms for eight values a pixel of 256 x 256 (about 4 ms on one idle core)"


def _seconds() -> float:
    start = time.perf_counter()
    philox.normal_noise(1, 0, 0, steps=2, channels=4, height=256, width=256)
    return time.perf_counter() - start
