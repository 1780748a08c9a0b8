"""``send`` against Orthanc, a real archive with DICOMweb (Debian's orthanc and orthanc-dicomweb)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
from typer.testing import CliRunner

from staindiffuser.cli import app
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FakeStainer
from staindiffuser.errors import InputError, ServerError

PLUGINS = [Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so"), Path("/usr/lib/orthanc/libOrthancDicomWeb.so")]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("send")
    he = np.full((600, 700, 3), (180, 110, 160), np.uint8)
    tifffile.imwrite(folder / "he.tif", he, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    options = StainingOptions(stains=("cd3",), formats=("dicom",), cells=False, mask="none")
    stain_slide(folder / "he.tif", folder / "out", FakeStainer(), options)
    return folder / "out"


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[str]:
    """URL of an empty archive."""
    plugin = next((path for path in PLUGINS if path.exists()), None)
    program = shutil.which("Orthanc")
    if program is None or plugin is None:
        pytest.skip("no archive: needs Debian's orthanc and orthanc-dicomweb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "StorageDirectory": str(tmp_path),
        "IndexDirectory": str(tmp_path),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "Plugins": [str(plugin)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings), encoding="utf-8")
    process = subprocess.Popen(
        [program, tmp_path / "orthanc.json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        process.terminate()
        process.wait(60)


def test_what_is_sent_is_in_the_archive(result: Path, archive: str) -> None:
    from dicomweb_client import DICOMwebClient

    done = CliRunner().invoke(app, ["send", str(result), "--to", archive], catch_exceptions=False)
    assert done.exit_code == 0
    files = sorted((result / "cd3.dicom").glob("*.dcm"))
    client = DICOMwebClient(archive)
    for path in files:
        sent = pydicom.dcmread(path)
        stored = client.retrieve_instance(
            sent.StudyInstanceUID, sent.SeriesInstanceUID, sent.SOPInstanceUID,
            media_types=(("application/dicom", "1.2.840.10008.1.2.4.50"),),
        )  # fmt: skip
        assert stored.PixelData == sent.PixelData
        assert stored.ImageType[0] == "DERIVED"
    assert len(client.search_for_instances(sent.StudyInstanceUID)) == len(files)


def test_nobody_there_and_nothing_to_send(result: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="does not answer"):
        CliRunner().invoke(app, ["send", str(result), "--to", "http://127.0.0.1:9"], catch_exceptions=False)
    with pytest.raises(InputError, match="--format dicom"):
        CliRunner().invoke(app, ["send", str(tmp_path), "--to", "http://127.0.0.1:9"], catch_exceptions=False)
