"""``cells.dcm``: the cells of a stain as DICOM Microscopy Bulk Simple Annotations of its image."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import orjson
import pydicom
from numpy.typing import NDArray
from pydicom.sr.coding import Code

import staindiffuser
from staindiffuser.imaging.dicom_image import new_uid

__all__ = ["ANNOTATIONS_FILE", "write_annotations"]

ANNOTATIONS_FILE = "cells.dcm"
_STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
_CELL = Code("4421005", "SCT", "Cell")
_AREA = Code("42798000", "SCT", "Area")
_UM2 = Code("um2", "UCUM", "square micrometer")
_AI = Code("123110", "DCM", "Artificial Intelligence")


def write_annotations(geojson: Path, folder: Path, label: str, scale: tuple[float, float]) -> int:
    """Write the cells of one stain beside the instances of its image; all of them are in memory meanwhile.

    Polygons are in pixels of the image's largest level (2D), each with its area. No cells, no file: DICOM does not know
    an annotation without a graphic.

    Args:
        geojson: as :class:`~staindiffuser.client.cells_file.CellsFile` writes it.
        folder: that :func:`~staindiffuser.imaging.dicom_image.write_dicom` wrote.
        label: of the stain.
        scale: level-0 pixels of the slide per pixel of the image, in x and y.

    Returns:
        The number of cells.
    """
    import highdicom
    from highdicom.ann import AnnotationGroup, Measurements, MicroscopyBulkSimpleAnnotations

    outlines, areas = _cells_of(geojson, label, scale)
    if not outlines:
        return 0
    image = pydicom.dcmread(folder / "level-0.dcm", stop_before_pixels=True)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="StainDiffuser", family=_AI, version=staindiffuser.__version__
    )
    group = AnnotationGroup(
        number=1,
        uid=new_uid(),
        label=f"{label}: cells (virtual)"[:64],
        annotated_property_category=_STRUCTURE,
        annotated_property_type=_CELL,
        graphic_type="POLYGON",
        graphic_data=outlines,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        measurements=[Measurements(name=_AREA, values=areas, unit=_UM2)],
        description=str(image.DerivationDescription)[:1024],
    )
    annotations = MicroscopyBulkSimpleAnnotations(
        source_images=[image],
        annotation_coordinate_type="2D",
        annotation_groups=[group],
        series_instance_uid=new_uid(),
        series_number=2,
        sop_instance_uid=new_uid(),
        instance_number=1,
        manufacturer=str(image.Manufacturer),
        manufacturer_model_name=str(image.ManufacturerModelName),
        software_versions=str(image.SoftwareVersions),
        device_serial_number=str(image.DeviceSerialNumber),
        content_label="VIRTUAL_CELLS",
        content_description="Cells of a virtual stain",
    )
    annotations.save_as(folder / ANNOTATIONS_FILE)
    return len(outlines)


def _cells_of(
    geojson: Path, label: str, scale: tuple[float, float]
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Open outlines in pixels of the image, and areas in µm²."""
    outlines, areas = [], []
    with gzip.open(geojson, "rb") as file:
        next(file)  # what the collection says of itself
        for line in file:
            text = line.rstrip(b",\n")
            if not text or text == b"]}":
                continue
            feature = orjson.loads(text)
            properties = feature["properties"]
            if properties["classification"]["name"] == label:
                ring = np.array(feature["geometry"]["coordinates"][0][:-1])
                outlines.append((ring / scale).astype(np.float32))
                areas.append(properties["measurements"]["Area µm^2"])
    return outlines, np.array(areas, np.float32)
