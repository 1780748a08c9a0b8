"""Nothing is reported to anybody: ONNX Runtime's telemetry is off before it begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
from staindiffuser.triton_models.engine.engine_onnxruntime import load
load(Path(sys.argv[1]), threads=1)
"""


def test_no_identifier_of_this_machine_is_kept(tiny_graphs: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    # CI's own variables would turn it off as well.
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")}
    command = [sys.executable, "-c", PROGRAM, str(tiny_graphs / "cells_cd3.onnx")]
    subprocess.run(command, env={**kept, "HOME": str(home)}, check=True, timeout=120)
    assert list(home.rglob("*")) == []
