"""What a file or folder is, by its first bytes and by what it holds, not by its name."""

from __future__ import annotations

from pathlib import Path

__all__ = ["holds_dicom", "is_dicom", "is_slide_folder", "is_zarr"]


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Whether a folder holds a DICOM file."""
    return any(path.is_file() and is_dicom(path) for path in folder.iterdir())


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a Zarr group."""
    return any((folder / name).is_file() for name in ("zarr.json", ".zattrs", ".zgroup"))


def is_slide_folder(folder: Path) -> bool:
    """Whether a folder is itself a slide, or holds the files of DICOM slides."""
    return is_zarr(folder) or holds_dicom(folder)
