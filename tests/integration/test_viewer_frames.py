"""``bench view --frames``: frames are counted in Chromium, and a hole is seen where nothing is drawn."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from staindiffuser.benchmarks import viewer_frames
from staindiffuser.benchmarks.viewer_frames import BARE, count_frames
from tests.viewer_page import NEEDED
from tests.viewer_results import viewing

pytestmark = NEEDED


def test_frames_are_counted_and_holes_seen(viewed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    monkeypatch.setattr(viewer_frames, "SETTLE", 0.3)
    with viewing(viewed / "slide-stained", slides=(viewed / "slide.ome.tiff",)) as running:
        about = running.get("/api/slides/slide").json()
        (overlay,) = count_frames(running.address, about, 0.8, ["overlay"])
        broken = copy.deepcopy(about)
        broken["stains"][0]["name"] = "none"
        (empty,) = count_frames(running.address, broken, 0.8, [BARE])
    assert (overlay.layout, empty.layout) == ("overlay", BARE)
    for one in (overlay, empty):
        assert 0 < one.per_second < 300
        assert 0 < one.median_per_second < 300
        assert one.longest_ms > 0
        assert 0 <= one.late <= 1
        assert one.looked_at > 0
    assert (overlay.with_holes, overlay.largest_hole) == (0, 0)
    assert (empty.with_holes, empty.largest_hole) == (empty.looked_at, 1), "no tile can be read"
    assert f"holes in {empty.looked_at} of {empty.looked_at} views" in empty.line()
