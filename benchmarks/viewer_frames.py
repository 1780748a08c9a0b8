"""Frames a second of zooming on the viewer's page, beside OpenSeadragon with a single layer on an empty page.

Headless Chromium, which is given no GPU and has nothing in its cache, turns the wheel for a while: in until cells are
drawn as outlines, out again, and on to the next place. Frames are counted by ``requestAnimationFrame``. Then the same
once more, and whenever OpenSeadragon has drawn a frame, its canvas is read back: a hole is where the slide is and
nothing was drawn, neither the tile that belongs there nor a coarser one.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from staindiffuser.errors import DependencyError

__all__ = ["BARE", "LAYOUTS", "LayoutFrames", "count_frames"]

WINDOW = (1280, 800)
PATIENCE = 60
"""Seconds in which a page has its first tiles."""
SETTLE = 1.5
"""Seconds after that until the wheel is turned."""
TURN = 0.09
"""Seconds between two steps of the wheel."""
STEPS = 14
"""Of the wheel in one direction: from a slide of 20,000 pixels on a third of the page to half of its resolution."""
PLACES = ((0.35, 0.4), (0.65, 0.6), (0.4, 0.65))
"""Where in the first panel the pointer is when the wheel turns; after each way in and out, the next."""
LATE = 25.0
"""Milliseconds between two frames from which one of 60 a second was left out."""
BARE = "bare OpenSeadragon"
LAYOUTS = {
    "side by side": "view=side",
    "overlay": "view=overlay",
    "fluorescence": "view=fluorescence",
    "fluorescence without cells": "view=fluorescence&cells=off",
}
ORDER = (BARE, *LAYOUTS, BARE)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]

_COUNT = """() => {
  const times = (window.__times = []);
  const note = (time) => { times.push(time); if (!window.__enough) requestAnimationFrame(note); };
  window.__enough = false;
  requestAnimationFrame(note);
}"""
_WATCH_HOLES = """() => {
  const STEP = 4; // of so many pixels in both directions, one is looked at
  const seen = (window.__seen = []);
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  for (const element of document.querySelectorAll(".panel .image, #image")) {
    const viewer = OpenSeadragon.getViewer(element);
    viewer.addHandler("update-viewport", () => {
      const drawn = viewer.drawer.canvas;
      const ratio = drawn.width / viewer.viewport.getContainerSize().x;
      const image = viewer.world.getItemAt(viewer.world.getItemCount() - 1);
      const bounds = viewer.viewport.viewportToViewerElementRectangle(image.getBounds(true)).times(ratio);
      // Inside the image by more than a pixel, and on the canvas.
      const [left, top] = [Math.max(0, Math.ceil(bounds.x) + 1), Math.max(0, Math.ceil(bounds.y) + 1)];
      const right = Math.min(drawn.width, Math.floor(bounds.x + bounds.width) - 1);
      const bottom = Math.min(drawn.height, Math.floor(bounds.y + bounds.height) - 1);
      const [width, height] = [Math.floor((right - left) / STEP), Math.floor((bottom - top) / STEP)];
      if (width < 1 || height < 1) return;
      if (canvas.width < width || canvas.height < height) {
        [canvas.width, canvas.height] = [drawn.width, drawn.height];
        context.imageSmoothingEnabled = false;
      }
      context.clearRect(0, 0, width, height);
      context.drawImage(drawn, left, top, width * STEP, height * STEP, 0, 0, width, height);
      const { data } = context.getImageData(0, 0, width, height);
      let holes = 0;
      for (let i = 3; i < data.length; i += 4) if (data[i] < 128) holes++;
      seen.push(holes / (width * height));
    });
  }
}"""
_SHOWN = """() => [...document.querySelectorAll(".panel .image, #image")].every((element) => {
  const { world } = OpenSeadragon.getViewer(element);
  return world.getItemCount() > 0 && world.getItemAt(world.getItemCount() - 1).getFullyLoaded();
})"""
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
    """In the mean."""
    median_per_second: float
    """One over the median time between two frames."""
    late: float
    """Share of the frames that came after :data:`LATE`: the one before them was left out."""
    longest_ms: float
    """Between two frames."""
    main_thread_ms: float
    """Of the page's main thread, per frame."""
    looked_at: int = 0
    """Views that were read back, each of one panel in one frame."""
    with_holes: int = 0
    """Of them, those where part of the slide was not drawn."""
    largest_hole: float = 0.0
    """The largest share of the slide in view that was not drawn."""

    def line(self) -> str:
        """For people."""
        return (
            f"zooming, {self.layout}: {self.per_second:.1f} frames a second (median {self.median_per_second:.1f}), "
            f"{self.late:.1%} late, longest {self.longest_ms:.0f} ms, main thread {self.main_thread_ms:.1f} ms a "
            f"frame; holes in {self.with_holes} of {self.looked_at} views, the largest {self.largest_hole:.1%}"
        )


