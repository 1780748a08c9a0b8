"""The options of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["FORMATS", "StainingOptions"]

FORMATS = ("ome-zarr", "dicom", "spatialdata")
"""What a result is written as beside OME-TIFF and GeoJSON."""


@dataclass(frozen=True, kw_only=True)
class StainingOptions:
    """How a slide is stained. Raises ValueError for a value out of range."""

    stains: tuple[str, ...] | None = None
    """Names of the stains; None for all that the model has."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """By stain, probabilities from which on its map shows a cell; for the others, what the model says."""
    seed: int = 0
    """Determines the noise: the same seed gives the same pixels. 0 … 2⁶³ − 1."""
    mpp: float | None = None
    """Pixel size of an input that does not state its own, µm per pixel."""
    force_mpp: bool = False
    """Use ``mpp`` even if the file states another pixel size."""
    batch: int | None = None
    """Tiles per request, up to the model's limit; None for what the server says suits it, else 4."""
    in_flight: int = 3
    """Concurrent requests, to all servers together."""
    cells: bool = True
    """Write cell maps, cells and scores."""
    nuclei: bool = True
    """Find the nuclei of the H&E as well, on a sample of a large slide: the scores then say which share is stained."""
    cells_from: Path | None = None
    """Cells to score instead of the H&E's nuclei: GeoJSON or GeoParquet, in level-0 pixels of the slide."""
    parquet: bool = False
    """Also write the cells as GeoParquet."""
    combined: bool = False
    """Also write all stains as channels of one image."""
    formats: tuple[str, ...] = ()
    """What the result is written as too: of :data:`FORMATS`."""
    allow_damaged: bool = False
    """Stain a slide some tiles of which cannot be decoded; they are left out and listed in ``run.json``."""
    mask: str | Path = "auto"
    """What is stained: the tissue that is found (``auto``), everything (``none``), or the polygons of a GeoJSON."""
    icc: str = "ignore"
    """``srgb`` converts the slide's colours by its ICC profile; ``ignore`` takes them as the scanner wrote them."""
    save_mask: bool = False
    """Write ``tissue.png``."""
    preview: bool = False
    """Write ``preview.png``."""
    keep_names: bool = False
    """Write the slide's name and path into the result; by default only a hash, since they may name the patient."""
    overwrite: bool = False
    """Replace an existing result."""
    resume: bool = False
    """Keep a complete result of the same slide, model and options; if any of them differs, fail."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        for stain, threshold in self.thresholds.items():
            if not 0 < threshold < 1:
                raise ValueError(f"threshold must be between 0 and 1, not {stain}={threshold:g}")
        if self.mpp is not None and not 0.01 <= self.mpp <= 100:
            raise ValueError(f"mpp must be from 0.01 to 100 µm, not {self.mpp:g}")
        if self.force_mpp and self.mpp is None:
            raise ValueError("force_mpp needs mpp")
        if self.icc not in ("ignore", "srgb"):
            raise ValueError(f"icc must be ignore or srgb, not {self.icc}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")
        if self.in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, not {self.in_flight}")
        if self.parquet and not self.cells:
            raise ValueError("parquet needs cells")
        if self.cells_from is not None and not self.cells:
            raise ValueError("cells_from needs cells")
        if "spatialdata" in self.formats and not self.cells:
            raise ValueError("spatialdata needs cells")
        for unknown in set(self.formats) - set(FORMATS):
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {unknown}; OME-TIFF is always written")
        if self.overwrite and self.resume:
            raise ValueError("overwrite and resume are mutually exclusive")
