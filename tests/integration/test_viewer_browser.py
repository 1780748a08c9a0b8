"""The viewer's page in Chromium: every control is used, nothing is asked of another host, nothing goes wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from staindiffuser.client.run_record import read_run
from staindiffuser.viewer.report import write_reports
from staindiffuser.viewer.results import find_results
from staindiffuser.viewer.server import OPENSEADRAGON
from tests.viewer_results import Viewer, stain, viewing, write_quality

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium: install Debian's package chromium, or another build of it"
    ),
    pytest.mark.skipif(
        not OPENSEADRAGON.is_file(), reason=f"OpenSeadragon is not built in: {OPENSEADRAGON} is missing"
    ),
]

PATIENCE_MS = 60_000
"""A busy machine takes half a minute to open a page."""

Open = Callable[..., Any]


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, viewer: Viewer) -> Iterator[Open]:
    """Opens the page at an address behind "#"; afterwards nothing may have gone wrong and nobody else been asked."""
    problems: list[str] = []
    contexts = []

    def open_at(address: str = "", *, size: tuple[int, int] = (1280, 800), at: Viewer = viewer) -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)

        def asked(request: Any) -> None:
            if not request.url.startswith((at.address, "data:", "blob:")):
                problems.append(f"asked {request.url}")

        def said(message: Any) -> None:
            # The tests themselves read what was drawn back, which Chromium calls slow; OpenSeadragon mentions tiles of
            # a layer that was switched off while they loaded.
            expected = "getImageData" in message.text or "loaded before reset" in message.text
            if message.type in ("error", "warning") and not expected:
                problems.append(f"console: {message.text}")

        def answered(answer: Any) -> None:
            if answer.status >= 400:
                problems.append(f"{answer.status} {answer.url}")

        page.on("request", asked)
        page.on("console", said)
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("response", answered)
        page.goto(at.address + address)
        until(page, "document.querySelectorAll('#cell-classes input').length > 0")
        until(page, "document.querySelector('#magnification').textContent !== ''")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert not problems


def until(page: Any, expression: str) -> None:
    """Wait until an expression holds; Playwright's own way evaluates strings in the page, which the page forbids."""
    for _ in range(PATIENCE_MS // 100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not in time: {expression}")


def address(page: Any) -> dict[str, str]:
    """What stands behind "#", after the page had time, by its own clock, to write it there."""
    page.evaluate("() => new Promise((done) => setTimeout(done, 350))")
    return {name: values[0] for name, values in parse_qs(page.url.partition("#")[2]).items()}


def place(page: Any) -> tuple[float, float, float]:
    """Centre and scale, when they do not change any more."""
    found, before = address(page), None
    while found != before:
        page.wait_for_timeout(150)
        found, before = address(page), found
    return float(found["x"]), float(found["y"]), float(found["scale"])


def panels(page: Any) -> list[str]:
    return page.locator(".panel h3").all_inner_texts()


def place_after(page: Any, before: tuple[float, float, float]) -> tuple[float, float, float]:
    """The place, once it is another one."""
    for _ in range(40):
        found = place(page)
        if found != before:
            return found
    raise AssertionError(f"the view stays at {before}")


def drawn(page: Any, panel: int) -> int:
    """Number of pixels that cells and regions cover on a panel, when it does not change any more."""
    script = """(i) => {
        const canvas = document.querySelectorAll('.panel .marks')[i];
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let found = 0;
        for (let j = 3; j < data.length; j += 4) if (data[j] > 100) found++;
        return found;
    }"""
    found, before = -1, -2
    while found != before:
        page.wait_for_timeout(350)
        found, before = page.evaluate(script, panel), found
    return found


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
    assert place(page) == pytest.approx(back, rel=0.02)
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


@pytest.mark.parametrize(
    ("view", "size"),
    [("side", (1280, 800)), ("side", (400, 800)), ("overlay", (400, 800)), ("fluorescence", (1280, 800))],
)
def test_axe_finds_nothing_serious_and_nothing_is_cut(open_page: Open, size: tuple[int, int], view: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_page(f"#slide=first&view={view}&region=200,300;900,300;900,900;200,900", size=size)
    page.wait_for_selector("#region-scores td")
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.locator("#notice strong").is_visible()


def test_the_report_opens_offline_and_prints_on_two_pages(browser: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "first-stained", tmp_path / "printed-stained")
    write_quality(tmp_path / "printed-stained", {(2, 3): "blur"})
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


def test_a_real_slide(open_page: Open, real_data: Path, tmp_path: Path) -> None:
    slide = real_data / "slides" / "CMU-1-Small-Region.svs"
    stain(slide, tmp_path / "CMU-1-Small-Region-stained")
    with viewing(tmp_path, slides=(slide,)) as running:
        page = open_page("#x=1300&y=380&scale=1", at=running)
        assert panels(page)[0] == "H&E (input)"
        assert page.locator("#alerts").inner_text() == ""
        assert json.loads(running.get("/api/slides/CMU-1-Small-Region").body)["he"]["levels"][0] == [2220, 2967]
        page.close()  # before its server
