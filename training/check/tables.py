"""A check's report as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from staindiffuser.training.check.check import CheckReport
from staindiffuser.training.tiles.stain_names import stain_label
from staindiffuser.training.tiles.tile import SPLITS, PairedTile

__all__ = ["print_report"]

_MOST_SLIDES = 40
_MASKS = {"grey": "0 to 255", "ones": "0 and 1", "labels": "labels, one per cell", None: "none"}


def print_report(report: CheckReport, worst: Sequence[tuple[PairedTile, Sequence[str]]], console: Console) -> None:
    """Print everything that a person should see."""
    total = sum(report.tiles.values())
    sizes = ", ".join(f"{count} of {size}" for size, count in report.sizes.items())
    low, high = report.mpp
    mpp = f"{low:g} µm" if low == high else f"{low:g} to {high:g} µm"
    patients = f" of {report.patients} patients" if report.patients else ""
    console.print(
        f"{report.folder}: {total} tiles of {sum(report.slides_per_split.values())} slides{patients}; "
        f"pixels of {mpp}; {sizes}; {report.blank} blank"
    )
    console.print(_stains(report))
    console.print(_slides(report))
    for error in report.errors:
        console.print(f"error: {error}", style="red", markup=False)
    kinds = Counter(suspicion.kind for suspicion in report.suspicions)
    console.print("suspicious: " + (", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing"))
    for tile, reasons in worst:
        console.print(f"  row {tile.row}, {tile.he.name}: {'; '.join(reasons)}", markup=False, highlight=False)


def _stains(report: CheckReport) -> Table:
    columns = ("stain", "masks", *(f"positive, {split}" for split in SPLITS), "correlation of hematoxylin")
    table = Table(*columns, box=SIMPLE)
    for stain, part in report.stains.items():
        shares = [
            f"{part.positive[split]:.2%} ({part.tiles_with_positive[split]} of {report.tiles[split]} tiles)"
            if split in part.positive
            else "–"
            for split in SPLITS
        ]
        masks = _MASKS[part.masks] if part.masks or not part.with_mask else "unknown values"
        table.add_row(stain_label(stain), masks, *shares, f"{part.correlation:.2f}")
    return table


def _slides(report: CheckReport) -> Table:
    shown = report.slides[:_MOST_SLIDES]
    caption = (
        f"{len(report.slides) - len(shown)} more slides: --json has them" if len(shown) < len(report.slides) else None
    )
    stains = list(report.stains)
    columns = ("slide", "patient", "split", "tiles", "blank", "mean colour", *map(stain_label, stains))
    table = Table(*columns, box=SIMPLE, caption=caption)
    for part in shown:
        colour = " ".join(f"{value:.0f}" for value in part.rgb)
        shares = [f"{part.positive[stain]:.1%}" if stain in part.positive else "–" for stain in stains]
        table.add_row(part.slide, part.patient or "–", part.split, str(part.tiles), str(part.blank), colour, *shares)
    return table
