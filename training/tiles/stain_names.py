"""The name of a stain that people read, from the name that machines use.

Labels are decided here until a checkpoint exists; from then on the checkpoint carries them.
"""

import re

__all__ = ["KERATINS", "OTHER_COLUMNS", "PATIENT", "STAIN_NAME", "is_stain_name", "stain_label"]

STAIN_NAME = re.compile(r"[a-z][a-z0-9_]*")
"""What a stain's machine name must match in full."""

OTHER_COLUMNS = ("he", "slide", "split", "mpp")
"""Columns that every ``tiles.csv`` has beside those of the stains."""
PATIENT = "patient"
"""Optional column of ``tiles.csv``."""

_LABELS = {
    "cd3": "CD3",
    "cd4": "CD4",
    "cd8": "CD8",
    "cd20": "CD20",
    "cd31": "CD31",
    "cd34": "CD34",
    "cd45": "CD45",
    "cd68": "CD68",
    "cd138": "CD138",
    "ck7": "CK7",
    "ck20": "CK20",
    "ck56": "CK5/6",
    "ck818": "CK8/18",
    "panck": "pan-CK",
    "er": "ER",
    "pr": "PR",
    "her2": "HER2",
    "ki67": "Ki-67",
    "p53": "p53",
    "p63": "p63",
    "pdl1": "PD-L1",
    "sma": "SMA",
    "foxp3": "FoxP3",
}
KERATINS = ("ck7", "ck20", "ck56", "ck818", "panck")
"""Stains whose marker is of the cytoplasm."""


def is_stain_name(name: str) -> bool:
    """Whether ``name`` can name a stain: ``[a-z][a-z0-9_]*``, and not another column of ``tiles.csv``."""
    reserved = name in (*OTHER_COLUMNS, PATIENT) or name.endswith("_mask")
    return STAIN_NAME.fullmatch(name) is not None and not reserved


def stain_label(name: str) -> str:
    """What people call the stain ``name``: ``ck818`` is ``CK8/18``; an unknown ``abc_1`` is ``ABC 1``."""
    return _LABELS.get(name, name.replace("_", " ").upper())
