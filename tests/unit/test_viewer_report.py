"""Reports, flags and the script for QuPath: files that are made of a result."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from staindiffuser.client.run_record import read_run
from staindiffuser.viewer.flags import read_flags
from staindiffuser.viewer.pyramids import TileCache
from staindiffuser.viewer.qupath import qupath_script, write_qupath_script
from staindiffuser.viewer.report import BatchLine, batch_report, slide_report, write_reports
from staindiffuser.viewer.results import Entry, OpenResult, find_results
from tests.viewer_results import stain, write_quality, write_slide

GROOVY = Path("/usr/share/java/groovy-all.jar")
"""Of Debian's package groovy."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_slide(folder / "slide.ome.tiff", 1300, 800)
    stain(folder / "slide.ome.tiff", folder / "slide-stained")
    return folder


@pytest.fixture
def result(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "slide-stained", tmp_path / "slide-stained")
    shutil.copy(folder / "slide.ome.tiff", tmp_path)
    return tmp_path / "slide-stained"


def report_of(result: Path) -> str:
    (entry,) = find_results([result])
    return slide_report(OpenResult(entry, (), TileCache(10**7)))


def words(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def test_the_report_holds_images_scores_and_where_they_come_from(result: Path) -> None:
    run = read_run(result)
    page = report_of(result)
    text = words(page)
    assert page.count("data:image/jpeg") == 3
    assert page.count("data:image/png") == 2
    assert text.count("research use only") >= 1
    assert run.model.notice in text
    assert run.input.sha256 in text
    for label, number in run.cells.items():
        assert label in text
        assert re.search(rf"\s{number}\s", text)


def test_the_report_needs_nothing_from_elsewhere(result: Path) -> None:
    page = report_of(result)
    assert not re.search(r"<(script|link|iframe)", page)
    assert set(re.findall(r'(?:src|href)="([a-z]+):', page)) == {"data"}


def test_the_scores_are_those_of_scores_csv(result: Path) -> None:
    with (result / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    text = " ".join(words(report_of(result)).split())
    for column in zip(*rows, strict=True):
        assert " ".join(column) in text
    assert "as in scores.csv" in text
    (result / "scores.csv").unlink()
    assert "has no scores.csv" in words(report_of(result))


def test_names_and_messages_cannot_write_into_the_page(result: Path, tmp_path: Path) -> None:
    record = json.loads((result / "run.json").read_text(encoding="utf-8"))
    record["warnings"] = ["warning: <script>alert(1)</script>"]
    record["model"]["notice"] = "<img src=x onerror=alert(1)>"
    (result / "run.json").write_text(json.dumps(record), encoding="utf-8")
    renamed = tmp_path / "<b>bold-stained"
    result.rename(renamed)
    page = report_of(renamed)
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "<b>bold" not in page
    line = BatchLine(title="<i>x", report=None, scores={}, flagged=None, problem="<script>")
    assert "<i>x" not in batch_report("<u>title", [line], "<s>notice")


def test_flags_lie_where_their_tiles_show(result: Path) -> None:
    run = read_run(result)
    write_quality(result, {(0, 0): "unlike", (1, 1): "blur unlike"})
    flags = read_flags(result, run)
    assert flags is not None
    first, second = flags.tiles
    assert (first.x, first.y) == (0, 0)
    assert (first.x + first.width, first.y + first.height) == (second.x, second.y)
    assert (second.width, second.height) == (run.tiles.stride, run.tiles.stride)
    assert flags.summary() == (
        f"2 of {flags.judged} tiles are flagged (2 unlike the tissue that the model knows, 1 blurred)."
    )
    assert "2 of" in words(report_of(result))


def test_what_the_flags_say_is_not_said_twice(result: Path) -> None:
    record = json.loads((result / "run.json").read_text(encoding="utf-8"))
    record["warnings"] = ["warning: 6 of 9 tiles are unlike: quality.png shows where", "warning: something else"]
    (result / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "quality.png" in words(report_of(result))
    write_quality(result, {(0, 0): "unlike"})
    text = words(report_of(result))
    assert "quality.png" not in text
    assert "something else" in text


def test_a_slide_most_of_which_is_flagged_says_so_first(result: Path) -> None:
    write_quality(result, {(row, column): "unlike" for row in range(9) for column in range(4)})
    text = " ".join(words(report_of(result)).split())
    assert text.index("Most of this slide is flagged") < text.index("Scores")


@pytest.mark.parametrize("content", ["", "row,column\n1,2\n", "row,column,x,y,flags\n0,0,a,b,blur\n"])
def test_flags_that_cannot_be_read_are_none(result: Path, content: str) -> None:
    (result / "quality.csv").write_text(content, encoding="utf-8")
    flags = read_flags(result, read_run(result))
    assert flags is None or not flags.tiles


def test_a_batch_has_a_table_outliers_and_failures(result: Path, tmp_path: Path) -> None:
    for name in ("b", "c"):
        shutil.copytree(result, tmp_path / f"{name}-stained")
    (tmp_path / "c-stained" / "cd3.ome.tiff").unlink()
    (tmp_path / "summary.csv").write_text(
        "slide,output,status,exit_code,error\nd.svs,,failed,4,d.svs is damaged\n", encoding="utf-8"
    )
    written = write_reports(find_results([tmp_path]), (), tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "b-stained/report.html",
        "slide-stained/report.html",
        "report.html",
    ]
    page = written[-1].read_text(encoding="utf-8")
    assert 'href="b-stained/report.html"' in page
    text = words(page)
    assert "2 slides with a result, 2 without" in text
    assert "d.svs is damaged" in text
    assert "cd3.ome.tiff" in text


def test_a_slide_far_from_the_others_is_marked() -> None:
    values = [100, 104, 96, 99, 102, 500]
    lines = [
        BatchLine(title=str(value), report=f"{value}.html", scores={"CD3: cells": value}, flagged=0.1, problem=None)
        for value in values
    ]
    page = batch_report("batch", lines, "")
    assert re.findall(r'class="out">(\d+)<', page) == ["500"]
    assert 'class="out">' not in batch_report("batch", lines[-3:], "").replace("Marked", "")


def test_the_script_for_qupath_names_every_file_and_escapes_them(result: Path) -> None:
    run = read_run(result)
    script = qupath_script(result, run, Path('/scans/a "b" $c.svs'))
    rows = re.findall(r"^    \[(.*?)\],?$", script, re.MULTILINE)
    decoded = [json.loads(f"[{row}]".replace("\\$", "$")) for row in rows]
    assert [row[0] for row in decoded] == ["H&E", *(f"{one.label} (virtual, research use only)" for one in run.stains)]
    assert decoded[0][1].endswith('a "b" $c.svs')
    assert '"b" $c' not in script
    assert [Path(row[1]).name for row in decoded[1:]] == ["cd3.ome.tiff", "ck818.ome.tiff"]
    assert script.startswith("// Synthetic image")
    assert str(result / "cells.geojson.gz") in script


@pytest.mark.skipif(
    shutil.which("java") is None or not GROOVY.is_file(), reason=f"no Java, or no Groovy: {GROOVY} is missing"
)
def test_the_script_for_qupath_runs_in_groovy(result: Path) -> None:
    """Against stand-ins of QuPath's classes: its own are not needed to find a slip in the script's language."""
    run = read_run(result)
    (result / "$slide.svs").touch()
    script = write_qupath_script(result, run, result / "$slide.svs")
    stand_ins = Path(__file__).parent.parent / "qupath_stand_ins"
    command = ["java", "--add-opens", "java.base/java.lang=ALL-UNNAMED", "-cp", f"{GROOVY}:{stand_ins}"]
    done = subprocess.run(
        [*command, "-Dgroovy.source.encoding=UTF-8", "groovy.lang.GroovyShell", str(script)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = [line for line in done.stdout.splitlines() if line.startswith("saved")]
    assert saved == [
        f"saved H&E: BRIGHTFIELD_H_E, {sum(run.cells.values())} of [1.0]",
        *(
            f"saved {label} (virtual, research use only): BRIGHTFIELD_H_DAB, {count} of [1.0]"
            for label, count in run.cells.items()
        ),
    ]
    assert done.stdout.rstrip().endswith("synchronised")


def test_a_result_that_is_gone_is_left_out_of_a_batch(tmp_path: Path) -> None:
    entries = [Entry(name="gone", title="gone", folder=tmp_path / "gone", error=None)]
    (written,) = write_reports(entries, (), tmp_path)
    assert "gone" in words(written.read_text(encoding="utf-8"))
