"""What the page is told of a result: plain data for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from staindiffuser.client.names import slide_identity
from staindiffuser.client.quality import QUALITY_MAP
from staindiffuser.client.run_record import SYNTHETIC, RunRecord, gate_text
from staindiffuser.viewer.cell_index import BLOCK
from staindiffuser.viewer.comparison import Reference
from staindiffuser.viewer.flags import REASONS
from staindiffuser.viewer.fluorescence import NUCLEI_COLOUR, colours_of
from staindiffuser.viewer.pyramids import Pyramid
from staindiffuser.viewer.results import Entry, Library, OpenResult

__all__ = ["about_cells", "about_result", "list_entries", "objective"]


def list_entries(library: Library) -> list[dict[str, Any]]:
    """The list of slides: name, title, and scores or what is wrong."""
    return [_line(library, entry) for entry in library.entries.values()]


def _line(library: Library, entry: Entry) -> dict[str, Any]:
    line: dict[str, Any] = {"name": entry.name, "title": entry.title, "error": entry.error}
    if entry.error is None:
        from staindiffuser.client.run_record import read_run
        from staindiffuser.errors import StainDiffuserError

        try:
            line |= {"scores": _scores(read_run(entry.folder))}
        except StainDiffuserError as error:
            line["error"] = str(error)
    return line


def _scores(run: RunRecord) -> list[dict[str, Any]]:
    """The numbers of ``scores.csv``, per stain; None where there are none."""
    known = {one.stain: one for one in run.scores.stains} if run.scores is not None else {}
    names = ("cells", "cells_per_mm2", "positive_share", "positive_area_share")
    return [
        {"label": stain.label, **{name: getattr(known.get(stain.label), name, None) for name in names}}
        for stain in run.stains
    ]


def _area_mm2(run: RunRecord) -> float:
    (width, height), mpp = run.input.size, run.input.mpp
    return width * mpp[0] * height * mpp[1] / 1e6


def about_result(result: OpenResult, references: Sequence[Reference] = ()) -> dict[str, Any]:
    """Everything that the page shows of one result, apart from pixels and cells; with what it can be compared with."""
    run = result.run
    stains = []
    for number, (stain, image) in enumerate(result.stains.values()):
        bright, dark = colours_of(number)
        stains.append({"name": stain.name, "label": stain.label, "bright": bright, "dark": dark} | _pyramid(image))
    return {
        "name": result.entry.name,
        "title": result.entry.title,
        "version": result.version,
        "synthetic": SYNTHETIC,
        "notice": run.model.notice,
        "model": {"name": run.model.name, "version": run.model.version, "steps": run.steps, "mpp": run.model.mpp},
        "gate": gate_text(run.model.gate, run.stains),
        "thresholds": {stain.label: stain.threshold for stain in run.stains},
        "size": list(run.input.size),
        "mpp": list(run.input.mpp),
        "objective": objective(run.input.mpp),
        "he": _pyramid(result.source) if result.source else None,
        "he_problem": result.source_problem,
        "stains": stains,
        "references": [{"name": one.name, "label": one.label, "stains": one.stains} for one in references],
        "nuclei_colour": NUCLEI_COLOUR,
        "scores": _scores(run),
        "area_mm2": _area_mm2(run),
        "tissue_mm2": run.scores.tissue_area_mm2 if run.scores else _area_mm2(run) * run.tissue_fraction,
        "flags": _flags(result),
        "warnings": _warnings(result),
        "damaged": len(run.damaged),
        "provenance": {
            "Slide": Path(run.input.path).name if run.input.path else slide_identity(run.input.sha256),
            "SHA-256": run.input.sha256,
            "Format": run.input.format,
            "Stained": run.started,
            "Seed": run.seed,
            "Tiles": f"{run.tiles.stained} of {run.tiles.total}",
            "Result": f"{run.result.size[0]} × {run.result.size[1]} pixels of {run.result.mpp[0]:.3f} µm"
            + (", resampled" if run.result.resampled else ""),
            "StainDiffuser": run.versions.get("staindiffuser", "unknown"),
        },
    }


def _warnings(result: OpenResult) -> list[str]:
    """Those of the run, but for what the flags say themselves."""
    said = result.flags is not None and result.flags.tiles
    return [one.removeprefix("warning: ") for one in result.run.warnings if not (said and QUALITY_MAP in one)]


def _flags(result: OpenResult) -> dict[str, Any] | None:
    flags = result.flags
    if flags is None:
        return None
    tiles = [[one.x, one.y, one.width, one.height, list(one.reasons)] for one in flags.tiles]
    return {
        "summary": flags.summary(),
        "judged": flags.judged,
        "share": flags.share,
        "tiles": tiles,
        "reasons": REASONS,
    }


def about_cells(result: OpenResult) -> dict[str, Any]:
    """Whether the cells can be asked for, and which classes there are."""
    index = result.cells.index()
    state = "ready" if index is not None else "none" if result.cells.problem else "reading"
    colours = {stain.label: colours_of(number) for number, (stain, _) in enumerate(result.stains.values())}
    classes = []
    for one in index.classes if index else ():
        bright, dark = colours.get(one.name, ("#dddddd", "#444444"))
        classes.append({"name": one.name, "count": one.count, "bright": bright, "dark": dark})
    return {"state": state, "problem": result.cells.problem, "classes": classes, "block": BLOCK}


def objective(mpp: tuple[float, float]) -> float:
    """Magnification at which a pixel of the slide is a pixel of the screen: 40 for 0.25 µm, as scanners say it."""
    return 10.0 / max(mpp)


def _pyramid(image: Pyramid) -> dict[str, Any]:
    return {"levels": [list(size) for size in image.levels], "sides": list(image.sides)}
