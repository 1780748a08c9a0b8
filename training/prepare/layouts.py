"""How public data sets lay out their paired images: partners, splits, slides, pixel sizes.

A layout turns a folder into :class:`Pair` records by names alone; :mod:`.importing` reads and cuts the images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from staindiffuser.errors import UsageError
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.paired_tiles import Split
from staindiffuser.training.tiles.stain_names import is_stain_name

__all__ = ["LAYOUTS", "Asked", "Layout", "Pair", "Panel", "find_pairs"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One image of a pair: a file, or one of several images of equal width that stand side by side in it."""

    path: Path
    index: int = 0
    """Which of them, counted from the left."""
    of: int = 1
    """How many there are."""
    form: Literal["image", "fluorescence", "classes", "mask"] = "image"
    """What the pixels are: a brightfield image; channels of fluorescence, to be drawn as one; DeepLIIF's classes
    (positive cells red, negative blue, outlines green); a mask."""
    channels: tuple[int, int] = (0, 2)
    """Of fluorescence: the marker's channel and that of the nuclei."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An H&E image and its IHC images, as they stand in the source."""

    name: str
    """Of the H&E, without suffix; unique within the split."""
    slide: str
    slide_known: bool
    """False: the layout does not say which slide the image is from, and it counts as one of its own."""
    split: Split | None
    """None: the source has no splits."""
    he: Panel
    stains: Mapping[str, Panel]
    masks: Mapping[str, Panel]
    """Of the stains that have one in the source."""
    patient: str | None = None
    """None: nobody says whose tissue it is."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user may say about a source."""

    stains: tuple[str, ...] = ()
    """Names the stain where the layout does not, chooses among stains where it does."""
    slide_pattern: re.Pattern[str] | None = None
    """Its first group, searched in an image's name, is the slide."""
    patient_pattern: re.Pattern[str] | None = None
    """Its first group, searched in an image's name, is the patient."""
    swap: bool = False
    """pix2pix: the H&E is the right image."""
    channels: tuple[str, ...] = ("panck", "cd3", "dapi")
    """hemit: what the label's red, green and blue channels are."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Folders that belong together: equal names are partners."""

    split: Split | None
    he: Panel
    """``path`` is a folder."""
    stains: Mapping[str, Panel]
    masks: Mapping[str, Panel] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One of the layouts that can be imported."""

    expected: str
    """In words, for people who point at the wrong folder."""
    parts: Callable[[Path, Asked], Iterator[_Part]]
    mpp: float | None = None
    """Pixel size, µm, where the publication states it."""
    slide: re.Pattern[str] | None = None
    """As :attr:`Asked.slide_pattern`, where names say it."""
    nested: bool = False
    """Images may lie in folders below, which then are slides."""
    notes: tuple[str, ...] = ()
    """What a user should know of the data."""


def find_pairs(name: str, source: Path, asked: Asked) -> tuple[Pair, ...]:
    """All pairs of ``source``, by split and name.

    Raises:
        DataError: another layout, an image without a partner, or no images; naming the file, and saying what was
            expected and what was seen.
        UsageError: ``asked`` does not fit the layout.
    """
    layout = LAYOUTS[name]
    if not source.is_dir():
        raise DataError(f"{source} is not a folder")
    parts = list(layout.parts(source, asked))
    if not parts:
        seen = ", ".join(sorted(entry.name for entry in source.iterdir())[:8]) or "nothing"
        raise DataError(f"{source} is not laid out as {name!r}: expected {layout.expected}; it holds {seen}")
    pairs = tuple(pair for part in parts for pair in _pairs(part, layout, asked))
    if not pairs:
        raise DataError(f"{source}: no images in {', '.join(str(part.he.path) for part in parts)}")
    return pairs


def _pairs(part: _Part, layout: Layout, asked: Asked) -> Iterator[Pair]:
    panels = (part.he, *part.stains.values(), *part.masks.values())
    files = {path: _images(path, layout.nested) for path in {panel.path for panel in panels}}
    columns = {**part.stains, **{f"{stain}_mask": panel for stain, panel in part.masks.items()}}
    he = files[part.he.path]
    for column, panel in columns.items():
        for here, there in ((part.he, panel), (panel, part.he)):
            lonely = sorted(set(files[here.path]) - set(files[there.path]))
            if lonely:
                path = files[here.path][lonely[0]]
                more = f", nor have {len(lonely) - 1} others" if len(lonely) > 1 else ""
                kind = column if there is panel else "H&E"
                raise DataError(f"{path} has no partner ({kind}) {there.path / lonely[0]}{more}")
    for name, path in sorted(he.items()):
        found = _asked_of_name(asked.slide_pattern, path, name, "slide")
        if found is None and layout.slide and (match := layout.slide.search(name)):
            found = match.group(1)
        if found:
            known, slide_name = True, found
        elif "/" in name:
            known, slide_name = True, name.rpartition("/")[0]
        else:
            known, slide_name = False, f"{part.split}/{name}" if part.split else name

        def file(panel: Panel, name: str = name) -> Panel:
            return replace(panel, path=files[panel.path][name])

        yield Pair(
            name=name,
            slide=slide_name,
            slide_known=known,
            split=part.split,
            he=file(part.he),
            stains={stain: file(panel) for stain, panel in part.stains.items()},
            masks={stain: file(panel) for stain, panel in part.masks.items()},
            patient=_asked_of_name(asked.patient_pattern, path, name, "patient"),
        )


def _asked_of_name(pattern: re.Pattern[str] | None, path: Path, name: str, what: str) -> str | None:
    """What a user's pattern finds in an image's name; None without a pattern."""
    if pattern is None:
        return None
    found = pattern.search(name)
    if not (found and found.group(1)):
        raise DataError(f"{path}: its name does not match the {what} pattern {pattern.pattern!r}")
    return found.group(1)


def _images(folder: Path, nested: bool) -> dict[str, Path]:
    """The images of a folder, by their path in it without suffix."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: its images are missing")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*") if nested else folder.iterdir()):
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file():
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise DataError(f"{path} and {found[name]} have the same name: keep one")
            found[name] = path
    return found


