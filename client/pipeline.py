"""Tiles to the server and back, and rows of the image to the writer, all at once.

``in_flight`` threads each read a batch, send it and wait for the answer: reading overlaps with the server's work. One
writer thread takes the image's rows as their tiles are complete; tiles are let go once composed. So memory grows
with the slide's width, not with its area.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from staindiffuser.client.blending import Mosaic
from staindiffuser.client.contract import ServedStain, Stainer
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.progress import Stopwatch
from staindiffuser.client.resample import ModelView
from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.errors import ServerError
from staindiffuser.imaging.ome_tiff import SIDE

__all__ = ["WriteRow", "run_pipeline"]

WriteRow = Callable[[int, Executor], None]
"""(row of the image's file tiles, threads to use) → compose, encode and write it."""
ROWS_AHEAD = 2
"""Rows of the image that may wait for the writer before no more tiles are sent."""
WRITER_THREADS = 2


class _Stopped(Exception):  # noqa: N818 - not an error: the work ended elsewhere
    """Work that is no longer wanted."""


def run_pipeline(
    view: ModelView,
    grid: TileGrid,
    tiles: Sequence[GridTile],
    mosaic: Mosaic,
    stainer: Stainer,
    stains: tuple[ServedStain, ...],
    options: StainingOptions,
    write_row: WriteRow,
    watch: Stopwatch,
    advance: Callable[[int], None],
) -> None:
    """ServedStain ``tiles`` (in the grid's order) into ``mosaic`` and have every row of the image written, in order.

    Args:
        view: the slide at the model's resolution.
        grid: of the tiles.
        tiles: those with tissue.
        mosaic: takes them.
        stainer: the server.
        stains: which.
        options: seed, batch, requests in flight, cells.
        write_row: called from one thread, row after row.
        watch: counts the stages ``read`` and ``stain``.
        advance: hears how many more tiles are done; called from this thread.

    Raises:
        Whatever reading, staining or writing raises; nothing runs any more then.
    """
    rows = _Rows(grid, tiles, mosaic)
    batch = min(options.batch, stainer.contract.max_batch)
    batches = iter([tiles[i : i + batch] for i in range(0, len(tiles), batch)])
    names = [stain.name for stain in stains]
    stop = threading.Event()
    view.expect(((tile.x, tile.y) for tile in tiles), grid.tile)

    def stain(part: Sequence[GridTile]) -> Sequence[GridTile]:
        if stop.is_set():
            raise _Stopped
        with watch.stage("read"):
            pixels_BTT3 = np.stack([view.read_tile(tile.x, tile.y, grid.tile) for tile in part])
            for tile in part:
                view.done(tile.x, tile.y, grid.tile)
        if stop.is_set():
            raise _Stopped
        origins_B2 = np.array([(tile.x, tile.y) for tile in part], dtype=np.int64)
        with watch.stage("stain"):
            outputs = stainer.stain_tiles(pixels_BTT3, origins_B2, options.seed, stains=names, cells=options.cells)
        for index, tile in enumerate(part):
            mosaic.add(tile, {name: tensor[index] for name, tensor in outputs.items()})
        return part

    def write(row: int) -> None:
        if stop.is_set():
            raise _Stopped
        write_row(row, coders)
        rows.written(row)

    with (
        ThreadPoolExecutor(options.in_flight, thread_name_prefix="stain") as senders,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
        ThreadPoolExecutor(WRITER_THREADS, thread_name_prefix="code") as coders,
    ):
        staining: set[Future[Sequence[GridTile]]] = set()
        writing: set[Future[None]] = set()
        try:
            while True:
                for row in rows.ready():
                    writing.add(writer.submit(write, row))
                while (
                    len(staining) < options.in_flight and len(writing) <= ROWS_AHEAD and (part := next(batches, None))
                ):
                    staining.add(senders.submit(stain, part))
                if not staining and not writing:
                    return
                pending: list[Future[Any]] = [*staining, *writing]
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done & staining:
                    staining.discard(future)
                    finished = future.result()
                    rows.stained(finished)
                    advance(len(finished))
                for written in done & writing:
                    writing.discard(written)
                    written.result()
        except BaseException as error:
            stop.set()
            if isinstance(error, KeyboardInterrupt | SystemExit | ServerError):
                stainer.cancel()  # do not wait for answers that no one will use
            for pool in (senders, writer):
                pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Rows:
    """Which rows of the image can be written, and which rows of tiles are no longer needed."""

    def __init__(self, grid: TileGrid, tiles: Sequence[GridTile], mosaic: Mosaic) -> None:
        self._grid, self._mosaic = grid, mosaic
        self._missing = [0] * grid.rows
        for tile in tiles:
            self._missing[tile.row] += 1
        self._next = 0
        self._count = -(-grid.height // SIDE)

    def stained(self, tiles: Sequence[GridTile]) -> None:
        """These are in the mosaic."""
        for tile in tiles:
            self._missing[tile.row] -= 1

    def ready(self) -> Iterator[int]:
        """Rows of the image, in order, once each, whose tiles are all there."""
        while self._next < self._count and not any(self._missing[row] for row in self._needed(self._next)):
            yield self._next
            self._next += 1

    def written(self, row: int) -> None:
        """A row of the image is done: forget what no later row needs."""
        later = self._needed(row + 1) if row + 1 < self._count else range(self._grid.rows, self._grid.rows)
        self._mosaic.forget_above(later.start)

    def _needed(self, row: int) -> range:
        return self._grid.rows_that_show(row * SIDE, min((row + 1) * SIDE, self._grid.height))
