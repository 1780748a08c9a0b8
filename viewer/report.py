"""``report.html``: one slide on two printed pages, or a batch; a single file that needs nothing else."""

from __future__ import annotations

import base64
import csv
import io
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from staindiffuser.client.result_files import CELLS_FILE
from staindiffuser.client.scores import SCORES_FILE
from staindiffuser.errors import StainDiffuserError
from staindiffuser.files import replacing
from staindiffuser.viewer.cell_index import CellIndex, build_index
from staindiffuser.viewer.density import density_maps
from staindiffuser.viewer.describe import about_result
from staindiffuser.viewer.flags import Flags
from staindiffuser.viewer.fluorescence import colours_of
from staindiffuser.viewer.pyramids import Pyramid, TileCache
from staindiffuser.viewer.results import Entry, OpenResult

__all__ = ["REPORT_FILE", "BatchLine", "batch_report", "slide_report", "write_reports"]

REPORT_FILE = "report.html"
LIMITS = (
    "The stains were computed from the H&E alone by a neural network. No antibody was used, and no real stain of this "
    "slide was seen.",
    "Brown is where the model expects the antibody to bind. Another tissue, laboratory or scanner than the model was "
    "trained on can mislead it without any sign in the image.",
    "Cells are found in the predicted cell map; touching cells may be counted as one. Numbers are for comparing "
    "regions and slides of one model, not for diagnosis.",
)
_STYLE = """
body{font:13px/1.4 system-ui,sans-serif;color:#1d1d22;max-width:900px;margin:0 auto;padding:12px}
h1{font-size:20px;margin:8px 0}h2{font-size:15px;margin:14px 0 4px}p{margin:3px 0}
.notice{background:#fff3c4;border:1px solid #d9bb52;padding:6px 10px}
.alert{background:#fdecea;border:1px solid #b3261e;color:#5c120d;padding:6px 10px;margin:6px 0}
.images{display:flex;flex-wrap:wrap;gap:8px}figure{margin:0;flex:1 1 180px;max-width:290px}
figure img{display:block;box-sizing:border-box;width:100%;max-height:300px;object-fit:contain}
figure img{border:1px solid #c9c9d2;background:#fff}
figure.map img{image-rendering:pixelated;max-height:200px}figcaption{font-size:12px;color:#55555f}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid #d6d6dd;padding:2px 6px;text-align:right;font-weight:normal}
th:first-child,td:first-child{text-align:left}thead th{color:#55555f}.out{background:#fde3a7}
td.wide{overflow-wrap:anywhere;text-align:left}
@media print{body{font-size:10.5px;padding:0}h1{font-size:16px}h2{font-size:12.5px}
.second{break-before:page}figure{flex-basis:150px}figure img{max-height:200px}figure.map img{max-height:120px}
a{color:inherit}
.notice,.alert,.out,figure img{print-color-adjust:exact;-webkit-print-color-adjust:exact}@page{size:A4;margin:14mm}}
"""
_COLUMNS = (
    ("cells", "cells", 1),
    ("cells_per_mm2", "per mm²", 1),
    ("positive_share", "positive %", 100),
    ("positive_area_share", "area %", 100),
)
"""Scores in the table of a batch: name, heading, factor."""
_OUTLIER = 3.5
"""Distance from the median in (scaled) median absolute deviations from which a slide is called an outlier (Iglewicz and
Hoaglin 1993)."""
_FEWEST = 5
"""Slides from which outliers are looked for."""


def slide_report(result: OpenResult) -> str:
    """The report of one slide, HTML."""
    about = about_result(result)
    rows, scored = _scores(result, about)
    alerts = [*([result.flags.summary()] if result.flags and result.flags.tiles else []), *about["warnings"]]
    if about["he_problem"]:
        alerts.append(f"The H&E is not shown: {about['he_problem']}")
    model = about["model"]
    notice = (
        f"{about['synthetic']} {about['notice']} Model {model['name']} {model['version'][:12]}; gate: {about['gate']}."
    )
    parts = [
        f'<p class="notice"><strong>{escape(notice)}</strong></p>',
        f"<h1>{escape(result.entry.title)}</h1>",
        *(f'<p class="alert">{escape(str(text))}</p>' for text in alerts),
        f'<div class="images">{"".join(_figures(result))}</div>',
        "<h2>Scores</h2>",
        _table(rows),
        f"<p>{escape(scored)}</p>",
        "<h2>Distribution over the slide</h2>",
        _distribution(result),
        '<h2 class="second">What the model is</h2>',
        f"<p>{escape(about['notice'])}</p>",
        _table([["", ""], *([name, str(value)] for name, value in _model_facts(about).items())], wide=True),
        "<h2>Limits</h2>",
        "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in LIMITS) + "</ul>",
        "<h2>Provenance</h2>",
        _table([["", ""], *([name, str(value)] for name, value in about["provenance"].items())], wide=True),
    ]
    return _page(f"{result.entry.title}: virtual stains", parts)


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """A slide of a batch."""

    title: str
    report: str | None
    """Address of its report; None for a slide that failed."""
    scores: dict[str, float]
    """By column."""
    flagged: float | None
    """Share of its tiles."""
    problem: str | None
    """Why there is no result."""