def _folders(source: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(source.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def _splits(source: Path) -> list[tuple[Split, Path]]:
    """The split folders in ``source``."""
    return [
        (_SPLIT_NAMES[name.lower()], path) for name, path in _folders(source).items() if name.lower() in _SPLIT_NAMES
    ]


def _stain(name: str) -> str:
    stain = name.lower()
    if not is_stain_name(stain):
        raise UsageError(f"{name!r} cannot name a stain ([a-z][a-z0-9_]*): give its name with --stain")
    return stain


def _one_stain(asked: Asked, default: str | None, layout: str) -> str:
    if len(asked.stains) > 1:
        raise UsageError(f"--stain: layout {layout!r} has one stain, not {', '.join(asked.stains)}")
    if not asked.stains and default is None:
        raise UsageError(f"--stain: layout {layout!r} does not say which stain it holds; name it, such as --stain her2")
    return _stain(asked.stains[0] if asked.stains else str(default))


def _bci(source: Path, asked: Asked) -> Iterator[_Part]:
    he, ihc = source / "HE", source / "IHC"
    if he.is_dir() and ihc.is_dir():
        stain = _one_stain(asked, "her2", "bci")
        here, there = dict(_splits(he)), dict(_splits(ihc))
        for split in (*here, *(split for split in there if split not in here)):
            yield _Part(
                split=split,
                he=Panel(path=here.get(split, he / split)),
                stains={stain: Panel(path=there.get(split, ihc / split))},
            )


def _mist(source: Path, asked: Asked) -> Iterator[_Part]:
    base, name = _mist_base(source, asked)
    if base is not None:
        stain = _one_stain(asked, name, "mist")
        for split in ("train", "val"):
            if any((base / f"{split}{side}").is_dir() for side in "AB"):
                he, ihc = Panel(path=base / f"{split}A"), Panel(path=base / f"{split}B")
                yield _Part(split="train" if split == "train" else "val", he=he, stains={stain: ihc})


def _mist_base(source: Path, asked: Asked) -> tuple[Path | None, str]:
    """The folder that holds trainA, and the stain that it is of."""
    if (source / "trainA").is_dir():
        return source, (source.resolve().parent if source.resolve().name == "TrainValAB" else source.resolve()).name
    if (source / "TrainValAB" / "trainA").is_dir():
        return source / "TrainValAB", source.resolve().name
    stains = {name: path for name, path in _folders(source).items() if (path / "TrainValAB" / "trainA").is_dir()}
    chosen = {name: path for name, path in stains.items() if not asked.stains or name.lower() in asked.stains}
    if len(chosen) == 1:
        name, path = next(iter(chosen.items()))
        return path / "TrainValAB", name
    if stains:
        raise UsageError(
            f"--stain: {source} holds {', '.join(stains)}, each of other tissue; choose one for each folder of tiles"
        )
    return None, ""


def _hemit(source: Path, asked: Asked) -> Iterator[_Part]:
    markers = {name: number for number, name in enumerate(asked.channels)}
    if sorted(markers.values()) != [0, 1, 2] or "dapi" not in markers:
        raise UsageError(f"--channels {','.join(asked.channels)}: name three channels, one of them dapi")
    nuclei = markers.pop("dapi")
    for stain in asked.stains:
        if stain not in markers:
            raise UsageError(f"--stain {stain}: layout 'hemit' has {', '.join(markers)}")
    for split, folder in _splits(source):
        if (folder / "input").is_dir() or (folder / "label").is_dir():
            yield _Part(
                split=split,
                he=Panel(path=folder / "input"),
                stains={
                    _stain(name): Panel(path=folder / "label", form="fluorescence", channels=(number, nuclei))
                    for name, number in markers.items()
                    if not asked.stains or name in asked.stains
                },
            )


def _pix2pix(source: Path, asked: Asked) -> Iterator[_Part]:
    for split, folder in _splits(source):
        he, ihc = (1, 0) if asked.swap else (0, 1)
        yield _Part(
            split=split,
            he=Panel(path=folder, index=he, of=2),
            stains={_one_stain(asked, None, "pix2pix"): Panel(path=folder, index=ihc, of=2)},
        )


_DEEPLIIF = re.compile(r"(?:BC-)?DeepLIIF_(Training|Validation|Testing)_Set", re.IGNORECASE)
_DEEPLIIF_PANELS = ("ihc", "hematoxylin", "dapi", "lap2", "marker", "seg")


def _deepliif(source: Path, asked: Asked) -> Iterator[_Part]:
    found = _splits(source)
    for name, path in _folders(source).items():
        if match := _DEEPLIIF.fullmatch(name):
            found.append((_SPLIT_NAMES[match.group(1).lower()], path))
    for split, folder in found:
        ihc, he, seg = (_DEEPLIIF_PANELS.index(name) for name in ("ihc", "hematoxylin", "seg"))
        stain, of = _one_stain(asked, "ki67", "deepliif"), len(_DEEPLIIF_PANELS)
        yield _Part(
            split=split,
            he=Panel(path=folder, index=he, of=of),
            stains={stain: Panel(path=folder, index=ihc, of=of)},
            masks={stain: Panel(path=folder, index=seg, of=of, form="classes")},
        )


def _folder(source: Path, asked: Asked) -> Iterator[_Part]:
    splits: list[tuple[Split | None, Path]] = [*_splits(source)]
    for split, base in splits or [(None, source)]:
        folders = {name.lower(): path for name, path in _folders(base).items()}
        if "he" not in folders:
            continue
        stains = [name for name in folders if name != "he" and not name.endswith("_mask")]
        for stain in asked.stains:
            if stain not in stains:
                raise DataError(f"{base}: no folder {stain!r}; it has {', '.join(stains) or 'no stains'}")
        chosen = list(asked.stains) or stains
        if chosen:
            yield _Part(
                split=split,
                he=Panel(path=folders["he"]),
                stains={_stain(name): Panel(path=folders[name]) for name in chosen},
                masks={
                    name: Panel(path=folders[f"{name}_mask"], form="mask")
                    for name in chosen
                    if f"{name}_mask" in folders
                },
            )


LAYOUTS: dict[str, Layout] = {
    # Liu et al. 2022 (CVPR Workshops): Hamamatsu NanoZoomer S60, 0.46 µm per pixel. A name's number is that of the
    # pair and its level that of the whole slide: neither names the slide (README of the data set).
    "bci": Layout(expected="HE/train, HE/test, IHC/train and IHC/test", parts=_bci, mpp=0.46),
    # Li et al. 2023 (MICCAI). Names are <slide>_<column>_<row>; no pixel size is stated with the data.
    "mist": Layout(
        expected="TrainValAB/trainA, trainB, valA and valB, or one folder per stain that holds TrainValAB",
        parts=_mist,
        slide=re.compile(r"^(.+)_\d+_\d+$"),
    ),
    # Bian et al. 2024 (arXiv 2403.18501). Names are [x,y]_patch_<row>_<column>, [x,y] being the region that was
    # scanned; no pixel size is stated with the data.
    "hemit": Layout(
        expected="train, val and test with the folders input and label",
        parts=_hemit,
        slide=re.compile(r"^(\[\d+,\d+\])_patch_"),
        notes=(
            "HEMIT holds fluorescence, no IHC: the IHC images are drawn from it (marker as DAB, DAPI as hematoxylin, "
            "Beer-Lambert), and a cell counts as positive from 15 % of the marker's full scale",
        ),
    ),
    # Isola et al. 2017: A and B side by side.
    "pix2pix": Layout(expected="train, val and test with images of H&E | IHC side by side", parts=_pix2pix),
    # Ghahremani et al. 2022: images of 512² at 40x, that is 0.25 µm. Lung and bladder are named
    # <tissue>_<x>_<y>_<row>_<column>, copies with changed cells having more behind it.
    "deepliif": Layout(
        expected="train, val (or DeepLIIF_Training_Set, …) with rows of six images: IHC, hematoxylin, DAPI, Lap2, "
        "marker, segmentation",
        parts=_deepliif,
        mpp=0.25,
        slide=re.compile(r"^([A-Za-z]+_\d+_\d+)_\d+_\d+"),
        notes=(
            "DeepLIIF holds no H&E: its hematoxylin image stands in its place, so nothing here teaches eosin; "
            "masks are the positive cells of its segmentation",
        ),
    ),
    "folder": Layout(
        expected="he and one folder per stain, or train, val and test with those", parts=_folder, nested=True
    ),
}
"""By name, with what their publications say."""
