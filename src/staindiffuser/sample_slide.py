"""Chooses the slide for the demonstration: the one that the user names, a public one, or a simulated one."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from staindiffuser.files import cache_folder, file_sha256
from staindiffuser.imaging.errors import SlideError

__all__ = ["NAME", "SLIDES_VARIABLE", "Sample", "choose_slide"]

NAME = "CMU-1-Small-Region.svs"
SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
URL = f"https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/{NAME}"
SLIDES_VARIABLE = "STAINDIFFUSER_SLIDES"
DOWNLOAD_SECONDS = 10.0
"""Limit for the whole download: without a network the demonstration must soon go on."""
SIMULATED = "simulated-slide.ome.tiff"
SIMULATED_SIZE = (2048, 1536)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The slide to stain."""

    path: Path
    what: str
    """Which slide it is and where it comes from, for people."""


def choose_slide(given: Path | None, output: Path, say: Callable[[str], None]) -> Sample:
    """Choose the slide.

    Args:
        given: the slide that the user names, if any.
        output: the folder for a simulated slide.
        say: receives messages, such as why a file is not used.

    Raises:
        SlideError: ``given`` is not a file.
    """
    if given is not None:
        if not given.is_file():
            raise SlideError(f"{given} does not exist")
        return Sample(path=given, what=f"the given slide, {given}")
    for folder in _folders():
        path = folder / NAME
        if not path.is_file():
            continue
        if file_sha256(path) == SHA256:
            return Sample(path=path, what=f"OpenSlide's {NAME}, found in {folder}")
        say(f"{path} is not used: its SHA-256 is not that of OpenSlide's file")
    say(f"downloading {NAME} from {URL.split('/')[2]} (2 MB, at most {DOWNLOAD_SECONDS:.0f} s) …")
    try:
        path = _download(_folders()[-1], DOWNLOAD_SECONDS)
        return Sample(path=path, what=f"OpenSlide's {NAME}, downloaded to {path.parent}")
    except _DownloadError as error:
        say(f"no download: {error}; simulating a slide instead")
    return _simulate(output)


def _folders() -> list[Path]:
    """Folders that may hold the slide; it is downloaded to the last one."""
    named = os.environ.get(SLIDES_VARIABLE)
    return [*([Path(named)] if named else []), cache_folder() / "slides"]


class _DownloadError(Exception):
    """The slide could not be downloaded."""


def _download(folder: Path, seconds: float) -> Path:
    """Download with pooch, in a thread: the request's own timeout bounds neither name lookup nor a slow transfer."""
    import pooch

    pooch.get_logger().setLevel(logging.ERROR)
    outcome: list[Path | BaseException] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".download-", dir=folder))
    except OSError as error:
        raise _DownloadError(f"{folder} cannot be written ({error.strerror})") from error

    def fetch() -> None:
        try:
            downloader = pooch.HTTPDownloader(timeout=seconds / 2)
            fetched = pooch.retrieve(URL, f"sha256:{SHA256}", fname=NAME, path=temporary, downloader=downloader)
            outcome.append(Path(fetched))
        except BaseException as error:
            outcome.append(error)

    try:
        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        thread.join(seconds)
        if not outcome:
            raise _DownloadError(f"it took longer than {seconds:.0f} s")
        if isinstance(outcome[0], BaseException):
            raise _DownloadError(_brief(outcome[0]))
        return outcome[0].replace(folder / NAME)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _brief(error: BaseException) -> str:
    kind = type(error).__name__
    if "hash" in str(error).lower():
        return "the downloaded file is not the expected one (SHA-256)"
    return {"ConnectionError": "no network", "ProxyError": "the proxy refuses", "ConnectTimeout": "no answer"}.get(
        kind, f"{kind}: {' '.join(str(error).split())[:100]}"
    )


def _simulate(output: Path) -> Sample:
    from staindiffuser.training.simulate.slide_file import SlideRequest, write_slide

    width, height = SIMULATED_SIZE
    output.mkdir(parents=True, exist_ok=True)
    request = SlideRequest(output=output / SIMULATED, width=width, height=height, seed=0)
    write_slide(request)
    return Sample(path=request.output, what=f"a simulated slide of {width} × {height} pixels, {request.output}")
