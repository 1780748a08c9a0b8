"""What this machine can run: one finding per capability, each with what to do if it is missing."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from staindiffuser.errors import DependencyError, InputError, StainDiffuserError

__all__ = ["Finding", "Status", "examine"]

Status = Literal["ok", "warning", "absent", "problem"]
"""``absent``: a capability that this machine does without. ``problem``: something that was asked for does not work."""

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
SERVER_MEMORY_GIB = 4.0
"""Of the demonstration model's server on a CPU, rounded up (measured: 3.1 GB)."""
CERTIFICATE_WARNING_DAYS = 30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    detail: str
    exit_code: int = 0
    """What the command would end with because of it; 0 unless it is a problem."""


def examine(
    *, repositories: Sequence[Path] = (), ports: Sequence[tuple[int, str]] = (), certificates: Sequence[Path] = ()
) -> Iterator[Finding]:
    """Examine this machine.

    Args:
        repositories: model repositories to verify, which are to be served together.
        ports: ports that a server is to use, with their command-line options.
        certificates: PEM files whose dates are checked.

    Yields:
        Findings as they are made; verifying a repository takes longest.
    """
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("python", _python),
        ("processor", _processor),
        ("memory", _memory),
        ("shared memory", partial(_shared_memory, repositories)),
        ("GPU", _gpu),
        ("targets", _targets),
        ("Triton", _triton),
        ("demonstration model", _demonstration),
        ("cache", _cache),
    ]
    checks += [(f"port {port}", partial(_port, port, option)) for port, option in ports]
    checks += [("repository", partial(_repository, repository)) for repository in repositories]
    checks += [(f"certificate {path}", partial(_certificate, path)) for path in certificates]
    for name, check in checks:
        try:
            yield from check()
        except StainDiffuserError as error:
            yield Finding(name=name, status="problem", detail=str(error), exit_code=error.exit_code)
        except ImportError as error:
            package = error.name or str(error)
            yield Finding(name=name, status="absent", detail=f"unknown: the package {package} is not installed")


def _python() -> Iterator[Finding]:
    packages = []
    for package in ("numpy", "tritonclient", "onnxruntime", "torch"):
        try:
            packages.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            packages.append(f"no {package}")
    version = platform.python_version()
    yield Finding(name="python", status="ok", detail=f"{version} on {platform.platform()}; {', '.join(packages)}")


def _processor() -> Iterator[Finding]:
    from staindiffuser.export.builders.devices import processor
    from staindiffuser.triton_models.shared.cpus import available_cpus

    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            flags = set(line.split())
            break
    found = [flag for flag in CPU_FLAGS if flag in flags]
    yield Finding(
        name="processor",
        status="ok" if "avx2" in found else "warning",
        detail=f"{processor().name}; {available_cpus()} usable cores; {', '.join(found) or 'no AVX2: slow'}",
    )


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    available = memory.available / 2**30
    detail = f"{available:.1f} of {memory.total / 2**30:.1f} GiB available"
    if available < SERVER_MEMORY_GIB:
        needed = f"the demonstration model's server needs {SERVER_MEMORY_GIB:g} GiB"
        yield Finding(name="memory", status="warning", detail=f"{detail}; {needed}")
    else:
        yield Finding(name="memory", status="ok", detail=detail)


def _shared_memory(repositories: Sequence[Path]) -> Iterator[Finding]:
    from staindiffuser.export.manifest import Manifest
    from staindiffuser.serving.preflight import SHARED_MEMORY, require_shared_memory

    if not SHARED_MEMORY.is_dir():
        raise DependencyError(f"{SHARED_MEMORY} is missing: Triton's Python backend needs it")
    if repositories:
        require_shared_memory([Manifest.load(repository) for repository in repositories])
    free = shutil.disk_usage(SHARED_MEMORY).free
    enough = f"; enough for the {'repository' if len(repositories) == 1 else 'repositories'}" if repositories else ""
    yield Finding(name="shared memory", status="ok", detail=f"{SHARED_MEMORY}: {free / 2**20:.0f} MiB free{enough}")