def batch_report(title: str, lines: Sequence[BatchLine], notice: str) -> str:
    """The report of a batch: a table with outliers marked, and the slides that failed."""
    columns = list(dict.fromkeys(name for line in lines for name in line.scores))
    outliers = {name: _outliers([line.scores.get(name) for line in lines]) for name in columns}
    body = []
    for number, line in enumerate(lines):
        if line.report is None:
            continue
        link = f'<a href="{escape(line.report, quote=True)}">{escape(line.title)}</a>'
        marks = [' class="out"' * outliers[name][number] for name in columns]
        cells = [f"<td{mark}>{_number(line.scores.get(name))}</td>" for name, mark in zip(columns, marks, strict=True)]
        flagged = "–" if line.flagged is None else f"{100 * line.flagged:.0f} %"
        body.append(f"<tr><td>{link}</td>{''.join(cells)}<td>{flagged}</td></tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in ("slide", *columns, "flagged tiles"))
    failed = [line for line in lines if line.problem is not None]
    some = any(any(found) for found in outliers.values())
    parts = [
        f'<p class="notice"><strong>{escape(notice)}</strong></p>',
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(body)} slides with a result, {len(failed)} without.</p>",
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>",
        f'<p><span class="out">Marked</span>: {_OUTLIER} or more scaled median absolute deviations from the median.</p>'
        * some,
    ]
    if failed:
        rows = [["slide", "why"], *([line.title, str(line.problem)] for line in failed)]
        parts += ["<h2>Without a result</h2>", _table(rows, wide=True)]
    return _page(title, parts)


def write_reports(entries: Sequence[Entry], places: Sequence[Path], batch: Path | None) -> list[Path]:
    """Write the report of every result into its folder, and that of the batch.

    Args:
        entries: the results.
        places: where H&E slides are looked for.
        batch: folder of the batch's report; None to write none.

    Returns:
        The files.

    Raises:
        UsageError: a report cannot be written.
        ResultGoneError, RunRecordError, SlideError: a result cannot be read.
    """
    written: list[Path] = []
    lines: list[BatchLine] = []
    notice = ""
    for entry in entries:
        if entry.error is not None:
            lines.append(BatchLine(title=entry.title, report=None, scores={}, flagged=None, problem=entry.error))
            continue
        try:
            result = OpenResult(entry, places, TileCache(16 * 2**20))
        except StainDiffuserError as error:
            if batch is None:
                raise
            lines.append(BatchLine(title=entry.title, report=None, scores={}, flagged=None, problem=str(error)))
            continue
        about = about_result(result)
        notice = f"{about['synthetic']} {about['notice']}"
        written.append(_write(entry.folder / REPORT_FILE, slide_report(result)))
        scores = {}
        for one in about["scores"]:
            for name, heading, factor in _COLUMNS:
                if one[name] is not None:
                    scores[f"{one['label']}: {heading}"] = factor * float(one[name])
        lines.append(
            BatchLine(
                title=entry.title,
                report=_relative(entry.folder / REPORT_FILE, batch),
                scores=scores,
                flagged=result.flags.share if result.flags else None,
                problem=None,
            )
        )
    if batch is not None:
        name = batch.resolve().name or "batch"
        written.append(_write(batch / REPORT_FILE, batch_report(f"{name}: virtual stains", lines, notice)))
    return written


def _write(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _relative(path: Path, folder: Path | None) -> str:
    from urllib.parse import quote

    absolute = path.resolve()
    if folder is not None and absolute.is_relative_to(folder.resolve()):
        return quote(absolute.relative_to(folder.resolve()).as_posix())
    return absolute.as_uri()


def _scores(result: OpenResult, about: dict[str, Any]) -> tuple[list[list[str]], str]:
    """The table of scores, its headings first, and what region it is of."""
    path = result.entry.folder / SCORES_FILE
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error):
        rows = []
    if len(rows) > 1:  # as they stand in the file, one column per stain
        return [list(row) for row in zip(*rows, strict=False)], f"All of the slide's tissue, as in {SCORES_FILE}."
    table = [["", *(one["label"] for one in about["scores"])]]
    table += [["cells", *(_number(one["cells"]) for one in about["scores"])]]
    return table, "The result has no scores.csv."


