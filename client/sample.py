"""Which slide the demonstration stains: the one that is given, a well-known public one, or a simulated one."""

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
"""All that a download may take: without a network the demonstration must go on soon."""
SIMULATED = "simulated-slide.ome.tiff"
SIMULATED_SIZE = (2048, 1536)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The slide to stain."""

    path: Path
    what: str
    """For people: which it is and where it came from."""


def choose_slide(given: Path | None, output: Path, say: Callable[[str], None]) -> Sample:
    """Find the slide.

    Args:
        given: what the user names.
        output: folder in which a simulated slide is put.
        say: hears why something was not used.

    Raises:
        SlideError: ``given`` is no file.
    """
    if given is not None:
        if not given.is_file():
            raise SlideError(f"{given} does not exist")
        return Sample(path=given, what=f"the slide that you named, {given}")
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
    """Where the slide may lie; the last is where it is downloaded to."""
    named = os.environ.get(SLIDES_VARIABLE)
    return [*([Path(named)] if named else []), cache_folder() / "slides"]


class _DownloadError(Exception):
    """There is no slide, and why."""


def _download(folder: Path, seconds: float) -> Path:
    """Fetch the slide with pooch, in a thread: no timeout of a request bounds name lookup or a trickling answer."""
    import pooch

    pooch.get_logger().setLevel(logging.ERROR)
    outcome: list[Path | BaseException] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".download-", dir=folder))
    except OSError as error:
        raise _DownloadError(f"{folder} cannot be written ({error.strerror})") from error

    def fetch() -> None:
        try:
            downloader = pooch.HTTPDownloader(timeout=seconds / 2)
            fetched = pooch.retrieve(URL, f"sha256:{SHA256}", fname=NAME, path=place, downloader=downloader)
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
        shutil.rmtree(place, ignore_errors=True)


def _brief(error: BaseException) -> str:
    kind = type(error).__name__
    if "hash" in str(error).lower():
        return "what came is not the file that was expected (SHA-256)"
    return {"ConnectionError": "no network", "ProxyError": "the proxy refuses", "ConnectTimeout": "no answer"}.get(
        kind, f"{kind}: {' '.join(str(error).split())[:100]}"
    )


def _simulate(output: Path) -> Sample:
    from staindiffuser.training.simulate.pyramid import SlideRequest, write_slide

    width, height = SIMULATED_SIZE
    output.mkdir(parents=True, exist_ok=True)
    request = SlideRequest(output=output / SIMULATED, width=width, height=height, seed=0)
    write_slide(request)
    return Sample(path=request.output, what=f"a simulated slide of {width} × {height} pixels, {request.output}")
