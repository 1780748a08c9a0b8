"""The viewer's page on whole slides: one walk over every control."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.viewer_page import (
    CONTROLS,
    NEEDED,
    Pages,
    address,
    axe_violations,
    drag,
    drawn,
    panels,
    place,
    place_after,
    until,
)
from tests.viewer_results import stain, viewing, write_large_result, write_quality

pytestmark = NEEDED


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CMU-1-Small-Region", "large"])
def test_every_control_on_a_whole_slide(browser: Any, kind: str, tmp_path: Path, request: Any) -> None:
    """On a scanner's slide, and on one of 20,480² pixels; each has a second result, and flagged tiles."""
    if kind == "large":
        slide, painted = write_large_result(tmp_path)
    else:
        slide = request.getfixturevalue("real_data") / "slides" / f"{kind}.svs"
        painted = tmp_path / f"{kind}-stained"
        stain(slide, painted)
    write_quality(painted, {(1, 1): "unlike", (1, 2): "blur"})
    shutil.copytree(painted, tmp_path / "second-stained")
    with viewing(painted, tmp_path / "second-stained", slides=(slide,)) as running, Pages(browser, running) as pages:
        page = pages.open()
        use_everything(page)
        found = axe_violations(page)
    assert found == []
    assert pages.problems == []
    assert pages.used == set(CONTROLS)


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

    place(page)  # at rest in the panels of this layout, or home would be that of the last one's, which are larger
    page.keyboard.press("0")
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
