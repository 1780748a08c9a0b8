"""DICOM whole slides: a series of files, one or more per level, read with wsidicom.

Any of the files, or the folder that holds them, is the slide. Frames are decoded here, not by wsidicom, because every
decode is checked. Labels, overviews and thumbnails of the series are not read, nor do they count in the slide's hash.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from pydicom import uid
from wsidicom import WsiDicom
from wsidicom.geometry import Point

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import IncompleteSlideError, SlideError, SlideReadError
from staindiffuser.imaging.image_files import WHITE
from staindiffuser.imaging.pixel_size import plausible
from staindiffuser.imaging.slides.codestreams import decode_intact_jpeg, require_intact_jpeg2000
from staindiffuser.imaging.slides.kinds import is_dicom
from staindiffuser.imaging.slides.slide import DamagedRegion, Slide

for _library in ("pydicom", "wsidicom"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)  # what they log quotes headers

__all__ = ["DicomSlide", "dicom_series"]

_HEADER = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "SamplesPerPixel", "BitsAllocated",
    "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns", "TotalPixelMatrixColumns",
    "TotalPixelMatrixRows", "TotalPixelMatrixFocalPlanes", "NumberOfOpticalPaths", "DimensionOrganizationType",
    "ConcatenationUID", "InConcatenationNumber", "InConcatenationTotalNumber",
)  # fmt: skip
"""What is read of an instance: nothing of the patient, nothing of the study."""
_REQUIRED = ("SeriesInstanceUID", "ImageType", "TotalPixelMatrixColumns", "TotalPixelMatrixRows", "Rows", "Columns")
_JPEG = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)
_JPEG2000 = (uid.JPEG2000Lossless, uid.JPEG2000)
_COLOURS = {
    **dict.fromkeys(_JPEG, ("RGB", "YBR_FULL", "YBR_FULL_422")),
    **dict.fromkeys(_JPEG2000, ("RGB", "YBR_ICT", "YBR_RCT")),
}
"""Colour models per transfer syntax; with any other, only RGB."""


def dicom_series(folder: Path) -> list[tuple[Path, ...]]:
    """The files of each whole slide in a folder: of every series, its VOLUME instances, sorted."""
    series: dict[str, list[Path]] = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see DicomSlide
        for path, header in _headers(folder).items():
            if _is_volume(header):
                series[str(header.get("SeriesInstanceUID"))].append(path)
    return [tuple(sorted(paths)) for paths in series.values()]


@dataclass(frozen=True)
class _Level:
    """A level of the pyramid."""

    image: Any
    """wsidicom's image data."""
    size: tuple[int, int]
    tile: tuple[int, int]
    photometric: str
    planar: bool
    transfer_syntax: uid.UID


