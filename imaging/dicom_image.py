"""DICOM out: the levels of a finished OME-TIFF as VL Whole Slide Microscopy Image instances (PS3.3, A.32.8).

They are DERIVED and refer to the instances that they were computed from. The JPEG frames are the OME-TIFF's, byte for
byte. Nothing of the source's patient, study or specimen is copied unless it is asked for.
"""

from __future__ import annotations

import datetime
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pydicom
import tifffile
from PIL import ImageCms
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from staindiffuser.imaging.ome_tiff import SIDE
from staindiffuser.imaging.ome_xml import ImageInfo

__all__ = ["DicomSource", "new_uid", "read_dicom_source", "write_dicom"]

_COPIED = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
    "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber", "StudyDescription", "ContainerIdentifier",
    "IssuerOfTheContainerIdentifierSequence", "ContainerTypeCodeSequence", "SpecimenDescriptionSequence",
    "AcquisitionDateTime",
)  # fmt: skip
"""Of the patient, the study and the specimen, on request."""
_GEOMETRY = (
    "FrameOfReferenceUID", "PositionReferenceIndicator", "ImageOrientationSlide", "TotalPixelMatrixOriginSequence",
)  # fmt: skip
_BASIC_OFFSETS = 2**32 - 2**20
"""Bytes of frames up to which a Basic Offset Table can point at them."""


@dataclass(frozen=True, kw_only=True)
class DicomSource:
    """The DICOM series of the slide."""

    series: str
    study: str
    instances: tuple[tuple[str, str], ...]
    """SOP class and SOP instance UID of the instances of full resolution."""
    copied: Dataset
    """Attributes that the result shares: where the pixels lie on the slide and, on request, whose they are."""


def read_dicom_source(files: Sequence[Path], *, identity: bool) -> DicomSource:
    """What a result may say of the series that it is derived from.

    Args:
        files: of the series.
        identity: also patient, study and specimen.
    """
    refer = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "ImageType"]
    tags = [*refer, "TotalPixelMatrixColumns", *_GEOMETRY, *_COPIED]
    headers = [pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags)) for path in files]
    width = max(int(header.TotalPixelMatrixColumns) for header in headers)
    largest = [header for header in headers if int(header.TotalPixelMatrixColumns) == width]
    copied = Dataset()
    for name in (*_GEOMETRY, *(_COPIED if identity else ())):
        if name in largest[0]:
            copied[name] = largest[0][name]
    return DicomSource(
        series=str(largest[0].SeriesInstanceUID),
        study=str(largest[0].StudyInstanceUID),
        instances=tuple((str(header.SOPClassUID), str(header.SOPInstanceUID)) for header in largest),
        copied=copied,
    )


def write_dicom(image: Path, folder: Path, info: ImageInfo, *, study: str, source: DicomSource | None) -> None:
    """Write a series, a file per level.

    Args:
        image: RGB OME-TIFF that :mod:`staindiffuser.imaging.ome_tiff` wrote.
        folder: to make.
        info: what the image says of itself.
        study: StudyInstanceUID, if the source does not lend its own: that of all images of a result.
        source: the series of the slide; None if it is not DICOM.
    """
    folder.mkdir()
    common = _common(info, study, source)
    with tifffile.TiffFile(image) as tiff:
        levels = [cast("tifffile.TiffPage", level.pages[0]).keyframe for level in tiff.series[0].levels]
        for number, page in enumerate(levels):
            instance = _instance(common, info, number, (page.imagewidth, page.imagelength), levels[0])
            frames = list(zip(page.dataoffsets, page.databytecounts, strict=True))
            _write(folder / f"level-{number}.dcm", instance, tiff, frames)


def new_uid() -> str:
    """A UID that no one else has (PS3.5, B.2)."""
    return f"2.25.{uuid.uuid4().int}"


def _common(info: ImageInfo, study: str, source: DicomSource | None) -> Dataset:
    """What all instances of the series share."""
    now = datetime.datetime.now(datetime.UTC)
    common = Dataset()
    common.SpecificCharacterSet = "ISO_IR 192"
    for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"):
        setattr(common, name, "")
    common.ReferringPhysicianName = common.AccessionNumber = ""
    common.StudyInstanceUID, common.SeriesInstanceUID = study, new_uid()
    common.Modality, common.SeriesNumber = "SM", 1
    common.SeriesDescription = f"{info.channels[0].name} (virtual)"[:64]
    common.FrameOfReferenceUID, common.PositionReferenceIndicator = new_uid(), "SLIDE_CORNER"
    common.Manufacturer, common.ManufacturerModelName = "StainDiffuser", info.about.get("model", "unknown")[:64]
    common.DeviceSerialNumber, common.SoftwareVersions = "none", info.creator[:64]
    common.ContentDate, common.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    common.AcquisitionDateTime = now.strftime("%Y%m%d%H%M%S")
    common.AcquisitionContextSequence = []
    common.ContainerIdentifier = "unknown"
    common.IssuerOfTheContainerIdentifierSequence = common.ContainerTypeCodeSequence = []
    specimen = Dataset()
    specimen.SpecimenIdentifier, specimen.SpecimenUID = "unknown", new_uid()
    specimen.IssuerOfTheSpecimenIdentifierSequence = specimen.SpecimenPreparationSequence = []
    common.SpecimenDescriptionSequence = [specimen]
    common.ImageOrientationSlide = [0, 1, 0, 1, 0, 0]
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0
    common.TotalPixelMatrixOriginSequence = [origin]
    common.OpticalPathSequence = [_optical_path()]
    common.NumberOfOpticalPaths = common.TotalPixelMatrixFocalPlanes = 1
    common.DimensionOrganizationType = "TILED_FULL"
    organization = Dataset()
    organization.DimensionOrganizationUID = new_uid()
    common.DimensionOrganizationSequence = [organization]
    common.VolumetricProperties = "VOLUME"
    common.SpecimenLabelInImage = common.BurnedInAnnotation = common.ExtendedDepthOfField = "NO"
    common.FocusMethod = "AUTO"
    common.ImageComments = info.description[:10240]
    common.DerivationDescription = info.description[:1024]
    common.SamplesPerPixel, common.PlanarConfiguration, common.PhotometricInterpretation = 3, 0, "YBR_FULL_422"
    common.BitsAllocated = common.BitsStored = 8
    common.HighBit, common.PixelRepresentation = 7, 0
    common.Rows = common.Columns = SIDE
    common.LossyImageCompression, common.LossyImageCompressionMethod = "01", "ISO_10918_1"
    if source is not None:
        _add(common, source.copied)
        common.ReferencedSeriesSequence = [_referenced_series(source)]
        common.SourceImageSequence = [_source_image(*instance) for instance in source.instances]
        if source.study != common.StudyInstanceUID:
            other = Dataset()
            other.StudyInstanceUID = source.study
            other.ReferencedSeriesSequence = common.ReferencedSeriesSequence
            del common.ReferencedSeriesSequence
            common.StudiesContainingOtherReferencedInstancesSequence = [other]
    return common


