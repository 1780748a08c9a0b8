"""The viewer's page in Chromium: every control is used, nothing is asked of another host, nothing goes wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from staindiffuser.client.run_record import read_run
from staindiffuser.viewer.app import STATIC
from staindiffuser.viewer.report import write_reports
from staindiffuser.viewer.results import find_results
from staindiffuser.viewer.server import OPENSEADRAGON
from tests.viewer_results import Viewer, stain, viewing, write_large_result, write_quality

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

CONTROLS = {
    "a skip": "test_with_the_keyboard_alone",
    "a slide": "test_slides_are_changed_by_list_keys_and_history",
    "button side": "test_layouts_stains_opacity_and_the_swipe_line",
    "button overlay": "test_layouts_stains_opacity_and_the_swipe_line",
    "button fluorescence": "test_layouts_stains_opacity_and_the_swipe_line",
    "button zoom-out": "test_panels_move_together_by_mouse_keys_and_buttons",
    "button zoom-in": "test_panels_move_together_by_mouse_keys_and_buttons",
    "button zoom-home": "test_panels_move_together_by_mouse_keys_and_buttons",
    "button draw-rectangle": "test_regions_are_drawn_and_scored",
    "button draw-polygon": "test_regions_are_drawn_and_scored",
    "button score-view": "test_regions_are_drawn_and_scored",
    "button clear-region": "test_regions_are_drawn_and_scored",
    "button copy-link": "test_a_link_opens_the_same_place_again",
    "button open-help": "test_with_the_keyboard_alone",
    "button close": "test_with_the_keyboard_alone",
    "input stain": "test_layouts_stains_opacity_and_the_swipe_line",
    "input opacity": "test_layouts_stains_opacity_and_the_swipe_line",
    "input swipe-on": "test_layouts_stains_opacity_and_the_swipe_line",
    "input swipe": "test_layouts_stains_opacity_and_the_swipe_line",
    "line": "test_layouts_stains_opacity_and_the_swipe_line",
    "input class": "test_cells_by_class_and_probability",
    "input threshold": "test_cells_by_class_and_probability",
    "input flags-on": "test_flagged_tiles_are_hatched_and_said_first",
    "select compare": "test_two_results_of_one_slide_are_shown_with_their_difference",
    "summary": "test_the_page_shows_slide_stains_scores_and_what_they_are",
    "image drag": "test_panels_move_together_by_mouse_keys_and_buttons",
    "image wheel": "test_panels_move_together_by_mouse_keys_and_buttons",
    "image dblclick": "test_panels_move_together_by_mouse_keys_and_buttons",
    "key ArrowLeft": "test_panels_move_together_by_mouse_keys_and_buttons",
    "key ArrowRight": "test_panels_move_together_by_mouse_keys_and_buttons",
    "key ArrowUp": "test_panels_move_together_by_mouse_keys_and_buttons",
    "key ArrowDown": "test_panels_move_together_by_mouse_keys_and_buttons",
    "key +": "test_panels_move_together_by_mouse_keys_and_buttons",
    "key =": "test_panels_move_together_by_mouse_keys_and_buttons",
    "key -": "test_panels_move_together_by_mouse_keys_and_buttons",
    "key 0": "test_panels_move_together_by_mouse_keys_and_buttons",
    "key m": "test_layouts_stains_opacity_and_the_swipe_line",
    "key s": "test_layouts_stains_opacity_and_the_swipe_line",
    "key ,": "test_layouts_stains_opacity_and_the_swipe_line",
    "key .": "test_layouts_stains_opacity_and_the_swipe_line",
    "key 1": "test_layouts_stains_opacity_and_the_swipe_line",
    "key f": "test_flagged_tiles_are_hatched_and_said_first",
    "key c": "test_cells_by_class_and_probability",
    "key r": "test_regions_are_drawn_and_scored",
    "key p": "test_regions_are_drawn_and_scored",
    "key v": "test_regions_are_drawn_and_scored",
    "key Enter": "test_regions_are_drawn_and_scored",
    "key Escape": "test_regions_are_drawn_and_scored",
    "key l": "test_a_link_opens_the_same_place_again",
    "key ?": "test_with_the_keyboard_alone",
    "key [": "test_slides_are_changed_by_list_keys_and_history",
    "key ]": "test_slides_are_changed_by_list_keys_and_history",
}
"""Everything that can be pressed, moved or typed on the page, and the test that does so; both are checked."""

WATCH = """
const named = window.__named = (element) => {
  const at = (selector) => element.closest(selector);
  if (at(".swipe")) return "line";
  if (at("#slide-list a")) return "a slide";
  if (at("a.skip")) return "a skip";
  if (at("summary")) return "summary";
  if (at("#stains input")) return "input stain";
  if (at("#cell-classes input")) return "input class";
  if (at("dialog form button")) return "button close";
  const one = at("button, input, select, a[href]");
  return one && `${one.localName} ${one.dataset.mode ?? one.id}`;
};
const use = (name) => name && window.__note(name);
for (const kind of ["click", "change", "input"]) addEventListener(kind, (event) => use(named(event.target)), true);
const letter = ({ key }) => (key.length === 1 ? key.toLowerCase() : key);
addEventListener("keydown", (event) => use(`key ${letter(event)}`), true);
const over = (event) => event.target.closest(".panel .image");
for (const kind of ["wheel", "dblclick"]) addEventListener(kind, (event) => over(event) && use(`image ${kind}`), true);
addEventListener("pointermove", (event) => {
  if (event.buttons && event.target.closest(".swipe")) use("line");
  else if (event.buttons && over(event)) use("image drag");
}, true);
"""
"""Notes in the page what is used."""

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
def open_page(browser: Any, viewer: Viewer, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens the page at an address behind "#"; afterwards nothing may have gone wrong, nobody else been asked, and all
    been used that :data:`CONTROLS` says of the test."""
    problems: list[str] = []
    noted: set[str] = set()
    contexts = []

    def open_at(
        address: str = "", *, size: tuple[int, int] = (1280, 800), at: Viewer = viewer, used: set[str] = noted
    ) -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce")
        contexts.append(context)
        context.expose_function("__note", lambda name: used.add(name))  # Playwright marks what it is given
        context.add_init_script(WATCH)
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
    name = request.node.originalname
    assert {control for control, test in CONTROLS.items() if test == name} <= noted


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CMU-1-Small-Region", "large"])
def test_every_control_on_a_whole_slide(open_page: Open, kind: str, tmp_path: Path, request: Any) -> None:
    """On a scanner's slide, and on one of 20,480² pixels; each has a second result, and flagged tiles."""
    if kind == "large":
        slide, painted = write_large_result(tmp_path)
    else:
        slide = request.getfixturevalue("real_data") / "slides" / f"{kind}.svs"
        painted = tmp_path / f"{kind}-stained"
        stain(slide, painted)
    write_quality(painted, {(1, 1): "unlike", (1, 2): "blur"})
    shutil.copytree(painted, tmp_path / "second-stained")
    used: set[str] = set()
    with viewing(painted, tmp_path / "second-stained", slides=(slide,)) as running:
        page = open_page(at=running, used=used)
        use_everything(page)
        found = axe_violations(page)
        page.close()  # before its server
    assert found == []
    assert used == set(CONTROLS)


