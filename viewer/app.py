"""The web application: a page, and the tiles, cells and scores that it asks for."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
from anyio import to_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from staindiffuser.errors import InputError, StainDiffuserError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.viewer.comparison import difference
from staindiffuser.viewer.describe import about_cells, about_result, list_entries
from staindiffuser.viewer.errors import NotThereError, RequestError, ResultGoneError
from staindiffuser.viewer.fluorescence import NUCLEI, colours_of, fluorescent
from staindiffuser.viewer.pyramids import Pyramid, encode
from staindiffuser.viewer.regions import parse_polygon, region_scores
from staindiffuser.viewer.results import Library, OpenResult

__all__ = ["STATIC", "make_app"]

STATIC = Path(__file__).parent / "static"
KEEP = {"Cache-Control": "private, max-age=86400, immutable"}
"""Of tiles: their addresses name the version of the result."""
LIVE = {"Cache-Control": "no-store"}
THREADS = 12
"""Threads that answer: every one keeps some memory of its own."""
MAX_BODY = 200_000
MAX_ZOOM = 16
_PLACE = re.compile(r"(\d{1,6})_(\d{1,6})")


def make_app(library: Library) -> Starlette:
    """The application that shows these results."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield
        library.close()

    views = _Views(library)
    slide = "/slides/{slide}"
    routes = [
        Route("/", views.page),
        Route("/api/slides", views.slides),
        Route("/api" + slide, views.slide),
        Route("/api" + slide + "/cells", views.cells),
        Route("/api" + slide + "/region", views.region, methods=["POST"]),
        Route(slide + "/he/{level}/{place}.jpg", views.he),
        Route(slide + "/thumbnail.jpg", views.thumbnail),
        Route(slide + "/stain/{stains}/{level}/{place}.jpg", views.stain),
        Route(slide + "/fluorescence/{stains}/{level}/{place}.jpg", views.fluorescence),
        Route(slide + "/reference/{reference}/{stain}/{level}/{place}.jpg", views.reference),
        Route(slide + "/difference/{reference}/{stain}/{level}/{place}.jpg", views.difference),
        Route(slide + "/cells/{zoom}/{place}.json", views.cell_block),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    handlers: dict[Any, Callable[[Request, Exception], Response]] = {
        StainDiffuserError: _expected,
        OSError: _expected,
        404: _missing,
        405: _missing,
    }
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


def _expected(request: Request, error: Exception) -> Response:
    status = ResultGoneError.status if isinstance(error, InputError | OSError) else 500
    if isinstance(error, NotThereError | RequestError | ResultGoneError):
        status = error.status
    return JSONResponse({"error": " ".join(str(error).split())}, status, LIVE)


def _missing(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "there is nothing at this address"}, getattr(error, "status_code", 404), LIVE)


