"""Which targets this machine can use, and what is said of the others."""

from __future__ import annotations

import ctypes
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from staindiffuser.export import builders
from staindiffuser.export.builders import devices
from staindiffuser.export.errors import BuilderMissingError
from staindiffuser.export.repository import build
from tests.synthetic_graphs import write_graphs


class Driver:
    """libcuda, as far as it is asked."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's names
        return self.status

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA L4"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = {75: 8, 76: 9}[attribute]
        return 0


def test_gpu_is_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    gpu = devices.find_gpu()
    assert gpu is not None
    assert (gpu.kind, gpu.name, gpu.compute_capability) == ("cuda", "NVIDIA L4", "8.9")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(status=100))
    assert devices.find_gpu() is None


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert devices.find_gpu() is None


@pytest.mark.parametrize("left_behind", [False, True], ids=["absent", "only stubs"])
def test_tensorrt_not_installed_says_how_and_which_targets_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_behind: bool
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt") if left_behind else None)
    write_graphs(tmp_path / "graphs", tile=32)
    with pytest.raises(BuilderMissingError) as error:
        build(tmp_path / "graphs", tmp_path / "repository", target="tensorrt")
    message = str(error.value)
    assert error.value.exit_code == 6
    assert "\n" not in message
    assert "TensorRT is not installed: pip install" in message
    assert "targets that work here: onnxruntime" in message
    assert not (tmp_path / "repository").exists()


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.SimpleNamespace(Builder=object, __version__="10.9.0", __name__="tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(BuilderMissingError, match=r"TensorRT 10\.9\.0 is too old"):
        builders.get("tensorrt").version()