def _instance(common: Dataset, info: ImageInfo, level: int, size: tuple[int, int], base: Any) -> Dataset:
    """Everything of one level but its pixels."""
    instance = Dataset()
    _add(instance, common)
    instance.SOPClassUID, instance.SOPInstanceUID = uid.VLWholeSlideMicroscopyImageStorage, new_uid()
    instance.InstanceNumber = level + 1
    instance.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED" if level else "NONE"]
    width, height = size
    instance.TotalPixelMatrixColumns, instance.TotalPixelMatrixRows = width, height
    instance.NumberOfFrames = -(-width // SIDE) * -(-height // SIDE)
    spacing = [info.mpp[1] * base.imagelength / height / 1000, info.mpp[0] * base.imagewidth / width / 1000]
    instance.ImagedVolumeWidth = info.mpp[0] * base.imagewidth / 1000
    instance.ImagedVolumeHeight = info.mpp[1] * base.imagelength / 1000
    instance.ImagedVolumeDepth = 1.0
    measures, kind, path = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [f"{value:.10g}" for value in spacing]
    measures.SliceThickness = "0.001"
    kind.FrameType = instance.ImageType
    path.OpticalPathIdentifier = "1"
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    shared.WholeSlideMicroscopyImageFrameTypeSequence = [kind]
    shared.OpticalPathIdentificationSequence = [path]
    instance.SharedFunctionalGroupsSequence = [shared]
    return instance


def _add(dataset: Dataset, other: Dataset) -> None:
    for element in other:
        dataset.add(element)


def _optical_path() -> Dataset:
    path = Dataset()
    path.OpticalPathIdentifier = "1"
    path.IlluminationTypeCodeSequence = [_code("111744", "DCM", "Brightfield illumination")]
    path.IlluminationColorCodeSequence = [_code("414298005", "SCT", "Full Spectrum")]
    path.ICCProfile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path.ColorSpace = "SRGB"
    return path


def _referenced_series(source: DicomSource) -> Dataset:
    series = Dataset()
    series.SeriesInstanceUID = source.series
    series.ReferencedInstanceSequence = [_reference(*instance) for instance in source.instances]
    return series


def _reference(class_uid: str, instance_uid: str) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = class_uid, instance_uid
    return reference


def _source_image(class_uid: str, instance_uid: str) -> Dataset:
    reference = _reference(class_uid, instance_uid)
    reference.PurposeOfReferenceCodeSequence = [_code("121322", "DCM", "Source image for image processing operation")]
    return reference


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _write(path: Path, instance: Dataset, tiff: tifffile.TiffFile, frames: Sequence[tuple[int, int]]) -> None:
    """Write the header, then the frames one by one: the pixels are never in memory together."""
    lengths = [length + length % 2 for _, length in frames]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length + 8)
    plain = int(instance.TotalPixelMatrixColumns) * int(instance.TotalPixelMatrixRows) * 3
    instance.LossyImageCompressionRatio = f"{max(1.0, plain / max(1, sum(lengths))):.4g}"
    basic = starts[-1] < _BASIC_OFFSETS
    if not basic:
        instance.ExtendedOffsetTable = struct.pack(f"<{len(frames)}Q", *starts[:-1])
        instance.ExtendedOffsetTableLengths = struct.pack(f"<{len(frames)}Q", *lengths)
    instance.file_meta = FileMetaDataset()
    instance.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    instance.file_meta.MediaStorageSOPClassUID = instance.SOPClassUID
    instance.file_meta.MediaStorageSOPInstanceUID = instance.SOPInstanceUID
    pydicom.dcmwrite(path, instance, enforce_file_format=True)
    with path.open("ab") as file:
        file.write(struct.pack("<HH2s2xI", 0x7FE0, 0x0010, b"OB", 0xFFFFFFFF))
        table = struct.pack(f"<{len(frames)}I", *starts[:-1]) if basic else b""
        file.write(struct.pack("<HHI", 0xFFFE, 0xE000, len(table)) + table)
        for offset, length in frames:
            tiff.filehandle.seek(offset)
            data = tiff.filehandle.read(length)
            file.write(struct.pack("<HHI", 0xFFFE, 0xE000, length + length % 2) + data + b"\0" * (length % 2))
        file.write(struct.pack("<HHI", 0xFFFE, 0xE0DD, 0))
