"""Reads tiles, has them stained, and yields the rows of the result as they are completed.

``in_flight`` threads each read a batch of tiles, send it and wait for the answer, so reading overlaps with the
server's work. They do nothing else that takes long: nuclei are counted in a thread of their own. Batches are sent a few
rows ahead of the row that the caller is writing, and no further: memory grows with the slide's width, not with its
area.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from staindiffuser.client.blending import Mosaic
from staindiffuser.client.contract import ServedStain, Stainer
from staindiffuser.client.model_view import ModelView
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.progress import Stopwatch
from staindiffuser.client.quality import QualityMap
from staindiffuser.client.scores import NucleusCounter
from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.errors import ServerError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.ome_tiff import SIDE

__all__ = ["stained_rows"]

ROWS_AHEAD = 1
"""Rows of the result that are stained ahead of the one being written: each holds 90 MB of a slide of 20,000 pixels."""

Batch = Sequence[GridTile]


class _Stopped(Exception):  # noqa: N818 - not an error
    """The result of a batch is no longer wanted, because another part of the work has failed."""


@contextmanager
def stained_rows(
    view: ModelView,
    grid: TileGrid,
    tiles: Sequence[GridTile],
    mosaic: Mosaic,
    stainer: Stainer,
    stains: tuple[ServedStain, ...],
    options: StainingOptions,
    watch: Stopwatch,
    advance: Callable[[int], None],
    first_row: int = 0,
    counter: NucleusCounter | None = None,
    quality: QualityMap | None = None,
) -> Iterator[Iterator[int]]:
    """Stain ``tiles`` into ``mosaic``; iterate over the rows of the result as the mosaic becomes able to compose them.

    A row is ``SIDE`` pixels high; rows come in order. When the next one is requested, the mosaic drops the tiles that
    only the previous rows needed. Leaving the context stops the work; no thread outlives it.

    Args:
        view: the slide at the model's pixel size.
        grid: the grid of tiles.
        tiles: the tiles to stain, in the grid's order.
        mosaic: receives the stained tiles.
        stainer: the server.
        stains: the stains to request.
        options: seed, batch size, concurrent requests, cells.
        watch: times the stages ``read``, ``stain`` and ``nuclei``.
        advance: called with the number of further tiles that are done, from the caller's thread.
        first_row: the row to begin with. Batches are the same as if it were 0, since engines may round differently
            for others; those that only earlier rows need are skipped.
        counter: counts the nuclei of the tiles.
        quality: receives what the server says about the tiles; None not to ask.

    Raises:
        SlideError: part of the slide is damaged.
        ServerError: the server failed or was lost.
    """
    size = stainer.contract.tiles_per_request(options.batch)
    first_tiles = _tile_rows(grid, first_row).start
    every_batch = [tiles[i : i + size] for i in range(0, len(tiles), size)]
    batches = deque(batch for batch in every_batch if batch[-1].row >= first_tiles)
    skipped = len(tiles) - sum(map(len, batches))
    names = [stain.name for stain in stains]
    stop = threading.Event()
    view.expect(((tile.x, tile.y) for batch in batches for tile in batch), grid.tile)

    def count(counter: NucleusCounter, tile: GridTile, he_TT3: UInt8Array, maps: dict[str, UInt8Array]) -> None:
        if not stop.is_set():
            with watch.stage("nuclei"):
                counter.add(tile, he_TT3, maps)

    def stain(batch: Batch) -> list[Future[None]]:
        """Stain a batch; returns the counts that are still under way."""
        if stop.is_set():
            raise _Stopped
        with watch.stage("read"):
            pixels_BTT3 = np.stack([view.read_tile(tile.x, tile.y, grid.tile) for tile in batch])
            for tile in batch:
                view.done(tile.x, tile.y, grid.tile)
        if stop.is_set():
            raise _Stopped
        origins_B2 = np.array([(tile.x, tile.y) for tile in batch], dtype=np.int64)
        with watch.stage("stain"):
            outputs = stainer.stain_tiles(
                pixels_BTT3, origins_B2, options.seed, stains=names, cells=options.cells, quality=quality is not None
            )
        counts: list[Future[None]] = []
        for index, tile in enumerate(batch):
            of_tile = {name: tensor[index] for name, tensor in outputs.items()}
            if counter is not None and counter.wants(tile):
                maps = {stain.cells_tensor: of_tile[stain.cells_tensor].copy() for stain in stains}  # not the batch
                counts.append(counters.submit(count, counter, tile, pixels_BTT3[index].copy(), maps))
            if quality is not None:
                quality.add(tile, of_tile)
            mosaic.add(tile, of_tile)
        return counts

    def rows() -> Iterator[int]:
        sent: deque[tuple[Batch, Future[list[Future[None]]]]] = deque()
        counts: list[Future[None]] = []
        advance(skipped)
        for row in range(first_row, -(-grid.height // SIDE)):
            needed = _tile_rows(grid, row)
            mosaic.forget_above(needed.start)
            ahead = _tile_rows(grid, row + ROWS_AHEAD).stop
            while batches and (batches[0][0].row < ahead or len(sent) < options.in_flight):
                batch = batches.popleft()
                sent.append((batch, senders.submit(stain, batch)))
            while sent and sent[0][0][0].row < needed.stop:
                batch, answer = sent.popleft()
                counts += answer.result()
                advance(len(batch))
            while counts:
                counts.pop().result()
            yield row

    with (
        ThreadPoolExecutor(1, thread_name_prefix="count") as counters,
        ThreadPoolExecutor(options.in_flight, thread_name_prefix="stain") as senders,
    ):
        try:
            yield rows()
        except BaseException as error:
            stop.set()
            if isinstance(error, KeyboardInterrupt | SystemExit | ServerError):
                stainer.cancel()  # nobody will use the answers: do not wait for them
            senders.shutdown(wait=False, cancel_futures=True)
            counters.shutdown(wait=False, cancel_futures=True)
            raise


def _tile_rows(grid: TileGrid, row: int) -> range:
    """The rows of tiles that contribute to a row of the result; to the last row if there are fewer."""
    y = min(row * SIDE, (grid.height - 1) // SIDE * SIDE)
    return grid.rows_that_show(y, min(y + SIDE, grid.height))