def _gpu() -> Iterator[Finding]:
    import pynvml

    from staindiffuser.export.builders.devices import find_gpu

    gpu = find_gpu()
    if gpu is None:
        yield Finding(name="GPU", status="absent", detail="no NVIDIA GPU, or no driver: CPU engines only")
        return
    pynvml.nvmlInit()
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    yield Finding(
        name="GPU", status="ok", detail=f"{gpu.name}, compute capability {gpu.compute_capability}, driver {driver}"
    )


def _targets() -> Iterator[Finding]:
    from staindiffuser.export import builders

    for target in builders.TARGETS:
        try:
            builder = builders.get(target)
            detail = f"{builder.version()} for {builder.device().name}"
        except DependencyError as error:
            reason = str(error).partition("; targets that work here")[0].removeprefix(f"target {target}: ")
            yield Finding(name=f"target {target}", status="absent", detail=reason)
        else:
            yield Finding(name=f"target {target}", status="ok", detail=detail)


def _triton() -> Iterator[Finding]:
    from staindiffuser.serving.runtime import find_runtime

    try:
        version = importlib.metadata.version("nvidia-pytriton")
        find_runtime()
    except (importlib.metadata.PackageNotFoundError, DependencyError) as error:
        detail = str(error) if isinstance(error, DependencyError) else "nvidia-pytriton is not installed"
        yield Finding(name="Triton", status="absent", detail=f"{detail}; a remote server can still be used (--server)")
        return
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    yield Finding(name="Triton", status="ok", detail=f"embedded server of nvidia-pytriton {version}, Python {python}")


def _demonstration() -> Iterator[Finding]:
    from staindiffuser.export.description import GraphSet
    from staindiffuser.serving.demo import demo_graphs

    graphs = GraphSet.load(demo_graphs())
    stains = ", ".join(stain.label for stain in graphs.stains)
    detail = f"{graphs.name} {graphs.model_version[:12]}: {stains}, tiles of {graphs.tile} px, {graphs.steps} step(s)"
    yield Finding(name="demonstration model", status="ok", detail=detail)


def _cache() -> Iterator[Finding]:
    import tempfile

    from staindiffuser.files import cache_folder

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        detail = f"{folder} cannot be written ({error.strerror}): set STAINDIFFUSER_CACHE to a folder that can"
        yield Finding(name="cache", status="problem", detail=detail, exit_code=2)
        return
    free = shutil.disk_usage(folder).free / 2**30
    yield Finding(name="cache", status="ok", detail=f"{folder}, {free:.1f} GiB free")


def _port(port: int, option: str) -> Iterator[Finding]:
    from staindiffuser.serving.errors import PortInUseError
    from staindiffuser.serving.ports import PortClaim

    try:
        with PortClaim(port, option=option):
            yield Finding(name=f"port {port}", status="ok", detail=f"free ({option})")
    except PortInUseError as error:  # perhaps by the server that is to be there
        yield Finding(name=f"port {port}", status="warning", detail=str(error))


def _repository(repository: Path) -> Iterator[Finding]:
    from staindiffuser.export.manifest import verify

    manifest = verify(repository)
    detail = (
        f"{repository}: intact, model {manifest.model_name} {manifest.model_version[:12]}, target {manifest.target}, "
        f"flavour {manifest.flavour}, batches up to {manifest.max_batch}"
    )
    yield Finding(name="repository", status="ok", detail=detail)


def _certificate(path: Path) -> Iterator[Finding]:
    from cryptography import x509

    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable PEM certificate: {error}") from error
    now = datetime.datetime.now(datetime.UTC)
    for certificate in certificates:
        name = f"certificate {path}"
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        days = (ends - now).days
        subject = certificate.subject.rfc4514_string() or "no subject"
        if now < begins:
            detail = f"{subject}: not valid before {begins:%Y-%m-%d}: check this machine's clock"
            yield Finding(name=name, status="problem", detail=detail, exit_code=InputError.exit_code)
        elif now > ends:
            detail = f"{subject}: expired on {ends:%Y-%m-%d}: renew it"
            yield Finding(name=name, status="problem", detail=detail, exit_code=InputError.exit_code)
        elif days < CERTIFICATE_WARNING_DAYS:
            yield Finding(name=name, status="warning", detail=f"{subject}: expires in {days} days, on {ends:%Y-%m-%d}")
        else:
            yield Finding(name=name, status="ok", detail=f"{subject}: valid until {ends:%Y-%m-%d}")