def _model_facts(about: dict[str, Any]) -> dict[str, str]:
    model = about["model"]
    return {
        "Model": model["name"],
        "Version": model["version"],
        "Gate": about["gate"],
        "A cell from": ", ".join(f"{label} {value:g}" for label, value in about["thresholds"].items()),
        "Sampler steps": str(model["steps"]),
        "Pixel size": f"{model['mpp']:g} µm",
    }


def _figures(result: OpenResult) -> Iterable[str]:
    if result.source is not None:
        note = " Hatched: flagged tiles." if result.flags and result.flags.tiles else ""
        yield _figure(_thumbnail(result.source, result.flags, result.run.input.size), f"H&E (input).{note}")
    for stain, image in result.stains.values():
        yield _figure(_thumbnail(image, None, result.run.input.size), f"{stain.label} (virtual)")


def _thumbnail(image: Pyramid, flags: Flags | None, size: tuple[int, int]) -> bytes:
    pixels = Image.fromarray(np.ascontiguousarray(image.pixels(len(image.levels) - 1, 0, 0)))
    if flags is not None and flags.tiles:
        scale = (pixels.width / size[0], pixels.height / size[1])
        inside = Image.new("L", pixels.size)
        lines = Image.new("L", pixels.size)
        for one in flags.tiles:
            corner = (one.x * scale[0], one.y * scale[1])
            box = (*corner, (one.x + one.width) * scale[0] - 1, (one.y + one.height) * scale[1] - 1)
            ImageDraw.Draw(inside).rectangle((box[0], box[1], max(box[0], box[2]), max(box[1], box[3])), fill=255)
        for at in range(0, pixels.width + pixels.height, 6):
            ImageDraw.Draw(lines).line((at, 0, at - pixels.height, pixels.height), fill=255)
        both = Image.fromarray(np.minimum(np.asarray(inside), np.asarray(lines)))
        pixels.paste((179, 38, 30), mask=both)
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=85)
    return file.getvalue()


def _figure(data: bytes, caption: str, kind: str = "") -> str:
    media = "png" if data.startswith(b"\x89PNG") else "jpeg"
    source = f"data:image/{media};base64,{base64.b64encode(data).decode('ascii')}"
    return (
        f'<figure class="{kind}"><img src="{source}" alt="{escape(caption, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _distribution(result: OpenResult) -> str:
    path = result.entry.folder / CELLS_FILE
    run = result.run
    if not path.is_file():
        return "<p>The result has no cells.</p>"
    with tempfile.TemporaryDirectory(prefix="staindiffuser-report-", ignore_cleanup_errors=True) as folder:
        try:
            build_index(path, Path(folder), run.input.size)
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, IndexError) as error:
            return f"<p>{escape(path.name)} cannot be read: {escape(str(error))}</p>"
        maps = density_maps(CellIndex(Path(folder)), run.input.size, run.input.mpp)
    colours = {stain.label: colours_of(number)[1] for number, (stain, _) in enumerate(result.stains.values())}
    rows = [["stain", "tenth percentile", "median", "ninetieth percentile"]]
    figures = []
    for name, found in maps.items():
        low, middle, high = found.quantiles()
        rows.append([name, *(f"{value:,.0f}" for value in (low, middle, high))])
        most = max(float(found.per_mm2.max()), 1.0)
        caption = f"{name}: white 0, full colour {most:,.0f} cells per mm²"
        figures.append(_figure(found.png(colours.get(name, "#444444"), most), caption, "map"))
    side = next(iter(maps.values())).side_um if maps else 0
    note = f"Cells per mm² in squares of {side:.0f} µm that hold any."
    return (
        f'<div class="images">{"".join(figures)}</div>{_table(rows)}<p>{escape(note)}</p>'
        if maps
        else "<p>No cells.</p>"
    )


def _table(rows: Sequence[Sequence[str]], *, wide: bool = False) -> str:
    head, *body = rows
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    kind = ' class="wide"' if wide else ""
    lines = [
        "<tr>" + "".join(f"<td{kind if i else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in body
    ]
    top = f"<thead><tr>{heading}</tr></thead>" if any(head) else ""
    return f"<table>{top}<tbody>{''.join(lines)}</tbody></table>"


def _number(value: float | None) -> str:
    return (
        "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.1f}"
    )


def _outliers(values: Sequence[float | None]) -> list[bool]:
    known = np.array([value for value in values if value is not None])
    if len(known) < _FEWEST:
        return [False] * len(values)
    middle = float(np.median(known))
    spread = 1.4826 * float(np.median(np.abs(known - middle)))
    return [value is not None and spread > 0 and abs(value - middle) / spread >= _OUTLIER for value in values]


def _page(title: str, parts: Iterable[str]) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
