"""TensorRT whose plans are run by ONNX Runtime, on the simulated GPU's streams.

It has no name that the real bindings lack (``api.json``), and refuses arguments that do not fit their signatures.
A weight-stripped plan gives nonsense until it was refitted, and a plan remembers how it was built.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import json
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.simulated_gpu import api
from tests.simulated_gpu.cupy import stream_at

__all__ = ["header", "install"]

_MARK = b"simulated plan\n"


def header(plan: bytes) -> dict[str, Any]:
    """How a plan was built: ``version``, ``flags``, ``profiles``, ``verbosity``, ``workspace``, ``capabilities``."""
    found: dict[str, Any] = json.loads(plan[len(_MARK) :].partition(b"\n")[0])
    return found


def install(monkeypatch: pytest.MonkeyPatch, line: str = "11.4") -> types.ModuleType:
    """Put the simulation of a version of TensorRT (a key of ``api.json``) in the place of ``tensorrt``."""
    known = json.loads(api.FACTS.read_text(encoding="utf-8"))[line]
    module = types.ModuleType("tensorrt")
    module.__version__ = known["version"]  # type: ignore[attr-defined]
    names: api.Facts = known["names"]
    # The same flag has another number in each version.
    numbers = {"STRONGLY_TYPED": 1 if line == "10.16" else 0}
    for name in (
        "BuilderFlag",
        "MemoryPoolType",
        "NetworkDefinitionCreationFlag",
        "ProfilingVerbosity",
        "TensorIOMode",
    ):
        members = [key.partition(".")[2] for key, value in names.items() if key.startswith(f"{name}.")]
        pairs = [(member, numbers.get(member, index)) for index, member in enumerate(members)]
        setattr(module, name, enum.IntEnum(name, pairs))
    for made in (_logging, _building, _running):
        for cls in made(module):
            _check_class(cls, names, module)
            setattr(module, cls.__name__, cls)
    module.nptype = lambda dtype: np.dtype(dtype).type  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def _check_class(cls: type, names: api.Facts, module: types.ModuleType) -> None:
    """Every public name must be real; every method checks its arguments by the real signatures."""
    for name, member in list(vars(cls).items()):
        if (name.startswith("_") and name != "__init__") or isinstance(member, type):
            continue
        key = f"{cls.__name__}.{name}"
        if name == "__init__" and key not in names:
            continue  # not for users: instances come from other objects
        if isinstance(member, enum.Enum) or not (callable(member) or isinstance(member, property)):
            continue
        assert key in names, f"{key} is not in the real bindings: see tests/simulated_gpu/api.py"
        if callable(member):
            setattr(cls, name, _checked(member, key, names[key], module))
        else:
            assert names[key] == ["property"]


def _checked(
    method: Callable[..., Any], key: str, signatures: list[str], module: types.ModuleType
) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        refusals = [_refusal(signature, arguments, options, module) for signature in signatures]
        if all(refusals):
            raise TypeError(f"{key}: incompatible arguments {arguments} {options}: {refusals}")
        return method(self, *arguments, **options)

    return call


def _refusal(signature: str, arguments: tuple[Any, ...], options: dict[str, Any], module: types.ModuleType) -> str:
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    inside = re.sub(r"<[^>]*>", "None", inside)
    parameters, kinds = [], {}
    for part in inside.split(", ")[1:]:
        name, _, kind = part.partition(": ")
        kind, _, default = kind.partition(" = ")
        kinds[name] = kind
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default or inspect.Parameter.empty)
        )
    try:
        bound = inspect.Signature(parameters).bind(*arguments, **options)
    except TypeError as error:
        return str(error)
    wrong = [name for name, value in bound.arguments.items() if not _fits(kinds[name], value, module)]
    return f"{wrong} are not {[kinds[name] for name in wrong]}" if wrong else ""


def _fits(kind: str, value: Any, module: types.ModuleType) -> bool:
    simple: dict[str, Any] = {
        "typing.SupportsInt": (int, np.integer),
        "str": str,
        "bool": bool,
        "tuple": tuple,
        "list": list,
        "Dims": (tuple, list),
        "typing_extensions.Buffer": (bytes, bytearray, memoryview),
        "ILogger.Severity": enum.Enum,
    }
    expected = simple.get(kind) or getattr(module, kind, None)
    return expected is not None and isinstance(value, expected)


def _logging(trt: Any) -> list[type]:
    levels = enum.IntEnum("levels", ["INTERNAL_ERROR", "ERROR", "WARNING"])

    class ILogger:
        Severity = levels

        def __init__(self) -> None:
            pass

    class Logger(ILogger):
        WARNING, ERROR = levels.WARNING, levels.ERROR

        def __init__(self, min_severity: Any = levels.WARNING) -> None:
            pass

        def _log(self, severity: Any, msg: str) -> None:
            sys.stderr.write(f"{msg}\n")

    return [ILogger, Logger]


def _building(trt: Any) -> list[type]:
    class IHostMemory(bytes):
        pass

    class ITensor:
        def __init__(self, value: onnx.ValueInfoProto) -> None:
            self._value = value

        name = property(lambda self: self._value.name)
        shape = property(lambda self: (-1, *(d.dim_value for d in self._value.type.tensor_type.shape.dim[1:])))

    class INetworkDefinition:
        def __init__(self) -> None:
            self._model = onnx.ModelProto()

        num_inputs = property(lambda self: len(self._model.graph.input))

        def get_input(self, index: int) -> Any:
            return ITensor(self._model.graph.input[index])

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._shapes[input] = [list(min), list(opt), list(max)]

    class ITimingCache:
        def __init__(self, known: bytes) -> None:
            self._known = known

        def serialize(self) -> Any:
            return IHostMemory(self._known + b"timed\n")

    class IBuilderConfig:
        def __init__(self) -> None:
            self._flags = {"TF32"}  # on by default
            self._profiles: list[Any] = []
            self._workspace, self._verbosity, self._capabilities = 0, "", list[str]()

        profiling_verbosity = property(
            lambda self: self._verbosity, lambda self, value: setattr(self, "_verbosity", value.name)
        )

        def set_flag(self, flag: Any) -> None:
            self._flags.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag.name)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._workspace = pool_size

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            return True

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile._shapes)
            return len(self._profiles) - 1

    class ParserError:
        def __init__(self, text: str) -> None:
            self._text = text

        def desc(self) -> str:
            return self._text

        def node(self) -> int:
            return 0

        def node_name(self) -> str:
            return ""

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._errors = network, list[str]()

        num_errors = property(lambda self: len(self._errors))

        def parse(self, model: bytes, path: Any = None) -> bool:
            try:
                self._network._model = onnx.load_from_string(model)
                onnx.checker.check_model(self._network._model)
            except Exception as error:  # whatever protobuf and the checker raise
                self._errors.append(str(error).splitlines()[0])
                return False
            return True

        def get_error(self, index: int) -> Any:
            return ParserError(self._errors[index])

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int = 0) -> Any:
            assert flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            return INetworkDefinition()

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            model = onnx.ModelProto()
            model.CopyFrom(network._model)
            if "STRIP_PLAN" in config._flags:
                for tensor in model.graph.initializer:
                    if len(tensor.dims) == 4:
                        array = numpy_helper.to_array(tensor)
                        tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, np.nan), tensor.name))
            built = {
                "version": trt.__version__,
                "flags": sorted(config._flags),
                "profiles": config._profiles,
                "verbosity": config._verbosity,
                "workspace": config._workspace,
            }
            return IHostMemory(_MARK + json.dumps(built).encode() + b"\n" + model.SerializeToString())

    return [
        IHostMemory,
        ITensor,
        INetworkDefinition,
        IOptimizationProfile,
        ITimingCache,
        IBuilderConfig,
        ParserError,
        OnnxParser,
        Builder,
    ]


def _running(trt: Any) -> list[type]:
    class IExecutionContext:
        def __init__(self, engine: Any) -> None:
            self._engine, self._profile = engine, 0
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            self._profile = profile_index
            return True

        def set_input_shape(self, name: str, shape: Any) -> bool:
            smallest, _, largest = self._engine.get_tensor_profile_shape(name, self._profile)
            self._shapes[name] = tuple(shape)
            return all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))

        def get_tensor_shape(self, name: str) -> Any:
            batch = next(iter(self._shapes.values()))[0]
            return (batch, *(d.dim_value for d in self._engine._value(name).type.tensor_type.shape.dim[1:]))

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return name in self._engine._names

        def execute_async_v3(self, stream_handle: int) -> bool:
            session, names = self._engine._session(), self._engine._names
            arrays = {name: self._array(name) for name in names}  # the addresses of now, the values of then

            def work() -> None:
                inputs = [value.name for value in session.get_inputs()]
                outputs = [name for name in names if name not in inputs]
                results = session.run(outputs, {name: arrays[name] for name in inputs})
                for name, result in zip(outputs, results, strict=True):
                    arrays[name][...] = result

            stream_at(stream_handle).enqueue(work)
            return True

        def _array(self, name: str) -> np.ndarray:
            shape = self._shapes.get(name) or self.get_tensor_shape(name)
            dtype = np.dtype(self._engine.get_tensor_dtype(name))
            size = int(np.prod(shape)) * dtype.itemsize
            memory = (ctypes.c_uint8 * size).from_address(self._addresses[name])
            return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    class ICudaEngine:
        def __init__(self, plan: bytes) -> None:
            self._model = onnx.load_from_string(plan[len(_MARK) :].partition(b"\n")[2])
            self._profiles = header(plan)["profiles"]
            self._names = [v.name for v in (*self._model.graph.input, *self._model.graph.output)]
            self._ready: Any = None

        num_io_tensors = property(lambda self: len(self._names))
        num_optimization_profiles = property(lambda self: len(self._profiles))
        device_memory_size_v2 = property(lambda self: 1 << 20)

        def get_tensor_name(self, index: int) -> str:
            name: str = self._names[index]
            return name

        def get_tensor_mode(self, name: str) -> Any:
            inputs = [value.name for value in self._model.graph.input]
            return trt.TensorIOMode.INPUT if name in inputs else None

        def get_tensor_dtype(self, name: str) -> Any:
            return onnx.helper.tensor_dtype_to_np_dtype(self._value(name).type.tensor_type.elem_type)

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
            return self._profiles[profile_index][name]

        def create_execution_context(self) -> Any:
            return IExecutionContext(self)

        def _value(self, name: str) -> Any:
            return next(v for v in (*self._model.graph.input, *self._model.graph.output) if v.name == name)

        def _session(self) -> Any:
            if self._ready is None:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads, options.log_severity_level = 1, 3
                model = self._model.SerializeToString()
                self._ready = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            return self._ready

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._host_code = False

        engine_host_code_allowed = property(
            lambda self: self._host_code, lambda self, value: setattr(self, "_host_code", value)
        )

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            foreign = header(serialized_engine)["version"] != trt.__version__
            return None if foreign else ICudaEngine(serialized_engine)

    class Refitter:
        def __init__(self, engine: Any, logger: Any) -> None:
            self._engine, self._weights = engine, dict[str, Any]()

        def refit_cuda_engine(self) -> bool:
            for tensor in self._engine._model.graph.initializer:
                if tensor.name in self._weights:
                    tensor.CopyFrom(self._weights[tensor.name])
            self._engine._ready = None
            return True

    class OnnxParserRefitter:
        def __init__(self, refitter: Any, logger: Any) -> None:
            self._refitter = refitter

        def refit_from_file(self, model: str) -> bool:
            found = {tensor.name: tensor for tensor in onnx.load(model).graph.initializer}
            self._refitter._weights = found  # only named: refit_cuda_engine moves them
            wanted = self._refitter._engine._model.graph.initializer
            return all(t.name in found and list(found[t.name].dims) == list(t.dims) for t in wanted)

    return [IExecutionContext, ICudaEngine, Runtime, Refitter, OnnxParserRefitter]