def count_frames(
    address: str, about: dict[str, Any], seconds: float, layouts: Sequence[str] = ORDER
) -> list[LayoutFrames]:
    """Zoom in and out in every layout, the bare page first and last.

    Args:
        address: of the viewer's page.
        about: what the server says of its first slide.
        seconds: for how long, each.
        layouts: of :data:`LAYOUTS`, or :data:`BARE`.

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

        def zoomed(layout: str, watch: str) -> tuple[Any, float]:
            """What a script of :func:`_zoom` noted, and seconds of the main thread, on a page of its own."""
            context = chromium.new_context(viewport={"width": WINDOW[0], "height": WINDOW[1]})
            page = context.new_page()
            if layout == BARE:
                _open_bare(page, address, about)
            else:
                page.goto(f"{address}#{LAYOUTS[layout]}")
                page.locator("#cell-classes input").first.wait_for(state="attached")
            noted = _zoom(page, watch, seconds)
            context.close()
            return noted

        for layout in layouts:
            times, spent = zoomed(layout, _COUNT)
            seen, _ = zoomed(layout, _WATCH_HOLES)
            gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
            counted.append(
                LayoutFrames(
                    layout=layout,
                    per_second=round(1000 * len(gaps) / (times[-1] - times[0]), 1),
                    median_per_second=round(1000 / statistics.median(gaps), 1),
                    late=round(sum(gap >= LATE for gap in gaps) / len(gaps), 4),
                    longest_ms=round(max(gaps), 1),
                    main_thread_ms=round(1000 * spent / len(gaps), 1),
                    looked_at=len(seen),
                    with_holes=sum(share > 0 for share in seen),
                    largest_hole=round(max(seen, default=0.0), 4),
                )
            )
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


def _zoom(page: Any, watch: str, seconds: float) -> tuple[Any, float]:
    """Turn the wheel while a script watches: what it noted, and seconds of the page's main thread meanwhile."""
    end = time.monotonic() + PATIENCE
    # Not Playwright's own way to wait, which evaluates strings in the page: the page forbids that.
    while not page.evaluate(_SHOWN) and time.monotonic() < end:
        page.wait_for_timeout(100)
    page.wait_for_timeout(1000 * SETTLE)
    panel = page.locator(".panel, #image").first.bounding_box()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    before = _task_seconds(session)
    page.evaluate(watch)
    end, step = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        if step % (2 * STEPS) == 0:
            across, down = PLACES[step // (2 * STEPS) % len(PLACES)]
            page.mouse.move(panel["x"] + across * panel["width"], panel["y"] + down * panel["height"])
        page.mouse.wheel(0, -120 if step // STEPS % 2 == 0 else 120)
        page.wait_for_timeout(1000 * TURN)
        step += 1
    noted = page.evaluate("() => { window.__enough = true; return window.__times ?? window.__seen; }")
    return noted, _task_seconds(session) - before


def _task_seconds(session: Any) -> float:
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(float(one["value"]) for one in metrics if one["name"] == "TaskDuration")
