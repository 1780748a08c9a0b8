"""The part of CuPy that the project uses. ``install`` puts it in the place of ``cupy``."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

__all__ = ["Array", "Device", "Event", "RawKernel", "Stream", "install", "stream_at"]

_KEPT: list[Any] = []
"""Memory that work which was put off still points to."""


class Event:
    """A place in a stream's queue."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._place = stream, stream.queued

    def synchronize(self) -> None:
        self._stream.run_until(self._place)


class Stream:
    """Work that is put off until somebody waits for it."""

    current: Stream
    _all: dict[int, Stream] = {}  # noqa: RUF012 - the simulation's one registry

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.non_blocking = non_blocking
        self.ptr = 0 if null else 1000 + len(Stream._all)
        Stream._all[self.ptr] = self
        self.queued = self._done = 0
        self._work: list[Callable[[], None]] = []
        self._before: list[Stream] = []

    def enqueue(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        self.queued += 1

    def run_until(self, place: int) -> None:
        while self._done < place:
            work = self._work.pop(0)
            self._done += 1
            work()

    def synchronize(self) -> None:
        self.run_until(self.queued)

    def record(self, event: Event | None = None) -> Event:
        assert event is None
        return Event(self)

    def wait_event(self, event: Event) -> None:
        self.enqueue(event.synchronize)

    def __enter__(self) -> Stream:
        self._before.append(Stream.current)
        Stream.current = self
        return self

    def __exit__(self, *error: object) -> None:
        Stream.current = self._before.pop()


Stream.current = Stream(null=True)


def stream_at(ptr: int) -> Stream:
    """The stream whose handle this is."""
    return Stream._all[ptr]


class Device:
    """A GPU by its number; remembers which is current."""

    current = 0

    def __init__(self, device: int = 0) -> None:
        self.id = device
        self._before: list[int] = []

    def use(self) -> None:
        Device.current = self.id

    def __enter__(self) -> Device:
        self._before.append(Device.current)
        Device.current = self.id
        return self

    def __exit__(self, *error: object) -> None:
        Device.current = self._before.pop()


class Array:
    """Device memory: a NumPy array that is read and written by work on streams."""

    def __init__(self, values: np.ndarray, device: int | None = None) -> None:
        self.values = values
        self.device = Device.current if device is None else device
        _KEPT.append(values)

    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.values.dtype)
    data = property(lambda self: types.SimpleNamespace(ptr=self.values.ctypes.data))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: Any) -> Array:
        return Array(self.values[key], self.device)

    def get(self) -> np.ndarray:
        Stream.current.synchronize()
        return self.values.copy()

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed: use `.get()`")

    def __dlpack__(self, stream: int | None = None) -> Array:
        """Array itself; whoever takes it must have waited, or passed the stream that shall wait."""
        if stream is not None:
            stream_at(stream).wait_event(Stream.current.record())
        return self


def empty(shape: Sequence[int], dtype: Any = np.float64) -> Array:
    values = np.empty(shape, dtype)
    values.view(np.uint8).fill(0xA5)
    return Array(values)


def asarray(values: Any, dtype: Any = None) -> Array:
    if isinstance(values, Array):
        if dtype is None or values.dtype == dtype:
            return values
        result = empty(values.shape, dtype)
        Stream.current.enqueue(lambda: np.copyto(result.values, values.values, casting="unsafe"))
        return result
    staged = np.array(values, dtype=dtype)  # CuPy stages pageable memory; the copy to the device is what is put off
    result = empty(staged.shape, staged.dtype)
    Stream.current.enqueue(lambda: np.copyto(result.values, staged))
    return result


def ascontiguousarray(values: Any) -> Array:
    array = asarray(values)
    if array.values.flags.c_contiguous:
        return array
    return concatenate([array])


def concatenate(arrays: Sequence[Array]) -> Array:
    first = arrays[0]
    result = empty((sum(len(a) for a in arrays), *first.shape[1:]), first.dtype)
    Stream.current.enqueue(lambda: np.copyto(result.values, np.concatenate([a.values for a in arrays])))
    return result


def from_dlpack(tensor: Any) -> Array:
    array: Array = tensor.__dlpack__(stream=Stream.current.ptr)
    return array


_PRELUDE = """
#define __device__ static
#define __forceinline__ inline
#define __global__ static
typedef struct { unsigned x; } place;
static place gridDim, blockDim, blockIdx, threadIdx;
"""


class RawKernel:
    """A CUDA kernel whose source is compiled as C and run thread after thread."""

    def __init__(self, source: str, name: str) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler (cc) to run the CUDA source with")
        found = re.search(rf"__global__ void {name}\((.*?)\)", source, re.DOTALL)
        assert found, f"no kernel {name}"
        declared = [" ".join(part.split()) for part in found[1].split(",")]
        self._types = [part.rpartition(" ")[0] + ("*" if "*" in part else "") for part in declared]
        names = [re.split(r"[ *]", part)[-1] for part in declared]
        launch = f"""
void launch(int blocks, int threads, {", ".join(declared)}) {{
    gridDim.x = blocks; blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x)
            {name}({", ".join(names)});
}}"""
        folder = Path(tempfile.mkdtemp())
        try:
            (folder / "kernel.c").write_text(_PRELUDE + source + launch, encoding="utf-8")
            command = [compiler, "-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
            command += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "kernel.c", "-o", "kernel.so"]
            subprocess.run(command, cwd=folder, check=True)
            self._launch = ctypes.CDLL(str(folder / "kernel.so")).launch
        finally:
            shutil.rmtree(folder)

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Any]) -> None:
        assert len(grid) == len(block) == 1
        assert 1 <= grid[0] < 2**31
        assert 1 <= block[0] <= 1024
        passed = [self._argument(*pair) for pair in zip(self._types, arguments, strict=True)]
        kept = list(arguments)

        def work() -> None:
            self._launch(grid[0], block[0], *passed)
            kept.clear()

        Stream.current.enqueue(work)

    @staticmethod
    def _argument(declared: str, value: Any) -> Any:
        sizes: dict[str, Any] = {"int": np.int32, "long long": np.int64}
        if declared.endswith("*"):
            if isinstance(value, Array):
                size = {"unsigned short": 2, "long long": 8}[declared.replace("const ", "").rstrip("* ")]
                assert value.dtype.itemsize == size, f"{declared} is given {value.dtype}"
                assert value.values.flags.c_contiguous
                return ctypes.c_void_p(value.data.ptr)
            assert type(value) is np.uintp, "a null pointer is a numpy.uintp"
            return ctypes.c_void_p(int(value))
        assert type(value) is sizes[declared], f"{declared} is given {type(value)}"
        return (ctypes.c_int if declared == "int" else ctypes.c_longlong)(int(value))


def install(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Put the simulation in the place of ``cupy``, with nothing put off and GPU 0 current."""
    module = types.ModuleType("cupy")
    cuda = types.ModuleType("cupy.cuda")
    for name in ("empty", "asarray", "ascontiguousarray", "concatenate", "from_dlpack", "RawKernel"):
        setattr(module, name, globals()[name])
    module.ndarray = Array  # type: ignore[attr-defined]
    cuda.Device, cuda.Stream, cuda.Event = Device, Stream, Event  # type: ignore[attr-defined]
    cuda.get_current_stream = lambda: Stream.current  # type: ignore[attr-defined]
    module.cuda = cuda  # type: ignore[attr-defined]
    monkeypatch.setattr(Device, "current", 0)
    monkeypatch.setattr(Stream, "current", Stream(null=True))
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    return module
