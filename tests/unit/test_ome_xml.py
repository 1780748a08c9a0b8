"""The OME-XML of results: valid, complete, and unbroken by what names may hold."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from staindiffuser.imaging.ome_xml import Channel, ImageInfo, ome_xml

OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"


def info(name: str = 'CD3 <virtual> & "more"') -> ImageInfo:
    return ImageInfo(
        name=name,
        description="Synthetic — µ\x00\x1b[31m\x85",
        mpp=(0.499, 0.5),
        channels=(Channel("CD3"),),
        creator="StainDiffuser 0",
        about={"model": "demo f00", "seed\x07": "3"},
    )


@pytest.mark.parametrize("samples", [1, 3])
def test_it_says_what_the_image_is(samples: int) -> None:
    root = ElementTree.fromstring(ome_xml(info(), (700, 500), samples))
    assert root.get("Creator") == "StainDiffuser 0"
    pixels = root.find(f".//{OME}Pixels")
    assert pixels is not None
    assert [pixels.get(f"Size{axis}") for axis in "XYCZT"] == ["700", "500", str(samples), "1", "1"]
    assert (pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeYUnit")) == ("0.499", "µm")
    objective = root.find(f"{OME}Instrument/{OME}Objective")
    assert objective is not None
    assert objective.get("NominalMagnification") == "20"
    facts = {entry.get("K"): entry.text for entry in root.iter(f"{OME}M")}
    assert facts == {"model": "demo f00", "seed?": "3"}
    assert root.findtext(f"{OME}Image/{OME}Description") == "Synthetic — µ??[31m\x85"


@pytest.mark.parametrize("name", ["a\nb", "\x01\x02", "\ud800", "\ufffe", "😀", "'\"<>&", "x" * 250])
def test_any_name_gives_xml(name: str) -> None:
    root = ElementTree.fromstring(ome_xml(info(name), (7, 5), 3))
    image = root.find(f"{OME}Image")
    assert image is not None
    assert len(image.get("Name", "")) == len(name)


def test_it_validates() -> None:
    xmlschema = pytest.importorskip("xmlschema", reason="validating OME-XML needs xmlschema")
    ome_types = pytest.importorskip("ome_types", reason="the OME schema comes with ome-types")
    schemas = sorted(Path(ome_types.__file__).parent.rglob("ome-2016-06.xsd"))
    if not schemas:
        pytest.skip("this version of ome-types brings no schema")
    schema = xmlschema.XMLSchema(schemas[0])
    for samples in (1, 3):
        schema.validate(ome_xml(info(), (700, 500), samples).decode())
        with pytest.raises(xmlschema.XMLSchemaValidationError):
            schema.validate(ome_xml(info(), (700, 500), samples).decode().replace('SizeX="700"', 'SizeX="0"'))