class DicomSlide(Slide):
    """A DICOM series of VL whole slide microscopy instances."""

    def __init__(self, path: Path, *, allow_damaged: bool = False) -> None:
        """Find the series' files and open them.

        Raises:
            SlideError: instances are missing, damaged, of several slides, or not 8-bit RGB.
        """
        super().__init__(path, allow_damaged=allow_damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote headers, which name patients
            try:
                headers = _instances(path)
                self._files = tuple(sorted(headers))
                _require_complete(path, list(headers.values()))
                self._dicom = WsiDicom.open(self._files)
                try:
                    self._describe(headers)
                except BaseException:
                    self._dicom.close()
                    raise
            except SlideError:
                raise
            except Exception as error:  # wsidicom and pydicom raise nearly anything for damaged files
                raise SlideError(f"{path} is a damaged or incomplete DICOM slide: {_one_line(error)}") from error

    def _describe(self, headers: dict[Path, Any]) -> None:
        base = max(self._dicom.pyramids, key=lambda pyramid: pyramid.size.area)
        if len(self._dicom.pyramids) > 1:
            self.notes += (f"{self.path.name} holds {len(self._dicom.pyramids)} images: only the largest is stained",)
        sizes = {(int(header.TotalPixelMatrixColumns), int(header.TotalPixelMatrixRows)) for header in headers.values()}
        if missing := sizes - {level.size.to_tuple() for pyramid in self._dicom.pyramids for level in pyramid.levels}:
            raise SlideError(f"{self.path} is damaged: its instance of {missing.pop()} pixels cannot be read")
        header = next(iter(headers.values()))
        planar = bool(header.get("PlanarConfiguration", 0))
        levels = sorted(base.levels, key=lambda level: -level.size.width)
        self._levels = [self._level(level.default_instance.image_data, planar) for level in levels]
        self.level_sizes = tuple(level.size for level in self._levels)
        self.exact_levels = tuple(range(len(self._levels)))
        self.chunk = self._levels[0].tile
        self.mpp = plausible(float(base.mpp.width), float(base.mpp.height))
        self.format = "dicom (wsidicom)"
        planes = max(len(level.image.focal_planes) for level in self._levels)
        if planes > 1:
            self.notes += (f"{self.path.name} has {planes} focal planes: the middle one is stained",)
        self._note_sparse_tiles()
        for level in range(len(self._levels)):  # a file that was cut off lacks its last frames
            columns, rows = self._grid(level)
            self._tile(level, columns - 1, rows - 1)

    def _level(self, image: Any, planar: bool) -> _Level:
        syntax = uid.UID(image.transfer_syntax)
        photometric = str(image.photometric_interpretation)
        if len(image.optical_paths) != 1:
            raise SlideError(f"{self.path} has {len(image.optical_paths)} optical paths: H&E has one")
        bits, samples = int(image.bits), int(image.samples_per_pixel)
        if photometric.startswith("MONOCHROME") or (bits, samples) != (8, 3):
            kind = f"{photometric} of {bits} bits and {samples} samples per pixel"
            raise SlideError(f"{self.path} is {kind}: H&E must be 8-bit RGB")
        if photometric not in _COLOURS.get(syntax, ("RGB",)):
            raise SlideError(f"{self.path} has the colour model {photometric} with {syntax.name}: it is not supported")
        size, tile = image.image_size.to_tuple(), image.tile_size.to_tuple()
        return _Level(image, size, tile, photometric, planar, syntax)

    @property
    def files(self) -> tuple[Path, ...]:
        """The VOLUME instances."""
        return self._files

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8Array:
        """See :meth:`Slide.read`."""
        (tile_width, tile_height), size = self._levels[level].tile, self.level_sizes[level]
        region = np.empty((height, width, 3), dtype=np.uint8)
        for row in range(y // tile_height, (y + height - 1) // tile_height + 1):
            for column in range(x // tile_width, (x + width - 1) // tile_width + 1):
                left, top = column * tile_width, row * tile_height
                right, bottom = min(left + tile_width, size[0]), min(top + tile_height, size[1])
                pixels = self._tile(level, column, row)[: bottom - top, : right - left]
                x0, x1, y0, y1 = max(x, left), min(x + width, right), max(y, top), min(y + height, bottom)
                region[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        return region

    def close(self) -> None:
        """Close the files."""
        self._dicom.close()

    def _grid(self, level: int) -> tuple[int, int]:
        """Tiles across and down."""
        (width, height), tile = self.level_sizes[level], self._levels[level].tile
        return -(-width // tile[0]), -(-height // tile[1])

    def _note_sparse_tiles(self) -> None:
        image = self._levels[0].image
        columns, rows = self._grid(0)
        z, optical_path = _middle(image), image.default_path
        absent = sum(image.is_sparse(Point(x, y), z, optical_path) for y in range(rows) for x in range(columns))
        if absent:
            self.notes += (f"{self.path.name}: {absent} of {columns * rows} tiles are not stored: taken for glass",)

    def _tile(self, level: int, column: int, row: int) -> UInt8Array:
        (width, height), tile = self.level_sizes[level], self._levels[level].tile
        try:
            return self._decode(self._levels[level], column, row)
        except SlideError:
            raise
        except OSError as error:
            raise SlideReadError(f"{self.path} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # every codec has its own exception class
            left, top = column * tile[0], row * tile[1]
            region = DamagedRegion(level, left, top, min(tile[0], width - left), min(tile[1], height - top))
            message = SlideError(
                f"{self.path} is damaged: frame ({column}, {row}) of level {level} cannot be decoded: "
                f"{_one_line(error)} (--allow-damaged leaves out such tiles)"
            )
            message.__cause__ = error
            return self._white_if_allowed(region, message)

    def _decode(self, level: _Level, column: int, row: int) -> UInt8Array:
        image, place, shape = level.image, Point(column, row), (level.tile[1], level.tile[0], 3)
        z, optical_path = _middle(image), image.default_path
        if image.is_sparse(place, z, optical_path):
            return np.full(shape, WHITE, np.uint8)
        data: bytes = image.get_encoded_tile(place, z, optical_path)
        pixels: UInt8Array
        if level.transfer_syntax in _JPEG:
            if level.photometric == "RGB" and _says_ycbcr(data):
                raise ValueError("DICOM calls its colours RGB, its JPEG YCbCr")
            # A stream without Adobe's marker is taken for YCbCr, whatever it is.
            pixels = decode_intact_jpeg(data, rgb=level.photometric == "RGB")
        elif level.transfer_syntax in _JPEG2000:
            require_intact_jpeg2000(data)
            pixels = imagecodecs.jpeg2k_decode(data)
        elif not level.transfer_syntax.is_encapsulated:
            flat = np.frombuffer(data, np.uint8, math.prod(shape))
            pixels = np.moveaxis(flat.reshape(3, *shape[:2]), 0, -1) if level.planar else flat.reshape(shape)
        else:
            pixels = np.asarray(image.decoder.decode(data))
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"it is {pixels.dtype} {pixels.shape}, not uint8 {shape}")
        return pixels


def _says_ycbcr(jpeg: bytes) -> bool:
    """Whether a JPEG's own markers, JFIF or Adobe, say that it is YCbCr."""
    head = jpeg[: jpeg.find(b"\xff\xda") + 1]
    adobe = head.find(b"\xff\xee\x00\x0eAdobe")
    return head[adobe + 15] == 1 if adobe >= 0 else head[2:4] == b"\xff\xe0" and head[6:10] == b"JFIF"


def _headers(folder: Path) -> dict[Path, Any]:
    """The headers of the whole-slide instances in a folder, each instance once."""
    headers: dict[Path, Any] = {}
    seen: set[str] = set()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not is_dicom(path):
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER))
        except Exception as error:
            raise SlideError(f"{path} is a damaged DICOM file: {_one_line(error)}") from error
        if header.get("SOPClassUID") == uid.VLWholeSlideMicroscopyImageStorage and header.SOPInstanceUID not in seen:
            seen.add(header.SOPInstanceUID)
            headers[path] = header
    return headers


def _is_volume(header: Any) -> bool:
    kind: list[str] = list(header.get("ImageType") or ())
    return len(kind) < 3 or kind[2] not in ("LABEL", "OVERVIEW", "THUMBNAIL")


def _instances(path: Path) -> dict[Path, Any]:
    """The VOLUME instances of the slide at ``path``: a folder that holds one slide, or any file of a series."""
    headers = _headers(path if path.is_dir() else path.parent)
    if path.is_dir():
        series = {str(header.get("SeriesInstanceUID")) for header in headers.values()}
        if len(series) != 1:
            what = f"{len(series)} DICOM slides: name a file of one of them" if series else "no whole slide in DICOM"
            raise SlideError(f"{path} holds {what}")
    elif path in headers:
        series = {str(headers[path].get("SeriesInstanceUID"))}
    else:
        twin = _sop_instance(path)
        series = {str(h.get("SeriesInstanceUID")) for h in headers.values() if twin and h.SOPInstanceUID == twin}
        if not series:
            raise SlideError(f"{path} is DICOM, but no whole-slide microscopy image")
    volumes = {
        file: header
        for file, header in headers.items()
        if str(header.get("SeriesInstanceUID")) in series and _is_volume(header)
    }
    if not volumes:
        raise SlideError(f"{path} holds only labels, overviews or thumbnails")
    return volumes


def _sop_instance(path: Path) -> str | None:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"])
        return str(header.get("SOPInstanceUID") or "") or None
    except Exception as error:
        raise SlideError(f"{path} is a damaged DICOM file: {_one_line(error)}") from error


def _require_complete(path: Path, headers: Sequence[Any]) -> None:
    """Refuse a series that lacks its largest level, a part of a concatenation, or frames.

    Raises:
        IncompleteSlideError: it does.
    """
    for name in (
        "SeriesInstanceUID",
        "ImageType",
        "TotalPixelMatrixColumns",
        "TotalPixelMatrixRows",
        "Rows",
        "Columns",
    ):
        if any(not header.get(name) and header.get(name) != 0 for header in headers):
            raise SlideError(f"{path} is damaged: an instance lacks {name}")
    if all(len(header.ImageType) > 3 and header.ImageType[3] == "RESAMPLED" for header in headers):
        raise IncompleteSlideError(f"{path} is incomplete: the instance with the full resolution is missing")
    parts = [header for header in headers if header.get("ConcatenationUID")]
    for concatenation in {str(part.ConcatenationUID) for part in parts}:
        group = [part for part in parts if part.ConcatenationUID == concatenation]
        total = max([len(group), *(int(part.get("InConcatenationTotalNumber") or 0) for part in group)])
        if {int(part.InConcatenationNumber) for part in group} != set(range(1, total + 1)):
            raise IncompleteSlideError(
                f"{path} is incomplete: an instance of a level is missing ({len(group)} are there)"
            )
    for header in headers:
        if int(header.get("BitsAllocated") or 8) != 8:
            raise SlideError(f"{path} has {header.BitsAllocated} bits per sample: H&E must be 8-bit RGB")
        if header.get("DimensionOrganizationType") != "TILED_FULL":
            continue
        width, height = int(header.TotalPixelMatrixColumns), int(header.TotalPixelMatrixRows)
        if width < 1 or height < 1 or int(header.Columns) < 1 or int(header.Rows) < 1:
            raise SlideError(f"{path} is damaged: it claims {width} × {height} pixels")
        planes = int(header.get("TotalPixelMatrixFocalPlanes") or 1) * int(header.get("NumberOfOpticalPaths") or 1)
        expected = -(-width // int(header.Columns)) * -(-height // int(header.Rows)) * planes
        whole = header.get("ConcatenationUID")
        same = [other for other in parts if other.ConcatenationUID == whole] if whole else [header]
        frames = sum(int(part.get("NumberOfFrames") or 1) for part in same)
        if frames != expected:
            raise IncompleteSlideError(f"{path} is incomplete: a level has {frames} of {expected} frames")


def _middle(image: Any) -> float:
    """The middle focal plane; wsidicom's own default takes an outer one where planes lie below zero."""
    planes = sorted(image.focal_planes)
    return float(planes[len(planes) // 2])


def _one_line(error: BaseException) -> str:
    """The error without what it quotes from the headers."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", " ".join(str(error).split()))
    return text[:160] or type(error).__name__
