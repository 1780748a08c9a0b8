"""Names, signatures and enums of TensorRT that the project uses, as the real bindings have them.

``api.json`` holds them per version: facts read from the bindings' wheels, which need no GPU and no TensorRT to be
imported (three empty libraries stand in for it). A name that is not in :data:`USED` does not exist in the simulation:
add it there and run ``python -m tests.simulated_gpu.api``, which downloads the wheels and writes the file anew.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["FACTS", "USED", "WHEELS", "Facts", "read_bindings", "read_wheel"]

Facts = dict[str, list[str]]
"""Signatures of each ``Class.member``: one an overload; ``property``; or ``value`` for a member of an enum."""

FACTS = Path(__file__).with_name("api.json")
WHEELS = {"10.16": "tensorrt-cu12-bindings==10.16.*", "11.4": "tensorrt-cu13-bindings==11.4.*"}
USED = {
    "": "nptype",
    "Builder": "__init__ build_serialized_network create_builder_config create_network create_optimization_profile",
    "BuilderFlag": "REFIT_IDENTICAL STRIP_PLAN TF32 VERSION_COMPATIBLE",
    "IBuilderConfig": "add_optimization_profile clear_flag create_timing_cache profiling_verbosity set_flag "
    "set_memory_pool_limit set_timing_cache",
    "ICudaEngine": "create_execution_context device_memory_size_v2 get_tensor_dtype get_tensor_mode get_tensor_name "
    "get_tensor_profile_shape num_io_tensors num_optimization_profiles",
    "IExecutionContext": "execute_async_v3 get_tensor_shape set_input_shape set_optimization_profile_async "
    "set_tensor_address",
    "ILogger": "__init__ log",
    "INetworkDefinition": "get_input num_inputs",
    "IOptimizationProfile": "set_shape",
    "ITensor": "name shape",
    "ITimingCache": "serialize",
    "Logger": "__init__",
    "MemoryPoolType": "WORKSPACE",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "OnnxParser": "__init__ get_error num_errors parse",
    "OnnxParserRefitter": "__init__ refit_from_file",
    "ParserError": "desc node node_name",
    "ProfilingVerbosity": "DETAILED LAYER_NAMES_ONLY NONE",
    "Refitter": "__init__ refit_cuda_engine",
    "Runtime": "__init__ deserialize_cuda_engine engine_host_code_allowed",
    "Severity": "ERROR INTERNAL_ERROR WARNING",
    "TensorIOMode": "INPUT",
}
"""Members by class; the first are the module's own."""
_NESTED = {"Severity": "ILogger.Severity"}


def read_bindings(module: Any) -> Facts:
    """What a bindings module says of the names in :data:`USED`.

    Raises:
        AttributeError: it lacks one.
    """
    facts: Facts = {}
    for name, members in USED.items():
        owner = module
        for part in _NESTED.get(name, name).split("."):
            owner = getattr(owner, part) if part else owner
        for member in members.split():
            facts[f"{name}.{member}".lstrip(".")] = _describe(owner, member)
    return facts


def _describe(owner: Any, member: str) -> list[str]:
    if member in getattr(owner, "__members__", {}):
        return ["value"]
    found = getattr(owner, member)
    if isinstance(found, property):
        return ["property"]
    # pybind11 writes the signature of each overload into the docstring.
    lines = (found.__doc__ or "").splitlines()
    signatures = [
        re.sub(r"^\d+\. ", "", line) for line in lines if re.match(rf"^(\d+\. )?{member}\(.*\)( ->.*)?$", line)
    ]
    plain = [re.sub(r"\btensorrt(_rtx)?_bindings\.tensorrt(_rtx)?\.", "", line) for line in signatures]
    # Where a type comes from depends on the Python that the bindings are for.
    plain = [line.replace("collections.abc.Buffer", "typing_extensions.Buffer") for line in plain]
    return [line for line in plain if "*args" not in line] or ["function"]


def read_wheel(requirement: str) -> tuple[str, Facts]:
    """Download a wheel of bindings and read it in a process of its own; its version and its facts."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, requirement]
        subprocess.run(pip, check=True)
        bindings = Path(folder) / "tensorrt_bindings"
        needed = subprocess.run(
            ["readelf", "-d", str(bindings / "tensorrt.so")], capture_output=True, text=True, check=True
        ).stdout
        missing = subprocess.run(
            ["nm", "-D", "--undefined-only", str(bindings / "tensorrt.so")], capture_output=True, text=True, check=True
        ).stdout
        functions = re.findall(r" U ((?:create|get|init)\w+)$", missing, re.MULTILINE)
        source = Path(folder) / "empty.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions), encoding="ascii")
        for library in re.findall(r"\[(libnv\w+\.so\.\d+)\]", needed):
            subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(bindings / library)], check=True)
        program = f"import sys; sys.path.insert(0, {folder!r}); from tests.simulated_gpu import api; api._print()"
        read = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        version, facts = json.loads(read.stdout)
        return version, facts


def _print() -> None:
    module = importlib.import_module("tensorrt_bindings")
    json.dump([module.__version__, read_bindings(module)], sys.stdout)


def main() -> None:
    """Write ``api.json`` from the wheels."""
    read = {line: read_wheel(requirement) for line, requirement in WHEELS.items()}
    facts = {line: {"version": version, "names": names} for line, (version, names) in read.items()}
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