def use_everything(page: Any) -> None:
    """Every control in turn, on a page of two results of one slide that has cells and flagged tiles."""
    titles, start = panels(page), place(page)
    assert titles[0] == "H&E (input)"
    assert drawn(page, 0) > 0  # hatched
    moves: list[Callable[[], None]] = [page.locator("#zoom-in").click, page.locator("#zoom-out").click]
    moves += [partial(page.keyboard.press, key) for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp")]
    moves += [partial(page.keyboard.press, key) for key in ("+", "-", "=")]
    box = page.locator(".panel").nth(1).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    moves += [lambda: page.mouse.dblclick(x, y), lambda: page.mouse.wheel(0, -200), lambda: drag(page, (x, y), 40, 30)]
    moves += [page.locator("#zoom-home").click]
    before = start
    for move in moves:
        move()
        before = place_after(page, before)
    assert before == pytest.approx(start, rel=0.02)
    page.locator("#zoom-in").click()
    page.keyboard.press("0")
    assert place(page) == pytest.approx(start, rel=0.02)

    def scored(corners: int) -> None:
        page.wait_for_selector("#region-scores td")
        assert len(address(page)["region"].split(";")) == corners
        page.keyboard.press("Escape")
        assert not page.locator("#region").is_visible()

    for begin in (page.locator("#draw-rectangle").click, lambda: page.keyboard.press("r")):
        begin()
        drag(page, (x - 50, y - 50), 100, 90)
        scored(4)
    for begin in (page.locator("#draw-polygon").click, lambda: page.keyboard.press("p")):
        begin()
        for dx, dy in ((-60, -50), (50, -60), (10, 70)):
            page.mouse.click(x + dx, y + dy)
        page.keyboard.press("Enter")
        scored(3)
    page.keyboard.press("v")
    scored(4)
    page.locator("#score-view").click()
    page.wait_for_selector("#region-scores td")
    page.locator("#clear-region").click()
    assert "region" not in address(page)

    box_of_stain = page.locator("#stains input").first
    box_of_stain.uncheck()
    assert len(panels(page)) == len(titles) - 1
    page.keyboard.press("1")
    page.locator("#compare").select_option(index=1)
    assert len(panels(page)) == 3 * len(titles) - 2
    page.locator("#compare").select_option("")
    assert panels(page) == titles

    page.get_by_role("button", name="Fluorescence").click()
    assert page.locator(".panel.dark").count() == 1
    page.get_by_role("button", name="Overlay").click()
    page.locator("#opacity").fill("60")
    page.locator("#swipe-on").check()
    page.locator("#swipe").fill("30")
    line = page.locator(".swipe").bounding_box()
    drag(page, (line["x"] + line["width"] / 2, line["y"] + 60), 80, 0)
    for key in (".", ","):
        page.keyboard.press(key)
    assert 0.3 < float(address(page)["swipe"]) < 0.6
    assert address(page)["opacity"] == "0.6"
    page.keyboard.press("s")
    assert "swipe" not in address(page)
    page.keyboard.press("m")
    assert address(page)["view"] == "fluorescence"
    page.get_by_role("button", name="Side by side").click()
    assert panels(page) == titles

    page.keyboard.press("0")  # the other layouts are larger
    place(page)
    page.locator("#flags-on").uncheck()
    marked = drawn(page, 0)
    page.keyboard.press("f")
    assert drawn(page, 0) > marked
    page.locator("#cell-classes input").first.uncheck()
    marked = drawn(page, 1)
    page.locator("#cell-classes input").first.check()
    assert drawn(page, 1) > marked
    page.locator("#threshold").fill("0.95")
    assert address(page)["p"] == "0.95"
    page.locator("#threshold").fill("0.5")
    page.keyboard.press("c")
    assert address(page)["cells"] == "off"
    page.keyboard.press("c")

    page.locator("#copy-link").click()
    page.keyboard.press("l")
    until(page, "document.querySelector('#message').textContent !== ''")
    page.locator("#open-help").click()
    page.get_by_role("button", name="Close").click()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.locator("summary").click()
    assert page.locator("#provenance").is_visible()
    page.locator("a.skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "panels"
    title = page.locator("#title").inner_text()
    for change in (page.locator("#slide-list a").nth(1).click, lambda: page.keyboard.press("[")):
        change()
        until(page, f"document.querySelector('#title').textContent !== {json.dumps(title)}")
        title = page.locator("#title").inner_text()
    page.keyboard.press("]")
    until(page, f"document.querySelector('#title').textContent !== {json.dumps(title)}")


def drag(page: Any, start: tuple[float, float], dx: float, dy: float) -> None:
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(start[0] + dx, start[1] + dy, steps=4)
    page.mouse.up()


def axe_violations(page: Any) -> list[tuple[str, str]]:
    """What axe-core calls serious or critical: rule, and the first element."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    return [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
