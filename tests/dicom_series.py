"""Writes DICOM whole slides for tests: one file per level, and a label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

__all__ = ["BASE", "LABEL_GREEN", "REDUCED", "write_instance", "write_series"]

LABEL_GREEN = (10, 250, 10)
BASE = ("ORIGINAL", "PRIMARY", "VOLUME", "NONE")
REDUCED = ("DERIVED", "PRIMARY", "VOLUME", "RESAMPLED")


def write_series(
    folder: Path, pixels: np.ndarray, *, levels: int = 2, mark: str = "TEST", **options: Any
) -> list[Path]:
    """A series of ``levels`` files, each half as large as the one before, and ``label.dcm``."""
    folder.mkdir(parents=True, exist_ok=True)
    series = uid.generate_uid()
    paths = []
    for level in range(levels):
        kind = BASE if level == 0 else REDUCED
        path = folder / f"level{level}.dcm"
        write_instance(path, _halved(pixels, level), kind, series, mpp=0.5 * 2**level, mark=mark, **options)
        paths.append(path)
    green = np.full((128, 128, 3), LABEL_GREEN, np.uint8)
    write_instance(folder / "label.dcm", green, ("ORIGINAL", "PRIMARY", "LABEL", "NONE"), series, mpp=0.5, mark=mark)
    return paths


def write_instance(
    path: Path,
    pixels: np.ndarray,
    kind: Sequence[str],
    series: str,
    *,
    mpp: float,
    mark: str = "TEST",
    syntax: str = uid.JPEGBaseline8Bit,
    photometric: str | None = None,
    tile: int = 128,
    part: tuple[int, int] | None = None,
    frames: slice = slice(None),
    **changes: Any,
) -> None:
    """One VL whole slide microscopy image, tiled fully.

    Args:
        path: the file.
        pixels: uint8 [H, W, 3].
        kind: ImageType.
        series: SeriesInstanceUID.
        mpp: µm per pixel.
        mark: planted wherever a name can stand.
        syntax: transfer syntax.
        photometric: of the pixels; by default what fits the syntax.
        tile: side of the frames.
        part: (number, total) of a concatenation.
        frames: those of all that this file holds.
        changes: attributes to set or, if None, to delete.
    """
    height, width = pixels.shape[:2]
    rows, columns = -(-height // tile), -(-width // tile)
    padded = np.pad(pixels, ((0, rows * tile - height), (0, columns * tile - width), (0, 0)), mode="edge")
    corners = [(y, x) for y in range(0, rows * tile, tile) for x in range(0, columns * tile, tile)]
    default = {uid.JPEGBaseline8Bit: "YBR_FULL_422", uid.JPEG2000Lossless: "YBR_RCT"}.get(uid.UID(syntax), "RGB")
    photometric = photometric or default
    tiles = [np.ascontiguousarray(padded[y : y + tile, x : x + tile]) for y, x in corners]
    encoded = [_encoded(pixels, syntax, photometric) for pixels in tiles]
    first = range(len(encoded))[frames].start
    encoded = encoded[frames]

    dataset = Dataset()
    dataset.SOPClassUID = uid.VLWholeSlideMicroscopyImageStorage
    dataset.SOPInstanceUID = uid.generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = _uid(series, "study"), series
    dataset.FrameOfReferenceUID = _uid(series, "frame")
    dataset.Modality, dataset.ImageType = "SM", list(kind)
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = f"{mark}^Anna", f"{mark}-77", "19600101"
    dataset.AccessionNumber, dataset.InstitutionName = mark[:16], f"Hospital of {mark}"
    dataset.ReferringPhysicianName, dataset.StudyDescription = f"{mark}^Doctor", mark
    dataset.ContainerIdentifier, dataset.Manufacturer = f"{mark}-A1", f"Scanner {mark}"
    dataset.DeviceSerialNumber, dataset.BarcodeValue, dataset.LabelText = mark, mark, mark
    dataset.SeriesNumber, dataset.InstanceNumber, dataset.StudyID = 1, 1, "1"
    dataset.Rows = dataset.Columns = tile
    dataset.TotalPixelMatrixColumns, dataset.TotalPixelMatrixRows = width, height
    dataset.TotalPixelMatrixFocalPlanes, dataset.NumberOfOpticalPaths = 1, 1
    dataset.NumberOfFrames = len(encoded)
    dataset.DimensionOrganizationType = "TILED_FULL"
    dataset.SamplesPerPixel, dataset.PlanarConfiguration, dataset.PixelRepresentation = 3, 0, 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PhotometricInterpretation = 7, photometric
    dataset.ImagedVolumeWidth, dataset.ImagedVolumeHeight = width * mpp / 1000, height * mpp / 1000
    dataset.ImagedVolumeDepth, dataset.FocusMethod, dataset.ExtendedDepthOfField = 0.001, "AUTO", "NO"
    dataset.SpecimenLabelInImage, dataset.BurnedInAnnotation = "NO", "NO"
    dataset.LossyImageCompression = "00"
    dataset.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.001
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 20.0, 40.0
    dataset.TotalPixelMatrixOriginSequence = [origin]
    optical = Dataset()
    optical.OpticalPathIdentifier = "1"
    dataset.OpticalPathSequence = [optical]
    if part is not None:
        dataset.ConcatenationUID = _uid(series, "concatenation")
        dataset.SOPInstanceUIDOfConcatenationSource = _uid(series, "source")
        dataset.InConcatenationNumber, dataset.InConcatenationTotalNumber = part
        dataset.ConcatenationFrameOffsetNumber = first
    if uid.UID(syntax).is_encapsulated:
        dataset.PixelData = encapsulate(encoded)
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    else:
        dataset.PixelData = b"".join(encoded)
        dataset["PixelData"].VR = "OB"
    for name, value in changes.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def _uid(*parts: str) -> str:
    return str(uid.generate_uid(entropy_srcs=list(parts)))


def _encoded(tile: np.ndarray, syntax: str, photometric: str) -> bytes:
    if syntax == uid.JPEGBaseline8Bit:
        out = "RGB" if photometric == "RGB" else "YCBCR"
        return bytes(imagecodecs.jpeg8_encode(tile, level=92, colorspace="RGB", outcolorspace=out, subsampling="444"))
    if syntax in (uid.JPEG2000Lossless, uid.JPEG2000):
        return bytes(imagecodecs.jpeg2k_encode(tile, reversible=True, codecformat="j2k", mct=photometric != "RGB"))
    return tile.tobytes()


def _halved(pixels: np.ndarray, times: int) -> np.ndarray:
    for _ in range(times):
        height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
        quarters = pixels[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).astype(np.uint16)
        pixels = ((quarters.sum(axis=(1, 3)) + 2) // 4).astype(np.uint8)
    return pixels
