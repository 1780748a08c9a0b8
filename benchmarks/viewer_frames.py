"""Frames a second of zooming on the viewer's page, beside OpenSeadragon with a single layer on an empty page.

Headless Chromium, which is given no GPU, turns the wheel for a while; frames are counted by ``requestAnimationFrame``.
"""

from __future__ import annotations

import itertools
import shutil
import time
from dataclasses import dataclass
from typing import Any

from staindiffuser.errors import DependencyError

__all__ = ["BARE", "LayoutFrames", "count_frames"]

WINDOW = (1280, 800)
SETTLE = 2.5
"""Seconds before the wheel is turned: the page has its first tiles."""
TURN = 0.09
"""Seconds between two steps of the wheel."""
STEPS = 8
"""Of the wheel in one direction."""
BARE = "bare OpenSeadragon"
LAYOUTS = {
    "side by side": "view=side",
    "overlay": "view=overlay",
    "fluorescence": "view=fluorescence",
    "fluorescence without cells": "view=fluorescence&cells=off",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]

_COUNT = """() => {
  const times = (window.__times = []);
  const note = (time) => { times.push(time); if (!window.__enough) requestAnimationFrame(note); };
  window.__enough = false;
  requestAnimationFrame(note);
}"""
_PAGE = """<!doctype html><body style="margin: 0"><div id="image" style="width: {width}px; height: {height}px"></div>
<script src="/static/vendor/openseadragon.min.js"></script><script src="/bare.js"></script>"""
_SCRIPT = """OpenSeadragon({{
  element: document.getElementById("image"), drawer: "canvas", showNavigationControl: false,
  tileSources: {{
    width: {width}, height: {height}, tileSize: 512, minLevel: 0, maxLevel: {top},
    getTileUrl: (level, x, y) => `{base}/${{{top} - level}}/${{x}}_${{y}}.jpg?v=bare`,
  }},
}});"""


@dataclass(frozen=True, kw_only=True)
class LayoutFrames:
    """What was counted of one page."""

    layout: str
    """Of :data:`LAYOUTS`, or :data:`BARE`."""
    per_second: float
    longest_ms: float
    """Between two frames."""
    main_thread_ms: float
    """Of the page's main thread, per frame."""


def count_frames(address: str, about: dict[str, Any], seconds: float) -> list[LayoutFrames]:
    """Zoom in and out in every layout, the bare page first and last.

    Args:
        address: of the viewer's page.
        about: what the server says of its first slide.
        seconds: for how long, each.

    Raises:
        DependencyError: Playwright or Chromium is missing.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        browser = None
    if browser is None:
        raise DependencyError("counting frames needs the package playwright and a Chromium")
    counted: list[LayoutFrames] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=ARGUMENTS)
        context = chromium.new_context(viewport={"width": WINDOW[0], "height": WINDOW[1]})
        for layout in (BARE, *LAYOUTS, BARE):
            page = context.new_page()
            if layout == BARE:
                _open_bare(page, address, about)
            else:
                page.goto(f"{address}#{LAYOUTS[layout]}")
                page.locator("#cell-classes input").first.wait_for(state="attached")
            counted.append(_count(page, layout, seconds))
            page.close()
        chromium.close()
    return counted


def _open_bare(page: Any, address: str, about: dict[str, Any]) -> None:
    """A page that the browser makes itself: the server's own may run no other scripts."""
    stain = about["stains"][0]
    (width, height), top = stain["levels"][0], len(stain["levels"]) - 1
    base = f"/slides/{about['name']}/stain/{stain['name']}"
    html = _PAGE.format(width=WINDOW[0], height=WINDOW[1])
    script = _SCRIPT.format(width=width, height=height, top=top, base=base)
    page.route("**/bare.html", lambda route: route.fulfill(body=html, content_type="text/html"))
    page.route("**/bare.js", lambda route: route.fulfill(body=script, content_type="text/javascript"))
    page.goto(f"{address}bare.html")


def _count(page: Any, layout: str, seconds: float) -> LayoutFrames:
    page.wait_for_timeout(1000 * SETTLE)
    panel = page.locator(".panel, #image").first.bounding_box()
    page.mouse.move(panel["x"] + panel["width"] / 3, panel["y"] + panel["height"] / 3)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    before = _task_seconds(session)
    page.evaluate(_COUNT)
    end, step = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        page.mouse.wheel(0, -120 if step // STEPS % 2 == 0 else 120)
        page.wait_for_timeout(1000 * TURN)
        step += 1
    times = page.evaluate("() => { window.__enough = true; return window.__times; }")
    spent = _task_seconds(session) - before
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return LayoutFrames(
        layout=layout,
        per_second=round(1000 * len(gaps) / (times[-1] - times[0]), 1),
        longest_ms=round(max(gaps), 1),
        main_thread_ms=round(1000 * spent / len(gaps), 1),
    )


def _task_seconds(session: Any) -> float:
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(float(one["value"]) for one in metrics if one["name"] == "TaskDuration")
