"""What the viewer's server refuses: paths out of its folders, other pages, other names, what is no request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.viewer_results import Viewer, viewing


@pytest.fixture(scope="module")
def viewer(viewed: Path) -> Iterator[Viewer]:
    with viewing(viewed / "slide-stained") as running:
        yield running


@pytest.mark.parametrize(
    "path",
    [
        "/slides/slide/stain/cd3/0/99_0.jpg",
        "/slides/slide/stain/cd3/9/0_0.jpg",
        "/slides/slide/stain/cd3/0/" + "9" * 5000 + "_0.jpg",
        "/slides/slide/stain/cd3/-1/0_0.jpg",
        "/slides/slide/stain/cd3/0/-1_0.jpg",
        "/slides/slide/stain/none/0/0_0.jpg",
        "/slides/slide/he/" + "9" * 400 + "/0_0.jpg",
        "/slides/slide/cells/99/0_0.json",
        "/slides/slide/cells/0/x_y.json",
        "/slides/other/thumbnail.jpg",
        "/api/slides/..%2f..%2fetc",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/%2e%2e/pyproject.toml",
        "/static//etc/passwd",
        "/slides/../../etc/passwd",
        "/slides/slide/stain/..%2f..%2fcd3/0/0_0.jpg",
        "/nowhere",
    ],
)
def test_what_is_not_there_is_not_found(viewer: Viewer, path: str) -> None:
    answer = viewer.get(path)
    assert answer.status == 404
    assert b"Traceback" not in answer.body
    assert b"root:" not in answer.body


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"polygon": []},
        {"polygon": [[0, 0], [1, 1]]},
        {"polygon": [[0, 0], [1, 1], [2, 2]]},
        {"polygon": [[0, 0], [1e400, 1], [2, 0]]},
        {"polygon": [["a", 0], [1, 1], [2, 2]]},
        {"polygon": [[-5, -5], [-1, -5], [-1, -1]]},
        {"polygon": [[0, 0], [9, 0], [9, 9]] * 500},
        {"polygon": [[0, 0], [9, 0], [9, 9]], "threshold": 2},
        {"polygon": [[0, 0], [9, 0], [9, 9]], "threshold": None},
        [],
        "x" * 300_000,
    ],
)
def test_a_region_that_is_none_is_refused(viewer: Viewer, data: object) -> None:
    answer = viewer.post("/api/slides/slide/region", data)
    assert answer.status == 400
    assert answer.json()["error"]


def test_a_body_that_is_not_json_is_refused(viewer: Viewer) -> None:
    path = "/api/slides/slide/region"
    assert viewer.request("POST", path, b"{", {"Content_Type": "application/json"}).status == 400
    assert viewer.request("POST", path, b"[" * 100_000, {"Content_Type": "application/json"}).status == 400
    assert viewer.request("POST", path, b"{}", {"Content_Type": "text/plain"}).status == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:80"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"}, 403),
        ({"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "cors", "Sec_Fetch_Dest": "empty"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}, 200),
        ({"Sec_Fetch_Site": "same-origin", "Sec_Fetch_Mode": "cors", "Sec_Fetch_Dest": "empty"}, 200),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:1234"}, 200),
    ],
)
def test_other_pages_and_other_names_are_refused(viewer: Viewer, headers: dict[str, str], status: int) -> None:
    answer = viewer.get("/api/slides", **headers)
    assert answer.status == status
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert (b"slide" in answer.body) == (status == 200)


def test_only_reading_methods(viewer: Viewer) -> None:
    assert viewer.request("DELETE", "/api/slides", None, {}).status == 405
    assert viewer.request("OPTIONS", "/api/slides", None, {"Origin": "http://evil.example"}).status in (403, 405)
    assert viewer.request("POST", "/api/slides", b"", {}).status == 405


def test_a_token_is_asked_for_and_becomes_a_cookie(viewed: Path) -> None:
    with viewing(viewed / "slide-stained", token="a-token-of-a-test") as viewer:
        assert viewer.get("/").status == 401
        assert viewer.get("/api/slides?token=wrong").status == 401
        assert viewer.get("/api/slides?token=%C3%A9").status == 401
        welcome = viewer.get("/?token=a-token-of-a-test&x=1")
        assert (welcome.status, welcome.headers["location"]) == (303, "/?x=1")
        cookie = welcome.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite" in cookie.lower()
        assert viewer.get("/api/slides", Cookie=cookie.partition(";")[0]).status == 200
        assert viewer.get("/api/slides", Cookie="staindiffuser-token=wrong").status == 401
        away = viewer.get("//evil.example?token=a-token-of-a-test")
        assert away.headers.get("location", "/").startswith("/")
        assert not away.headers.get("location", "/").startswith("//")
