"""The viewer's page in Chromium, for tests: opening it, what is used and what goes wrong, and what it shows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import parse_qs

import pytest

from staindiffuser.viewer.server import OPENSEADRAGON
from tests.viewer_results import Viewer

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip

NEEDED = [
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium: install Debian's package chromium, or another build of it"
    ),
    pytest.mark.skipif(
        not OPENSEADRAGON.is_file(), reason=f"OpenSeadragon is not built in: {OPENSEADRAGON} is missing"
    ),
]
"""Marks of every test of the page."""

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
"""Everything that can be pressed, moved or typed on the page, and the test of test_viewer_browser.py that does so; both
are checked."""

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
"""See :meth:`Pages.open`."""


class Pages:
    """Opens the page, and notes what goes wrong, who else is asked, and what is used."""

    def __init__(self, browser: Any, viewer: Viewer) -> None:
        self._browser = browser
        self._viewer = viewer
        self._contexts: list[Any] = []
        self.problems: list[str] = []
        self.used: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for context in self._contexts:
            context.close()

    def open(self, address: str = "", *, size: tuple[int, int] = (1280, 800), at: Viewer | None = None) -> Any:
        """The page at an address behind "#", of this viewer or another one."""
        at = at or self._viewer
        context = self._browser.new_context(viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce")
        self._contexts.append(context)
        context.expose_function("__note", lambda name: self.used.add(name))  # Playwright marks what it is given
        context.add_init_script(WATCH)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)

        def asked(request: Any) -> None:
            if not request.url.startswith((at.address, "data:", "blob:")):
                self.problems.append(f"asked {request.url}")

        def said(message: Any) -> None:
            # The tests themselves read what was drawn back, which Chromium calls slow; OpenSeadragon mentions tiles of
            # a layer that was switched off while they loaded.
            expected = "getImageData" in message.text or "loaded before reset" in message.text
            if message.type in ("error", "warning") and not expected:
                self.problems.append(f"console: {message.text}")

        def answered(answer: Any) -> None:
            if answer.status >= 400:
                self.problems.append(f"{answer.status} {answer.url}")

        page.on("request", asked)
        page.on("console", said)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("response", answered)
        page.goto(at.address + address)
        until(page, "document.querySelectorAll('#cell-classes input').length > 0")
        until(page, "document.querySelector('#magnification').textContent !== ''")
        return page


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
