"""What a slide is called in files and logs. By default not by its name, which may be a patient's: by what it contains.

``slide-`` and the first twelve digits of the SHA-256 of the slide's bytes. Whoever has the slide finds its result
(``sha256sum``, ``staindiffuser info``); nobody else learns anything from it.
"""

from __future__ import annotations

import contextlib
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from staindiffuser.client.inputs import default_output
from staindiffuser.client.run_record import RunRecord, printable, slide_sha256
from staindiffuser.errors import InputError
from staindiffuser.imaging.slides import open_slide

__all__ = ["SlideNames", "find_slide", "hide_arguments", "slide_identity"]


def slide_identity(sha256: str) -> str:
    """The name that a slide of this hash has in files and logs."""
    return f"slide-{sha256[:12]}"


class SlideNames:
    """The name of one slide, and its hash, which is computed when it is first asked for; thread-safe."""

    def __init__(self, path: Path, *, keep: bool = False, number: int = 1) -> None:
        """Describe the slide.

        Args:
            path: the slide.
            keep: write its own name.
            number: its place among the inputs, by which it is called while it cannot be read.
        """
        self.path, self.keep = path, keep
        self.number_text = f"slide {number}"
        """What it is called while it cannot be read."""
        self.files: tuple[Path, ...] = (path,)
        """All files of the slide, once it is open."""
        self._sha256: str | None = None
        self._lock = threading.Lock()

    @property
    def sha256(self) -> str:
        """Of the slide, see :func:`~staindiffuser.client.run_record.slide_sha256`.

        Raises:
            SlideReadError: a file cannot be read.
        """
        with self._lock:
            if self._sha256 is None:
                self._sha256 = slide_sha256(self.files)
            return self._sha256

    @property
    def shown(self) -> str:
        """The name for files and logs: ``slide-3f9ac2d41b7e``, or the slide's own."""
        if self.keep:
            return self.path.name
        try:
            regular = all(stat.S_ISREG(file.stat().st_mode) for file in self.files)  # a FIFO would be waited for
            return slide_identity(self.sha256) if regular else self.number_text
        except (OSError, ValueError, InputError):
            return self.number_text

    def hidden(self, text: str) -> str:
        """The text with this slide's name and path replaced, unless they are kept."""
        if self.keep:
            return text
        folder = default_output(self.path).name
        text = _replaced(text, _spellings(self.path), lambda: self.shown)
        return _replaced(text, [folder, printable(folder)], lambda: f"{self.shown.replace(' ', '-')}-stained")


def hide_arguments(text: str, inputs: Sequence[Path]) -> str:
    """The text with the inputs of a command replaced by their places."""
    for number, path in enumerate(inputs, 1):
        text = _replaced(text, _spellings(path), f"input {number}".__str__)
    return text


def find_slide(run: RunRecord, places: Sequence[Path] = ()) -> Path:
    """The slide that a result was made from.

    Args:
        run: of the result.
        places: slides, or folders of them, to search if the result does not tell its path, or it has moved.

    Raises:
        InputError: none of them is the slide.
    """
    own = [] if run.input.path is None else [Path(run.input.path)]
    if own and own[0].exists() and not places:
        return own[0]
    candidates = list(_files(places))
    for path in candidates:
        with contextlib.suppress(InputError, OSError):
            if path.stat().st_size == run.input.bytes and slide_sha256([path]) == run.input.sha256:
                return path
    for path in candidates:  # a slide of several files is larger than the one that is opened
        with contextlib.suppress(InputError, OSError):
            if path.stat().st_size >= run.input.bytes:
                continue
            with open_slide(path) as slide:
                several = len(slide.files) > 1 and slide.size == run.input.size
                if several and slide_sha256(slide.files) == run.input.sha256:
                    return path
    name = own[0] if own else slide_identity(run.input.sha256)
    where = "is not among the slides given" if places else "is needed: say where it is"
    raise InputError(f"the H&E slide of this result, {name}, {where}")


def _files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        yield from sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]


def _spellings(path: Path) -> list[str]:
    """How messages of ours, of Python and of libraries write a path."""
    absolute = path.absolute()
    whole = {str(path), str(absolute)}
    if len(path.name) > 2:
        whole.add(path.name)
    return [form for text in whole for form in (text, printable(text), repr(text)[1:-1], ascii(text)[1:-1])]


def _replaced(text: str, spellings: Sequence[str], by: Callable[[], str]) -> str:
    longest_first = sorted({spelling for spelling in spellings if spelling not in (".", "/")}, key=len, reverse=True)
    if not longest_first:
        return text
    # Beside a slide of several files lies a folder of its name: S26-1.mrxs, S26-1/Slidedat.ini.
    folders = "|".join(re.escape(str(Path(spelling).with_suffix(""))) for spelling in longest_first)
    whole = "|".join(map(re.escape, longest_first))
    return re.sub(rf"(?<![\w.\-])(?:(?:{whole})(?!\w)|(?:{folders})(?=/))", lambda _: by(), text)
