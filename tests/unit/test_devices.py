"""Which targets this machine can use, and what is said of the others."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pynvml
import pytest

from staindiffuser.export import builders
from staindiffuser.export.builders import devices
from staindiffuser.export.errors import BuilderMissingError
from staindiffuser.export.repository import build
from tests.synthetic_graphs import write_graphs

UUIDS = ("GPU-1e9f", "GPU-77ab")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML with an L4 and an H100, as far as it is asked."""

    def by_index(index: int) -> int:
        if index >= len(UUIDS):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def by_uuid(uuid: str) -> int:
        if uuid not in UUIDS:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return UUIDS.index(uuid)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", by_index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", by_uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda gpu: ("NVIDIA L4", "NVIDIA H100")[gpu])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda gpu: ((8, 9), (9, 0))[gpu])


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "NVIDIA L4"),
        ("1,0", "NVIDIA H100"),
        ("GPU-77ab", "NVIDIA H100"),
        ("", None),
        ("-1", None),
        ("7", None),
        ("GPU-0000", None),
    ],
)
def test_the_first_gpu_that_cuda_programs_see(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, name: str | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = devices.find_gpu()
    assert (gpu and gpu.name) == name


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_has_name_and_compute_capability() -> None:
    gpu = devices.find_gpu(1)
    assert gpu is not None
    assert (gpu.kind, gpu.name, gpu.compute_capability) == ("cuda", "NVIDIA H100", "9.0")
    assert devices.find_gpu(2) is None


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert devices.find_gpu() is None


def test_without_nvidia_ml_py_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
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
