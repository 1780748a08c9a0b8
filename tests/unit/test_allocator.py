"""Threads share glibc's arenas."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, sys, threading
from staindiffuser.allocator import use_few_arenas
if "few" in sys.argv:
    use_few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes, libc.fclose.argtypes = (ctypes.c_int, ctypes.c_void_p), (ctypes.c_void_p,)
ready = threading.Barrier(8)
def work():
    ready.wait()
    libc.malloc(100_000)
    ready.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
@pytest.mark.parametrize(("asked", "few"), [("few", True), ("", False)])
def test_threads_share_two_arenas(tmp_path: Path, asked: str, few: bool) -> None:
    path = tmp_path / "arenas.xml"
    variables = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    subprocess.run([sys.executable, "-c", PROGRAM, path, asked], check=True, env=variables)
    arenas = path.read_text(encoding="ascii").count("<heap nr=")
    assert (arenas <= 2) == few
