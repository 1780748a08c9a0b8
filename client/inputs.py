"""Which slides to stain, and into which folders: files, folders, patterns and lists."""

from __future__ import annotations

import csv
import dataclasses
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from staindiffuser.errors import InputError, UsageError
from staindiffuser.imaging.slides.kinds import is_slide_folder, is_zarr

__all__ = ["SlideInput", "default_output", "find_inputs"]

SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .mrxs .scn .svslide .bif .vms .vmu .png .jpg .jpeg".split()  # noqa: SIM905 - a list to read
)
"""Files of a folder that are slides or tiles."""
LIST_COLUMNS = ("slide", "mpp", "output")


@dataclass(frozen=True, kw_only=True)
class SlideInput:
    """A slide to stain."""

    path: Path
    output: Path
    """The result folder."""
    named: bool = False
    """Whether the user named the folder; else it is named after the slide."""
    mpp: float | None = None
    """Pixel size from a list, µm per pixel."""

    def absolute(self) -> SlideInput:
        """The same, for a process with another current folder."""
        return dataclasses.replace(self, path=self.path.absolute(), output=self.output.absolute())


def find_inputs(inputs: Sequence[Path], output: Path | None) -> list[SlideInput]:
    """Expand folders, patterns and lists, and choose the result folder of each slide.

    Args:
        inputs: files; folders, whose slides are taken; patterns such as ``*.svs``; lists (``.csv``) with the columns
            ``slide`` and, optionally, ``mpp`` and ``output``, with paths relative to the list.
        output: the result folder of a single file, or the parent of all result folders.

    Raises:
        InputError: a folder, pattern or list holds no slide.
        UsageError: a list is malformed, or two slides would share a result folder.
    """
    found: dict[Path, tuple[float | None, Path | None]] = {}
    for given in inputs:
        for path, mpp, folder in _expanded(given):
            found.setdefault(path, (mpp, folder))
    if len(found) == 1 and list(found) == list(inputs):
        (path,) = found
        named = output is not None
        return [SlideInput(path=path, output=output if output is not None else default_output(path), named=named)]
    slides = [
        SlideInput(path=path, output=(output or Path()) / (folder or default_output(path)), named=bool(folder), mpp=mpp)
        for path, (mpp, folder) in found.items()
    ]
    by_output: dict[Path, Path] = {}
    for slide in slides:
        other = by_output.setdefault(slide.output, slide.path)
        if other != slide.path:
            raise UsageError(
                f"{other} and {slide.path} would share the result folder {slide.output}: stain them separately with "
                "--output, or name outputs in a list"
            )
    return slides


def default_output(path: Path) -> Path:
    """``./<slide>-stained``, where ``<slide>`` is the file name without ``.svs``, ``.ome.tif`` and the like."""
    if path.is_dir() and path.suffix.lower() != ".zarr":
        return Path(f"{path.name or path.resolve().name}-stained")
    stem = re.sub(r"(\.ome)?\.[A-Za-z0-9]{1,5}$", "", path.name) or path.name
    return Path(f"{stem}-stained")


def _expanded(given: Path) -> Iterator[tuple[Path, float | None, Path | None]]:
    try:
        is_folder, exists = given.is_dir(), given.exists()
    except OSError:  # such as a name that is too long: opening it will say so
        is_folder, exists = False, True
    if is_folder:
        if is_slide_folder(given):
            yield from ((path, None, None) for path in _slides_of(given))
            return
        paths = [path for path in sorted(given.iterdir()) if not path.name.startswith(".")]
        slides = [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
        slides += [slide for path in paths if path.is_dir() and is_slide_folder(path) for slide in _slides_of(path)]
        if not slides:
            raise InputError(f"{given} holds no slides ({', '.join(sorted(SUFFIXES))})")
        yield from ((path, None, None) for path in slides)
    elif exists and given.suffix.lower() == ".csv":
        yield from _listed(given)
    elif not exists and glob.has_magic(str(given)):
        matches = sorted(Path(path) for path in glob.glob(str(given), recursive=True))  # noqa: PTH207 - absolute ones too
        if not matches:
            raise InputError(f"no file matches {given}")
        yield from ((path, None, None) for path in matches)
    else:
        yield given, None, None


def _slides_of(folder: Path) -> list[Path]:
    """The slides in a folder that is one, or that holds the files of DICOM slides: then one file stands for each."""
    if is_zarr(folder):
        return [folder]
    from staindiffuser.imaging.slides.dicom_file import dicom_series

    series = dicom_series(folder)
    return [folder] if len(series) == 1 else [files[0] for files in series]


def _listed(path: Path) -> Iterator[tuple[Path, float | None, Path | None]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a list: {error}") from error
    rows = csv.DictReader(text.splitlines())
    columns = [name.strip().lower() for name in rows.fieldnames or ()]
    if "slide" not in columns or not set(columns) <= set(LIST_COLUMNS):
        raise UsageError(f"{path} must have the column slide and may have mpp and output, not {', '.join(columns)}")
    rows.fieldnames = columns
    count = 0
    for row in rows:
        values = {name: (row[name] or "").strip() for name in columns}
        if not values["slide"]:
            raise UsageError(f"{path}, line {rows.line_num}: slide is empty")
        try:
            mpp = float(values["mpp"]) if values.get("mpp") else None
        except ValueError:
            raise UsageError(f"{path}, line {rows.line_num}: mpp is not a number: {values['mpp']!r}") from None
        if mpp is not None and not 0.01 <= mpp <= 100:
            raise UsageError(f"{path}, line {rows.line_num}: mpp must be from 0.01 to 100 µm, not {mpp:g}")
        output = Path(values["output"]) if values.get("output") else None
        count += 1
        yield path.parent / values["slide"], mpp, output
    if not count:
        raise InputError(f"{path} lists no slides")
