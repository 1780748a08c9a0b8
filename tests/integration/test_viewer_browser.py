"""The viewer's page in Chromium: every control is used, nothing is asked of another host, nothing goes wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from staindiffuser.client.run_record import read_run
from staindiffuser.viewer.app import STATIC
from staindiffuser.viewer.report import write_reports
from staindiffuser.viewer.results import find_results
from tests.viewer_page import (
    CONTROLS,
    NEEDED,
    Open,
    Pages,
    address,
    axe_violations,
    drawn,
    panels,
    place,
    place_after,
    until,
)
from tests.viewer_results import Viewer, viewing, write_quality

pytestmark = NEEDED


@pytest.fixture(scope="module")
def folder(viewed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two results, and a slide that failed."""
    folder = tmp_path_factory.mktemp("browser")
    shutil.copy(viewed / "slide.ome.tiff", folder)
    shutil.copytree(viewed / "slide-stained", folder / "first-stained")
    shutil.copytree(folder / "first-stained", folder / "second-stained")
    (folder / "summary.csv").write_text(
        "slide,output,status,exit_code,error\nx.svs,third-stained,failed,4,x.svs is damaged\n", encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def viewer(folder: Path) -> Iterator[Viewer]:
    with viewing(folder) as running:
        yield running


@pytest.fixture
def open_page(browser: Any, viewer: Viewer, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens the page; afterwards nothing may have gone wrong, nobody else been asked, and all been used that
    :data:`CONTROLS` says of the test."""
    with Pages(browser, viewer) as pages:
        yield pages.open
    assert not pages.problems
    assert {control for control, test in CONTROLS.items() if test == request.node.originalname} <= pages.used


def test_the_page_shows_slide_stains_scores_and_what_they_are(open_page: Open, folder: Path) -> None:
    page = open_page()
    assert panels(page) == ["H&E (input)", "CD3 (virtual)", "CK8/18 (virtual)"]
    notice = page.locator("#notice")
    assert notice.is_visible()
    assert "Synthetic image, research use only." in notice.inner_text()
    assert "Model fake" in notice.inner_text()
    assert "gate: not passed: CD3 (radial power 0.34)" in notice.inner_text()
    run = read_run(folder / "first-stained")
    assert re.findall(r"\d+", page.locator("#slide-scores td").first.inner_text()) == [str(run.cells["CD3"])]
    assert page.locator("#slide-list li").count() == 3
    assert "x.svs is damaged" in page.locator("#slide-list .failed").inner_text()
    assert page.locator("#slide-list img").first.evaluate("image => image.complete && image.naturalWidth > 0")
    page.locator("summary").click()
    assert run.input.sha256 in page.locator("#provenance").inner_text()
    assert re.fullmatch(r"[125]0* (µm|mm)", page.locator(".scale span").first.inner_text())


def test_panels_move_together_by_mouse_keys_and_buttons(open_page: Open) -> None:
    page = open_page()
    start = place(page)
    page.keyboard.press("ArrowRight")
    moved = place_after(page, start)
    assert moved[0] > start[0]
    page.keyboard.press("ArrowDown")
    lower = place_after(page, moved)
    assert lower[1] > moved[1]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert place_after(page, lower) == pytest.approx(moved, rel=0.02)
    page.locator("#zoom-in").click()
    zoomed = place_after(page, moved)
    assert zoomed[2] == pytest.approx(2 * moved[2], rel=0.02)
    box = page.locator(".panel").nth(1).bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.wheel(0, -300)
    wheeled = place_after(page, zoomed)
    assert wheeled[2] > zoomed[2]
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 130, steps=4)
    page.mouse.up()
    dragged = place_after(page, wheeled)
    assert dragged[0] < wheeled[0]
    assert len(set(page.locator(".scale span").all_inner_texts())) == 1
    page.locator("#zoom-out").click()
    back = place_after(page, dragged)
    page.keyboard.press("-")
    page.keyboard.press("+")
    page.keyboard.press("-")
    page.keyboard.press("=")
    assert place(page) == pytest.approx(back, rel=0.02)
    page.mouse.dblclick(box["x"] + 100, box["y"] + 100)
    closer = place_after(page, back)
    assert closer[2] > 1.5 * back[2]
    page.keyboard.press("0")
    back = place_after(page, closer)
    page.locator("#zoom-in").click()
    back = place_after(page, back)
    page.locator("#zoom-home").click()
    assert place_after(page, back)[2] == pytest.approx(start[2], rel=0.02)
    assert "×" in page.locator("#magnification").inner_text()
    assert "µm" in page.locator("#coordinates").inner_text()


def test_layouts_stains_opacity_and_the_swipe_line(open_page: Open) -> None:
    page = open_page()
    page.get_by_label("CD3 (1)").uncheck()
    assert panels(page) == ["H&E (input)", "CK8/18 (virtual)"]
    assert address(page)["off"] == "cd3"
    page.keyboard.press("1")
    assert len(panels(page)) == 3
    page.get_by_role("button", name="Fluorescence").click()
    assert panels(page) == ["CD3 + CK8/18 + nuclei (virtual, as fluorescence)"]
    assert page.locator(".panel.dark").count() == 1
    page.get_by_role("button", name="Overlay").click()
    assert panels(page) == ["CD3, CK8/18 (virtual) over H&E"]
    page.get_by_label("Opacity of the stain").fill("40")
    assert address(page)["opacity"] == "0.4"
    page.get_by_label("Swipe line").check()
    line = page.locator(".swipe")
    box, panel = line.bounding_box(), page.locator(".panel").bounding_box()
    assert box["x"] + box["width"] / 2 == pytest.approx(panel["x"] + panel["width"] / 2, abs=2)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(panel["x"] + 0.25 * panel["width"], box["y"] + 60, steps=3)
    page.mouse.up()
    assert float(address(page)["swipe"]) == pytest.approx(0.25, abs=0.02)
    page.keyboard.press(".")
    page.keyboard.press(",")
    page.get_by_label("Position of the line").fill("70")
    assert float(address(page)["swipe"]) == pytest.approx(0.7)
    page.get_by_label("Swipe line").uncheck()
    assert not line.is_visible()
    page.keyboard.press("s")
    assert line.is_visible()
    page.keyboard.press("m")
    page.keyboard.press("m")
    assert len(panels(page)) == 3
    page.keyboard.press("m")
    page.get_by_role("button", name="Side by side").click()
    assert len(panels(page)) == 3


def test_cells_by_class_and_probability(open_page: Open) -> None:
    page = open_page("#slide=first&x=600&y=650&scale=1.2")
    both = drawn(page, 0)
    assert both > 500
    as_large = "(canvas) => canvas.height === canvas.parentElement.clientHeight"  # else cells lie beside their nuclei
    assert all(canvas.evaluate(as_large) for canvas in page.locator(".panel .marks").all())
    page.get_by_label(re.compile("CD3: ")).uncheck()
    assert drawn(page, 1) == 0
    page.get_by_label(re.compile("CD3: ")).check()
    assert drawn(page, 1) > 500
    everything = drawn(page, 1)
    page.get_by_label("Mean probability at least").fill("0.75")
    assert 0 < drawn(page, 1) < 0.8 * everything
    assert page.locator("#threshold-value").inner_text() == "0.75"
    page.keyboard.press("c")
    assert drawn(page, 1) == 0
    assert address(page)["cells"] == "off"
    page.keyboard.press("c")
    page.keyboard.press("0")
    assert drawn(page, 1) > 100
    for key in ("+", "+", "ArrowRight", "+"):
        page.keyboard.press(key)
    place(page)
    again = open_page(page.url[len(page.url.split("#")[0]) :])
    assert drawn(page, 0) == pytest.approx(drawn(again, 0), rel=0.01)  # not those of before it moved
    assert page.locator(".panel .marks").first.evaluate("(canvas) => canvas.style.transform") == ""


def test_flagged_tiles_are_hatched_and_said_first(open_page: Open, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "first-stained", tmp_path / "flagged-stained")
    write_quality(tmp_path / "flagged-stained", {(2, column): "unlike blur" for column in range(3, 6)})
    with viewing(tmp_path, slides=(folder / "slide.ome.tiff",)) as running:
        page = open_page("#cells=off", at=running)
        assert "3 of" in page.locator("#alerts p").first.inner_text()
        assert page.locator("#flag-reasons li").count() == 2
        assert drawn(page, 0) > 100
        assert drawn(page, 1) > 100
        page.get_by_label(re.compile("Hatch the flagged")).uncheck()
        assert drawn(page, 0) == 0
        page.keyboard.press("f")
        assert drawn(page, 0) > 100
        page.close()  # before its server


def test_two_results_of_one_slide_are_shown_with_their_difference(open_page: Open) -> None:
    page = open_page()
    page.get_by_label("Compare with").select_option("second")
    assert [title.partition(" (")[0] for title in panels(page)] == [
        "H&E", "CD3", "CD3", "CD3: difference", "CK8/18", "CK8/18", "CK8/18: difference",
    ]  # fmt: skip
    assert address(page)["compare"] == "second"
    assert page.locator("#compare-legend").is_visible()
    page.keyboard.press("Tab")
    page.get_by_role("button", name="This view").click()
    page.wait_for_selector("#region-scores table:nth-of-type(2) td")
    assert "1.00" in page.locator("#region-scores table").nth(1).inner_text()
    page.get_by_label("Compare with").select_option("")
    assert len(panels(page)) == 3


def test_regions_are_drawn_and_scored(open_page: Open) -> None:
    page = open_page()
    box = page.locator(".panel").nth(0).bounding_box()
    middle = box["y"] + box["height"] / 2
    page.get_by_role("button", name="Rectangle").click()
    assert page.get_by_role("button", name="Rectangle").get_attribute("aria-pressed") == "true"
    page.mouse.move(box["x"] + 40, middle - 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 - 20, middle + 60, steps=4)
    page.mouse.up()
    page.wait_for_selector("#region-scores td")
    cd3, ck = (row.split() for row in page.locator("#region-scores tbody tr").all_inner_texts())
    assert int(cd3[1]) > 10
    assert int(ck[1]) == 0
    assert "mm²" in page.locator("#region-scores").inner_text()
    assert len(address(page)["region"].split(";")) == 4
    page.keyboard.press("Escape")
    assert not page.locator("#region").is_visible()
    page.keyboard.press("p")
    for x, y in ((30, -80), (200, -60), (120, 90)):
        page.mouse.click(box["x"] + x, middle + y)
    page.keyboard.press("Enter")
    page.wait_for_selector("#region-scores td")
    assert len(address(page)["region"].split(";")) == 3
    page.get_by_role("button", name="Remove the region").click()
    page.get_by_role("button", name="Polygon").click()
    for x, y in ((40, -70), (190, -50), (130, 80)):
        page.mouse.click(box["x"] + x, middle + y)
    page.mouse.dblclick(box["x"] + 60, middle + 70)
    page.wait_for_selector("#region-scores td")
    assert len(address(page)["region"].split(";")) == 4
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    page.keyboard.press("Escape")
    assert page.locator(".panel.drawing").count() == 0
    page.get_by_role("button", name="This view").click()
    page.wait_for_selector("#region-scores td")
    page.keyboard.press("Escape")
    page.keyboard.press("v")
    page.wait_for_selector("#region-scores td")


def test_a_link_opens_the_same_place_again(open_page: Open) -> None:
    page = open_page(
        "#slide=second&x=500&y=700&scale=0.8&view=overlay&swipe=0.3&opacity=0.5&off=cd3&p=0.7&classes-off=CD3"
    )
    found = address(page)
    assert page.locator("#title").inner_text() == "second"
    assert place(page) == pytest.approx((500, 700, 0.8), rel=0.01)
    assert {name: found[name] for name in ("slide", "view", "off", "p", "classes-off")} == {
        "slide": "second", "view": "overlay", "off": "cd3", "p": "0.7", "classes-off": "CD3",
    }  # fmt: skip
    page.get_by_role("button", name="Link").click()
    page.keyboard.press("l")
    until(page, "document.querySelector('#message').textContent !== ''")
    again = open_page(page.url[len(page.url.split("#")[0]) :])
    assert address(again) == found


def test_slides_are_changed_by_list_keys_and_history(open_page: Open) -> None:
    page = open_page()
    assert page.locator("#title").inner_text() == "first"
    page.locator("#slide-list a").nth(1).click()
    until(page, "document.querySelector('#title').textContent === 'second'")
    page.keyboard.press("[")
    until(page, "document.querySelector('#title').textContent === 'first'")
    page.keyboard.press("]")
    until(page, "document.querySelector('#title').textContent === 'second'")


def test_with_the_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the images"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "panels"
    assert page.locator("#title").inner_text() == "first"
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"zoom-in", "draw-rectangle", "score-view", "copy-link", "open-help", "threshold"} <= set(reached)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.get_by_role("button", name="Keys").click()
    page.get_by_role("button", name="Close").click()


def test_every_control_of_the_page_is_used_by_a_test(open_page: Open, folder: Path) -> None:
    """And nothing is in :data:`CONTROLS` that the page no longer has."""
    page = open_page("#slide=first&view=overlay&swipe=0.5&region=200,300;900,300;900,900;200,900")
    found = set(
        page.evaluate("""() => [...document.querySelectorAll(
            "button, input, select, a[href], summary, textarea, .swipe, [contenteditable]"
        )].map((element) => __named(element) ?? element.outerHTML)""")
    )
    keys = (STATIC / "keys.js").read_text(encoding="utf-8").partition("const keys = {")[2].partition("};")[0]
    found |= {f"key {name}" for name in re.findall(r'^    "?([^\s":]+|,)"?: ', keys, re.MULTILINE)}
    found |= {"key 1"} | {"image drag", "image wheel", "image dblclick"}  # OpenSeadragon's
    assert found == set(CONTROLS)


@pytest.mark.parametrize(
    ("view", "size"),
    [("side", (1280, 800)), ("side", (400, 800)), ("overlay", (400, 800)), ("fluorescence", (1280, 800))],
)
def test_axe_finds_nothing_serious_and_nothing_is_cut(open_page: Open, size: tuple[int, int], view: str) -> None:
    page = open_page(f"#slide=first&view={view}&region=200,300;900,300;900,900;200,900", size=size)
    page.wait_for_selector("#region-scores td")
    assert axe_violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.locator("#notice strong").is_visible()


def test_the_report_opens_offline_and_prints_on_two_pages(browser: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "first-stained", tmp_path / "printed-stained")
    write_quality(tmp_path / "printed-stained", {(2, 3): "blur"})
    record = json.loads((tmp_path / "printed-stained" / "run.json").read_text(encoding="utf-8"))
    record["model"]["notice"] = "What it paints has no medical meaning and must not be used for diagnosis. " * 5
    record["warnings"] = ["warning: the slide has no pixel size of its own, and so on for a line and a half. " * 2] * 2
    (tmp_path / "printed-stained" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    written = write_reports(find_results([tmp_path]), (folder / "slide.ome.tiff",), tmp_path)
    assert [path.parent.name for path in written] == ["printed-stained", tmp_path.name]
    context = browser.new_context(offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    for path, most in zip(written, (2, 1), strict=True):
        page.goto(path.as_uri())
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert len(re.findall(rb"/Type\s*/Page\b", page.pdf(prefer_css_page_size=True))) <= most
    page.get_by_role("link", name="printed").click()
    page.wait_for_selector("figure")
    assert not problems
    context.close()


def test_a_server_that_ends_is_said_so(browser: Any, folder: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    with viewing(folder / "first-stained") as running:
        page.goto(running.address)
        until(page, "document.querySelectorAll('#cell-classes input').length > 0")
    page.get_by_role("button", name="This view").click()
    until(page, "document.querySelector('#region-scores').textContent.includes('does not answer')")
    context.close()
