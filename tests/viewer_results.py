"""A slide, results of it, and a running viewer, for tests of the viewer."""

from __future__ import annotations

import csv
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import uvicorn
from numpy.typing import NDArray

from staindiffuser.benchmarks.stub_tissue import StubStainer, StubTissue
from staindiffuser.benchmarks.stub_tissue import write_slide as write_large_slide
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.run_record import read_run
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FAKE_CONTRACT, FakeStainer
from staindiffuser.client.tiling import TileGrid
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.viewer.app import make_app
from staindiffuser.viewer.guard import LOOPBACK, Guard
from staindiffuser.viewer.results import Library, find_results

MPP = 0.5
NOTICE = "A substitute without a model."


def write_slide(path: Path, width: int = 1700, height: int = 1300, seed: int = 0) -> UInt8Array:
    """A pyramidal slide: pink tissue with dark nuclei on white glass. Returns its pixels."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 244, np.uint8)
    yy, xx = np.mgrid[:height, :width]
    tissue = ((xx - width / 2) / (0.45 * width)) ** 2 + ((yy - height / 2) / (0.45 * height)) ** 2 < 1
    texture = rng.integers(-12, 13, (height, width, 1))
    pixels[tissue] = np.clip(np.array([222, 160, 200]) + texture[tissue], 0, 255)
    for x, y in rng.integers(20, (width - 20, height - 20), (width * height // 2600, 2)):
        if not tissue[y, x]:
            continue
        box = np.s_[y - 8 : y + 9, x - 8 : x + 9]
        pixels[box][np.hypot(*np.mgrid[-8:9, -8:9]) < 7] = (86, 52, 130)
    levels = [pixels, pixels[::2, ::2], pixels[::4, ::4]]
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for number, level in enumerate(levels):
            scale = 1e4 / (MPP * 2**number)
            tiff.write(
                level, tile=(256, 256), photometric="rgb", compression="adobe_deflate", subifds=None if number else 2,
                subfiletype=1 if number else 0, resolution=(scale, scale), resolutionunit="CENTIMETER",
                metadata={"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": MPP,
                          "PhysicalSizeYUnit": "µm"} if number == 0 else None,
            )  # fmt: skip
    return pixels


def paint(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> UInt8Array:
    """CD3 left of x = 850, CK8/18 right of it: nuclei are brown and their cells have probability 0.6 or 0.9."""
    nuclei = tiles_BTT3[..., 1] < 100
    x = origins_B2[:, :1] + np.arange(tiles_BTT3.shape[2])
    y = origins_B2[:, 1:] + np.arange(tiles_BTT3.shape[1])
    mine = nuclei & ((x < 850) == ("CD3" in tensor))[:, None, :]
    if tensor.startswith("CELLS_"):
        probability = np.where(y < 650, 230, 153)[:, :, None]
        return np.where(mine, probability, 0)[..., None].astype(np.uint8)
    image = np.full(tiles_BTT3.shape, 238, np.uint8)
    image[nuclei] = (130, 140, 190)
    image[mine] = (120, 72, 40)
    return image


def stain(slide: Path, output: Path, **changes: Any) -> None:
    """Stain a slide with :func:`paint`; ``changes`` are of the model's contract."""
    stain_slide(slide, output, FakeStainer(paint, replace(FAKE_CONTRACT, **changes)), StainingOptions())


def write_large_result(folder: Path) -> tuple[Path, Path]:
    """A slide of 20,480² pixels, a twenty-fifth of it tissue, and its result, in seven seconds of a processor."""
    tissue = StubTissue(1000, 2)
    slide, output = folder / "large.tif", folder / "large-stained"
    write_large_slide(slide, tissue, 20480, tissue_side=4096)
    stain_slide(slide, output, StubStainer(tissue.maps, tissue.images), StainingOptions(nuclei=False))
    return slide, output


def write_quality(result: Path, flags: dict[tuple[int, int], str]) -> None:
    """A ``quality.csv`` as the client writes it: all tiles of the grid, those at (row, column) flagged."""
    run = read_run(result)
    grid = TileGrid.for_model(FAKE_CONTRACT, *run.result.size)
    with (result / "quality.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["row", "column", "x", "y", "tissue", "unlike", "flags"])
        for row in range(grid.rows):
            for column in range(grid.columns):
                tile = grid.at(row, column)
                table.writerow([row, column, tile.x, tile.y, 0.9, 0.1, flags.get((row, column), "")])


@dataclass(frozen=True)
class Answer:
    """An answer over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Viewer:
    """A running viewer."""

    port: int
    library: Library

    @property
    def address(self) -> str:
        """Its page."""
        return f"http://127.0.0.1:{self.port}/"

    def get(self, path: str, **headers: str) -> Answer:
        """Ask for something; ``Sec_Fetch_Site`` stands for the header Sec-Fetch-Site."""
        return self.request("GET", path, None, headers)

    def post(self, path: str, data: Any) -> Answer:
        """Send JSON."""
        return self.request("POST", path, json.dumps(data).encode(), {"Content_Type": "application/json"})

    def request(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        """Send a request as it is: paths are not normalised."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())
        finally:
            connection.close()


@contextmanager
def viewing(
    *results: Path, slides: tuple[Path, ...] = (), token: str | None = None, truth: tuple[str, ...] = ()
) -> Iterator[Viewer]:
    """A viewer of these results in a thread of this process."""
    library = Library(find_results(results), slides, truth)
    app = Guard(make_app(library), names=LOOPBACK, token=token)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        config = uvicorn.Config(
            app, log_level="error", ws="none", loop="asyncio", http="h11", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield Viewer(listening.getsockname()[1], library)
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()
