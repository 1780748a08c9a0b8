"""Where Triton is: inside the ``nvidia-pytriton`` wheel, or where ``STAINDIFFUSER_TRITON`` says, as in its container.

The wheel holds tritonserver, the Python backend and one stub per Python version, at paths where tritonserver does not
look. A backend directory of links brings them together; nothing is copied and the wheel is left unchanged.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from staindiffuser.serving.errors import ServerMissingError

__all__ = ["TRITON_ROOT", "TritonRuntime", "find_runtime"]

TRITON_ROOT = "STAINDIFFUSER_TRITON"
"""Environment variable: the folder of another Triton, such as the container's ``/opt/tritonserver``."""

_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "2",
}
"""Settings of glibc's allocator (ours). By default it gives tensors of a megabyte back to the kernel after each
request, and gets them again page by page: a third of what the server itself costs. Two arenas bound what is kept."""

_INSTALL = (
    "install it with: pip install 'staindiffuser[serve]'"
    if sys.version_info < (3, 13)
    # The wheel's pin of numpy<2 has no wheels for this Python; only its files are used.
    else "install it with: pip install --no-deps nvidia-pytriton==0.7.0"
)


@dataclass(frozen=True, kw_only=True)
class TritonRuntime:
    """Locations of one tritonserver's files."""

    server: Path
    python_backend: Path
    stub: Path
    """Executable of the Python backend's processes, built for this interpreter's version."""
    libraries: Path
    backends: tuple[Path, ...] = ()
    """Folders of further backends."""

    def prepare_backends(self, folder: Path) -> Path:
        """Make a backend directory of links in ``folder``; returns ``folder``."""
        python = folder / "python"
        python.mkdir(parents=True)
        for source in {*self.python_backend.iterdir(), self.stub}:
            (python / source.name).symlink_to(source)
        for backend in self.backends:
            (folder / backend.name).symlink_to(backend)
        return folder

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The environment that tritonserver and its stubs run in."""
        environment = dict(base)
        libraries = [str(self.libraries), base.get("LD_LIBRARY_PATH", ""), sysconfig.get_config_var("LIBDIR") or ""]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in libraries if path)
        # A stub finds its packages through the first interpreter on the path.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)])
        environment.pop("PYTHONHOME", None)
        for name, value in _MALLOC.items():
            environment.setdefault(name, value)
        return environment


def find_runtime() -> TritonRuntime:
    """Locate Triton's files; those of the wheel without importing it.

    Raises:
        ServerMissingError: Triton is missing or has no stub for this Python.
    """
    root = os.environ.get(TRITON_ROOT)
    return _installed(Path(root)) if root else _in_wheel()


def _installed(root: Path) -> TritonRuntime:
    """A Triton as its container has it. Its stub is built for one version of Python, which must be this one's."""
    python = root / "backends" / "python"
    runtime = TritonRuntime(
        server=root / "bin" / "tritonserver",
        python_backend=python,
        stub=python / "triton_python_backend_stub",
        libraries=root / "lib",
        backends=tuple(path for path in (root / "backends" / "tensorrt",) if path.is_dir()),
    )
    for path in (runtime.server, runtime.stub, runtime.libraries):
        if not path.exists():
            raise ServerMissingError(f"{path} is missing: {TRITON_ROOT} must name Triton's folder")
    return runtime


def _in_wheel() -> TritonRuntime:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerMissingError(f"no Triton server: the package nvidia-pytriton is not installed; {_INSTALL}")
    package = Path(spec.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    runtime = TritonRuntime(
        server=package / "tritonserver" / "bin" / "tritonserver",
        python_backend=package / "tritonserver" / "backends" / "python",
        stub=package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub",
        libraries=package.parent / "nvidia_pytriton.libs",
    )
    if not runtime.stub.is_file():
        raise ServerMissingError(f"nvidia-pytriton has no Python backend for Python {version}: use Python 3.11 to 3.13")
    for path in (runtime.server, runtime.python_backend, runtime.libraries):
        if not path.exists():
            raise ServerMissingError(f"{path} is missing from nvidia-pytriton: {_INSTALL}")
    return runtime
