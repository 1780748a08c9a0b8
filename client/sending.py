"""``staindiffuser send``: store the DICOM of results in an archive, by DICOMweb (STOW-RS)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydicom
import requests

from staindiffuser.client.credentials import Credentials
from staindiffuser.client.errors import ServerUnreachableError
from staindiffuser.errors import InputError, ServerError

__all__ = ["find_instances", "send_instances"]


def find_instances(folders: Sequence[Path]) -> list[Path]:
    """The DICOM files that ``stain --format dicom`` wrote into these result folders.

    Raises:
        InputError: a folder holds none.
    """
    found: list[Path] = []
    for folder in folders:
        files = sorted(folder.glob("*.dicom/*.dcm"))
        if not files:
            raise InputError(f"{folder} holds no DICOM: stain the slide with --format dicom")
        found += files
    return found


def send_instances(files: Sequence[Path], url: str, credentials: Credentials, say: Callable[[str], None]) -> None:
    """Store the instances, one by one; each is in memory while it is sent.

    Args:
        files: the instances.
        url: of the DICOMweb service, such as ``https://archive/dicom-web``.
        credentials: TLS files and token.
        say: receives a line per instance.

    Raises:
        ServerUnreachableError: nobody answers there.
        ServerError: the archive refuses an instance; says which, and why.
    """
    from dicomweb_client import DICOMwebClient

    with requests.Session() as session:
        if credentials.authority is not None:
            session.verify = str(credentials.authority)
        if credentials.certificate is not None:
            session.cert = (str(credentials.certificate), str(credentials.key))
        client = DICOMwebClient(url, session=session, headers=credentials.headers())
        client.set_http_retry_params(max_attempts=3)  # waits of 2 and 4 s: half a minute is long for a wrong address
        for path in files:
            try:
                answer = client.store_instances([pydicom.dcmread(path)])
            except requests.HTTPError as error:
                status = "no answer" if error.response is None else f"HTTP {error.response.status_code}"
                raise ServerError(f"{url} did not take {path}: {status}") from error
            except requests.RequestException as error:
                raise ServerUnreachableError(f"{url} does not answer: {' '.join(str(error).split())[:160]}") from error
            _require_stored(answer, path, url)
            say(f"stored {path}")


def _require_stored(answer: Any, path: Path, url: str) -> None:
    for failed in answer.get("FailedSOPSequence", []):
        raise ServerError(f"{url} did not take {path}: failure reason {int(failed.get('FailureReason', 0)):04X}H")
