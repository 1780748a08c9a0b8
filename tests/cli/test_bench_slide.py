"""``staindiffuser bench slide`` on a small slide: what it reports, not how fast this machine is."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from staindiffuser.benchmarks.slide import slide
from staindiffuser.benchmarks.stub_tissue import StubTissue, write_slide

app = typer.Typer()
app.command("slide")(slide)


def test_report(tmp_path: Path) -> None:
    report_file = tmp_path / "r.json"
    options = ["--side", "1024", "--cells", "1200", "--tile-ms", "1", "--cores", "1", "--json", str(report_file)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert "with cells / images only" in result.output
    report = json.loads(report_file.read_text(encoding="utf-8"))
    images, maps, complete = report["runs"]
    assert [run["writes"] for run in report["runs"]] == ["images", "images and maps", "cells too"]
    assert images["cells"] == maps["cells"] == {}
    # Some of the drawn cells touch, and some of those cannot be told apart.
    assert 900 < sum(complete["cells"].values()) <= 1200
    assert report["ratio"] == complete["megapixels_per_second"] / images["megapixels_per_second"]
    assert images["tiles"] == complete["tiles"] > 0
    assert complete["server_share"] > 1
    parts = complete["cpu_ms_per_megapixel"]
    assert parts.keys() >= {"read", "stain", "compose and encode", "cells", "nuclei", "other"}
    assert sum(parts.values()) == pytest.approx(1000 * complete["cpu_seconds"] / complete["megapixels"], rel=0.02)
    assert min(parts["compose and encode"], parts["cells"], parts["nuclei"]) > 1, "what happens in pools counts too"
    assert report["maps_ratio"] == complete["megapixels_per_second"] / maps["megapixels_per_second"]
    assert report["maps_cpu_ratio"] == pytest.approx(maps["cpu_seconds"] / complete["cpu_seconds"])
    assert report["cpu_ratio"] == pytest.approx(images["cpu_seconds"] / complete["cpu_seconds"])


@pytest.mark.slow
def test_a_real_server_takes_the_stubs_place(tmp_path: Path) -> None:
    report_file = tmp_path / "r.json"
    options = ["--side", "1024", "--cells", "1200", "--triton", "--no-images-only", "--json", str(report_file)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    report = json.loads(report_file.read_text(encoding="utf-8"))
    (run,) = report["runs"]
    assert run["tiles"] > 1
    assert run["cells"] == {}, "engines that do nothing find none"
    assert run["server_share"] is None
    assert report["ratio"] is report["maps_ratio"] is None


@pytest.mark.slow
def test_a_real_slide_is_compared_with_its_server(tmp_path: Path) -> None:
    write_slide(tmp_path / "slide.tif", StubTissue(1000, 1), 1024, tissue_side=1024)
    options = [
        str(tmp_path / "slide.tif"),
        "--triton",
        "--no-images-only",
        "--batch",
        "2",
        "--keep",
        str(tmp_path / "r"),
    ]
    report_file = tmp_path / "r.json"
    result = CliRunner().invoke(app, [*options, "--json", str(report_file)])
    assert result.exit_code == 0, result.output
    report = json.loads(report_file.read_text(encoding="utf-8"))
    (run,) = report["runs"]
    assert run["server_share"] == pytest.approx(run["seconds"] / run["tiles"] / report["bench"]["tile_ms"] * 1000, 0.01)
    assert {"cells.parquet", "spatialdata.zarr", "run.json"} <= {path.name for path in (tmp_path / "r").iterdir()}