class _Views:
    """One method per address; those that read files run in threads."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    def slides(self, request: Request) -> Response:
        return JSONResponse({"slides": list_entries(self._library)}, headers=LIVE)

    def slide(self, request: Request) -> Response:
        result = self._result(request)
        return JSONResponse(about_result(result, self._library.references(result)), headers=LIVE)

    def cells(self, request: Request) -> Response:
        return JSONResponse(about_cells(self._result(request)), headers=LIVE)

    async def region(self, request: Request) -> Response:
        data = await _body(request)
        return await run_in_threadpool(self._region, request, data)

    def _region(self, request: Request, data: dict[str, Any]) -> Response:
        result = self._result(request)
        polygon = parse_polygon(data.get("polygon"), result.run.input.size)
        threshold = _threshold(data.get("threshold", 0.0))
        compared = {}
        if (name := data.get("reference")) is not None:
            found = [one for one in self._library.references(result) if one.name == name]
            if not found:
                raise RequestError("reference: there is no such image to compare with")
            compared = {stain: self._library.reference(result, name, stain) for stain in found[0].stains}
        return JSONResponse(region_scores(result, polygon, threshold, compared), headers=LIVE)

    def he(self, request: Request) -> Response:
        result = self._result(request)
        if result.source is None:
            raise NotThereError(result.source_problem)
        return _tile(result.source, request)

    def stain(self, request: Request) -> Response:
        """A stain as it lies in its file; of several, ``cd3~ck818``, the darkest: none hides the brown of another."""
        result, names = self._result(request), _names(request)
        images = [result.stain(name) for name in names]
        if len(images) == 1:
            return _tile(images[0], request)
        return self._made(request, result, lambda *place: np.minimum.reduce([image.pixels(*place) for image in images]))

    def fluorescence(self, request: Request) -> Response:
        """Stains as light, ``nuclei~cd3~ck818`` in one image: a browser that adds up layers is too slow to zoom."""
        result, names = self._result(request), _names(request)
        colours = {name: colours_of(number)[0] for number, name in enumerate(result.stains)}
        first = next(iter(result.stains))
        images = {name: result.stain(first if name == NUCLEI else name) for name in names}

        def make(level: int, column: int, row: int) -> UInt8Array:
            pixels = {name: image.pixels(level, column, row) for name, image in images.items()}
            counterstained = pixels.pop(NUCLEI, None)
            return fluorescent([(shown, colours[name]) for name, shown in pixels.items()], counterstained)

        return self._made(request, result, make)

    def reference(self, request: Request) -> Response:
        path = request.path_params
        return _tile(self._library.reference(self._result(request), path["reference"], path["stain"]), request)

    def difference(self, request: Request) -> Response:
        result, path = self._result(request), request.path_params
        virtual, other = result.stain(path["stain"]), self._library.reference(result, path["reference"], path["stain"])
        return self._made(request, result, lambda *place: difference(virtual.pixels(*place), other.pixels(*place)))

    def thumbnail(self, request: Request) -> Response:
        result = self._result(request)
        image = result.source or next(iter(result.stains.values()))[1]
        data = image.tile(len(image.levels) - 1, 0, 0)
        return Response(data, media_type="image/jpeg", headers=KEEP)

    def cell_block(self, request: Request) -> Response:
        index = self._result(request).cells.index()
        if index is None:
            raise NotThereError("the cells are not there (yet)")
        column, row = _place(request)
        zoom = request.path_params["zoom"]
        if zoom == "outlines":
            return JSONResponse(index.outlines(column, row), headers=KEEP)
        if not re.fullmatch(r"\d{1,2}", zoom) or int(zoom) > MAX_ZOOM:
            raise NotThereError(f"there is no zoom {zoom!r}")
        try:
            threshold = _threshold(float(request.query_params.get("threshold", "0")))
        except ValueError:
            raise RequestError("threshold: must be a number") from None
        return JSONResponse(index.counts(int(zoom), column, row, threshold), headers=KEEP)

    def _made(self, request: Request, result: OpenResult, make: Callable[[int, int, int], UInt8Array]) -> Response:
        """A tile that is computed, by ``make(level, column, row)``, unless it is still there."""
        level, (column, row) = _level(request), _place(request)
        key = (result.version, request.url.path)
        data = self._library.cache.get(key, lambda: encode(make(level, column, row)))
        return Response(data, media_type="image/jpeg", headers=KEEP)

    def _result(self, request: Request) -> OpenResult:
        return self._library.open(request.path_params["slide"])


def _tile(image: Pyramid, request: Request) -> Response:
    column, row = _place(request)
    return Response(image.tile(_level(request), column, row), media_type="image/jpeg", headers=KEEP)


def _names(request: Request) -> list[str]:
    """The stains of an address, each once."""
    return list(dict.fromkeys(request.path_params["stains"].split("~")))


def _level(request: Request) -> int:
    level = request.path_params["level"]
    if not re.fullmatch(r"\d{1,2}", level):
        raise NotThereError(f"there is no level {level!r}")
    return int(level)


def _place(request: Request) -> tuple[int, int]:
    match = _PLACE.fullmatch(request.path_params["place"])
    if match is None:
        raise NotThereError(f"there is no tile {request.path_params['place']!r}")
    return int(match[1]), int(match[2])


async def _body(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RequestError("the request must be JSON")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise RequestError(f"the request is longer than {MAX_BODY} bytes")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the request is not JSON") from None
    if not isinstance(data, dict):
        raise RequestError("the request must be one JSON object")
    return data


def _threshold(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RequestError("threshold: must be a number from 0 to 1")
    return float(value)
