"""Which slide the demonstration takes, and how long it waits for a network that is not there."""

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from staindiffuser import sample_slide
from staindiffuser.imaging.errors import SlideError
from staindiffuser.imaging.slides import open_slide


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STAINDIFFUSER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(sample_slide.SLIDES_VARIABLE, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def choose(tmp_path: Path, given: Path | None = None) -> tuple[sample_slide.Sample, list[str]]:
    said: list[str] = []
    return sample_slide.choose_slide(given, tmp_path / "out", said.append), said


def test_the_named_slide_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "mine.svs"
    with pytest.raises(SlideError, match="does not exist"):
        choose(tmp_path, path)
    path.write_bytes(b"x")
    chosen, said = choose(tmp_path, path)
    assert chosen.path == path
    assert said == []


def test_the_folder_of_the_variable_is_looked_into(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sample_slide.SLIDES_VARIABLE, str(real_data / "slides"))
    chosen, _ = choose(tmp_path)
    assert chosen.path == real_data / "slides" / sample_slide.NAME
    assert "found in" in chosen.what


@contextmanager
def serving(content: bytes | None) -> Iterator[str]:
    """A web server that gives these bytes, or accepts and stays silent."""
    connections: list[socket.socket] = []

    def loop() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            if content is not None:
                connection.recv(65536)
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
                connection.sendall(head.encode() + content)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/{sample_slide.NAME}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in connections:
        connection.close()


def test_it_is_downloaded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"a slide, as far as this test goes"
    monkeypatch.setattr(sample_slide, "SHA256", hashlib.sha256(content).hexdigest())
    with serving(content) as url:
        monkeypatch.setattr(sample_slide, "URL", url)
        chosen, _ = choose(tmp_path)
    assert chosen.path == tmp_path / "cache/slides" / sample_slide.NAME
    assert chosen.path.read_bytes() == content
    assert [path.name for path in chosen.path.parent.iterdir()] == [sample_slide.NAME]
    again, _ = choose(tmp_path)
    assert "found in" in again.what


@pytest.mark.parametrize("answer", [b"something else", None])
def test_without_the_right_file_a_slide_is_simulated_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    monkeypatch.setattr(sample_slide, "DOWNLOAD_SECONDS", 1.0)
    monkeypatch.setattr(sample_slide, "SIMULATED_SIZE", (600, 400))
    with serving(answer) as url:
        monkeypatch.setattr(sample_slide, "URL", url)
        with pytest.raises(sample_slide._DownloadError):
            sample_slide._download(tmp_path / "cache/slides", 1.0)
        chosen, said = choose(tmp_path)
    assert "simulat" in said[-1]
    assert "simulated" in chosen.what
    assert list((tmp_path / "cache/slides").iterdir()) == []
    with open_slide(chosen.path) as slide:
        assert slide.size == (600, 400)
        assert slide.pixel_size() == pytest.approx((0.5, 0.5))


def test_a_wrong_file_in_the_cache_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_slide, "SIMULATED_SIZE", (600, 400))
    monkeypatch.setattr(sample_slide, "URL", "http://127.0.0.1:9/x")
    place = tmp_path / "cache/slides"
    place.mkdir(parents=True)
    (place / sample_slide.NAME).write_bytes(b"wrong")
    chosen, said = choose(tmp_path)
    assert "SHA-256" in said[0]
    assert chosen.path.parent == tmp_path / "out"


@pytest.mark.network
def test_the_real_address(tmp_path: Path) -> None:
    path = sample_slide._download(tmp_path, sample_slide.DOWNLOAD_SECONDS)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sample_slide.SHA256
