"""``staindiffuser view`` as a user meets it: one address, a clean end, one line when it cannot."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from staindiffuser import demo
from staindiffuser.errors import DependencyError
from staindiffuser.sample_slide import Sample
from staindiffuser.viewer import server
from tests.running_serve import eventually
from tests.viewer_results import stain, write_slide

COMMAND = [sys.executable, "-c", "from staindiffuser.cli import main; main()", "view"]

pytestmark = pytest.mark.skipif(
    not server.OPENSEADRAGON.is_file(), reason=f"OpenSeadragon is not built in: {server.OPENSEADRAGON} is missing"
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    write_slide(folder / "slide.ome.tiff", 700, 600)
    stain(folder / "slide.ome.tiff", folder / "slide-stained")
    return folder / "slide-stained"


@contextmanager
def running(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The command, the address that it printed, and its lines up to there."""
    command = [*COMMAND, *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"open (http://\S+)", line):
                yield process, found[1], lines
                return
        raise AssertionError("".join(lines))
    finally:
        process.kill()
        process.communicate()


def status(address: str) -> int:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_prints_one_address_and_ends_cleanly(result: Path, number: signal.Signals) -> None:
    with running(result, "--port", 0) as (process, address, lines):
        assert sum("http" in line for line in lines) == 1
        assert status(address) == 200
        process.send_signal(number)
        _, rest = process.communicate(timeout=20)
    assert "Traceback" not in rest
    if number == signal.SIGINT:
        assert process.returncode == 0
        assert rest.strip() == "stopped"


def test_bench_view_takes_its_server_along(result: Path) -> None:
    command = [*COMMAND[:-1], "bench", "view", str(result), "--seconds", "60"]
    with subprocess.Popen(command) as bench:
        viewers: list[psutil.Process] = []
        try:
            assert eventually(lambda: any(map(listens, psutil.Process(bench.pid).children())))
            viewers = psutil.Process(bench.pid).children()
            bench.terminate()
            assert bench.wait(timeout=20) == 130
            assert not any(viewer.is_running() for viewer in viewers)
        finally:
            bench.kill()
            for viewer in viewers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    viewer.kill()


def listens(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(one.status == psutil.CONN_LISTEN for one in process.net_connections())
    return False


def test_elsewhere_than_on_loopback_it_asks_for_a_token(result: Path) -> None:
    with running(result, "--host", "0.0.0.0", "--port", 0) as (_, address, lines):
        port = re.search(r":(\d+)/\?token=(\S+)", address)
        assert port is not None
        assert any("not encrypted" in line for line in lines)
        assert status(f"http://127.0.0.1:{port[1]}/") == 401
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f"http://127.0.0.1:{port[1]}/?token={port[2]}", timeout=10) as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 4, "nowhere is not a folder"),
        (["RESULT", "--port", "TAKEN"], 2, "cannot be used"),
        (["RESULT", "--host", "no.such.host.invalid"], 2, "--host"),
        (["RESULT", "--token-file", "nowhere"], 2, "--token-file"),
    ],
)
def test_what_cannot_be_shown_is_one_line(result: Path, arguments: list[str], code: int, words: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = [{"RESULT": str(result), "TAKEN": str(taken.getsockname()[1])}.get(word, word) for word in arguments]
        done = subprocess.run([*COMMAND, *given], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_without_openseadragon_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(server, "OPENSEADRAGON", tmp_path / "openseadragon.min.js")
    with pytest.raises(DependencyError, match=r"lacks OpenSeadragon.*npm"):
        server.require_openseadragon()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_demonstration_ends_at_the_page_on_a_terminal_only(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    shown = []
    sample = Sample(path=result.parent / "slide.ome.tiff", what="a slide")
    monkeypatch.setattr("staindiffuser.sample_slide.choose_slide", lambda *_: sample)
    monkeypatch.setattr("staindiffuser.client.command.run_command", lambda *_: 0)
    monkeypatch.setattr(server, "view_results", lambda results, **_: shown.append(results))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("CI", raising=False)
    assert demo.main(["--output", str(tmp_path / "out")]) == 0
    assert shown == ([[tmp_path / "out"]] if terminal else [])
    if terminal:
        monkeypatch.setenv("CI", "1")
        demo.main(["--output", str(tmp_path / "out")])
        assert len(shown) == 1


DEMONSTRATION = """
import shutil, sys
from pathlib import Path
from staindiffuser import demo, sample_slide
from staindiffuser.client import command

slide, result, output = map(Path, sys.argv[1:])
sample_slide.choose_slide = lambda *_: sample_slide.Sample(path=slide, what="a slide")
command.run_command = lambda *_: shutil.copytree(result, output, dirs_exist_ok=True) and 0
sys.exit(demo.main(["--output", str(output)]))
"""
"""The demonstration without its model: the result is there already."""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_the_demonstration_in_a_terminal_ends_with_ctrl_c(result: Path, tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    arguments = [str(result.parent / "slide.ome.tiff"), str(result), str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", DEMONSTRATION, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={name: value for name, value in os.environ.items() if name != "CI"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    said = ""

    def read() -> bool:
        nonlocal said
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's way to say that nobody has the terminal open any more
            return False
        said += part.decode()
        return bool(part)

    try:
        while "Ctrl-C ends" not in said and read():
            pass
        (address,) = re.findall(r"http://\S+", said)
        assert status(address) == 200
        os.write(ours, b"\x03")
        while read():
            pass
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert said.rstrip().endswith("stopped")
    assert "Traceback" not in said
