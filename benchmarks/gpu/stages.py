"""Step ``stages``: how long each stage takes, and what share of the card's peak it reaches.

The stages are the encoder, an image branch at k = 1, 2, 4 and a cell branch of a network with random weights. Each is
run eagerly, as a CUDA graph and compiled, in both memory layouts. Times come from CUDA events and operation counts from
torch; the peak is the fastest matrix product measured on the same card. Captured and compiled stages are compared with
eager ones on new inputs.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from staindiffuser.benchmarks.gpu.options import Check, GpuOptions, StepResult, grey_levels
from staindiffuser.export.modules import BranchEngine, EncoderEngine
from staindiffuser.export.parity import MAX_LEVELS, MAX_SHARE_OVER_ONE
from staindiffuser.training.config import PRESETS, StainConfig
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.infer import sampler_noise, stain_tiles
from staindiffuser.training.model.network import DualDiffusion

__all__ = ["Bench", "Measurement", "random_network", "run", "stage_inputs"]

STEPS = (1, 2, 4)
_WARM_UPS = 3


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One stage at one batch size, run in one way."""

    stage: str
    batch: int
    how: str
    milliseconds: float
    """Median of one run of the whole batch."""
    tflops: float
    """Achieved, 10¹² floating-point operations per second."""
    share_of_peak: float
    memory_mib: float
    """Device memory in use after the runs, including TensorRT's and CuPy's; 0 on a CPU."""
    apart: dict[str, float]
    """Difference from eager on new inputs, see :class:`Check`; empty for eager itself."""


class Bench:
    """Times stages on a device, and knows its peak.

    Args:
        options: device, tile and times.
        result: measurements are added to it.
    """

    def __init__(self, options: GpuOptions, result: StepResult) -> None:
        self.options, self.result = options, result
        self.device = torch.device(options.device)
        self.cuda = options.device == "cuda"
        # Half-precision convolutions on a CPU take minutes.
        self.trunk = torch.float16 if self.cuda else torch.float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        result.data["precision"] = str(self.trunk).removeprefix("torch.")
        self.peak = self._peak()
        result.data["peak_tflops"] = self.peak / 1e12
        self.measurements: list[dict[str, Any]] = result.data.setdefault("measurements", [])

    def measure(self, stage: str, batch: int, how: str, flops: float, prepare: Callable[[], Timed]) -> None:
        """Time what ``prepare`` returns, unless the time is up; an error is recorded."""
        self.result.attempt(f"{stage}, batch {batch}, {how}", self._measure, stage, batch, how, flops, prepare)

    def _measure(self, stage: str, batch: int, how: str, flops: float, prepare: Callable[[], Timed]) -> None:
        timed = prepare()
        milliseconds = self.milliseconds(timed.run)
        reached = flops * batch / milliseconds * 1e3
        memory = 0.0
        if self.cuda:
            free, total = torch.cuda.mem_get_info()
            memory = (total - free) / 2**20
        apart = timed.check() if timed.check else None
        self.measurements.append(
            dataclasses.asdict(
                Measurement(
                    stage=stage,
                    batch=batch,
                    how=how,
                    milliseconds=milliseconds,
                    tflops=reached / 1e12,
                    share_of_peak=reached / self.peak,
                    memory_mib=memory,
                    apart=apart.as_dict() if apart else {},
                )
            )
        )
        if apart and (apart.max_levels > MAX_LEVELS or apart.share_over_one > MAX_SHARE_OVER_ONE):
            raise ValueError(f"differs from eager by {apart.max_levels:.2f} levels ({apart.share_over_one:.2%} over 1)")

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Median time of one run; at least three runs, about ``seconds_each`` in all."""
        for _ in range(2):
            run()
        times: list[float] = []
        until = time.monotonic() + self.options.seconds_each
        while len(times) < 3 or (time.monotonic() < until and len(times) < 200):
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                run()
                times.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(times)

    def _peak(self) -> float:
        """Fastest matrix product, floating-point operations a second."""
        best = 0.0
        for size in (4096, 8192, 12288) if self.cuda else (512,):
            a, b = (torch.randn(size, size, device=self.device, dtype=self.trunk) for _ in range(2))
            milliseconds = self.milliseconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
            best = max(best, 2.0 * size**3 / milliseconds * 1e3)
        return best


@dataclass(frozen=True)
class Timed:
    """Something to time, and an optional check of its result."""

    run: Callable[[], object]
    check: Callable[[], Check] | None = None


def run(options: GpuOptions, result: StepResult) -> None:
    """Check parity, then measure: CUDA graphs, eager, compiled."""
    bench = Bench(options, result)
    network = random_network(options.preset).to(bench.device)
    result.data.update(preset=options.preset, tile=options.tile)
    layouts = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    stages = {name: _stages(network, bench.trunk, layout) for name, layout in layouts.items()}
    first = stages["contiguous"]
    flops = {name: _flops(module, _inputs(network, bench, name, 1, 0)) for name, module in first.items()}
    result.data["gflop_per_tile"] = {name: value / 1e9 for name, value in flops.items()}
    for layout, modules in stages.items():
        result.attempt(f"parity, {layout}", _parity, network, modules, bench, layout)
    ways: dict[str, Callable[[nn.Module, list[Tensor]], Callable[[list[Tensor]], Any]]] = {
        "graph": lambda module, inputs: Captured(module, inputs),
        "eager": lambda module, inputs: lambda given: module(*given),
        "compiled": lambda module, inputs: _compiled(module),
    }
    for way, make in ways.items():
        for batch in options.batches:
            # Compiling is slow, so only one batch size and one layout are compiled.
            if way == "compiled" and (not options.compiled or batch != options.batches[len(options.batches) // 2]):
                continue
            for layout, modules in stages.items():
                if way == "compiled" and layout == "contiguous":
                    continue
                for name, module in modules.items():
                    how = f"{way}, {layout}"
                    prepare = _preparation(network, bench, name, module, batch, make, compare=way != "eager")
                    bench.measure(name, batch, how, flops[name], prepare)
                    if bench.cuda:
                        torch.cuda.empty_cache()


def _preparation(
    network: DualDiffusion,
    bench: Bench,
    name: str,
    module: nn.Module,
    batch: int,
    make: Callable[[nn.Module, list[Tensor]], Callable[[list[Tensor]], Any]],
    *,
    compare: bool,
) -> Callable[[], Timed]:
    def prepare() -> Timed:
        inputs = _inputs(network, bench, name, batch, 0)
        with torch.inference_mode():
            made = make(module, inputs)

        def call(given: list[Tensor]) -> Any:
            with torch.inference_mode():
                return made(given)

        def check() -> Check:
            fresh = _inputs(network, bench, name, batch, 1)
            found, wanted = _tuple(call(fresh)), _tuple(_eager(module, fresh))
            checks = [grey_levels(f, w) for f, w in zip(found, wanted, strict=True)]
            return max(checks, key=lambda c: (c.max_levels, c.share_over_one))

        return Timed(lambda: call(inputs), check if compare else None)

    return prepare


def random_network(preset: str) -> DualDiffusion:
    """One stain, random weights whose gains are not zero, so that every layer matters; on the CPU."""
    torch.manual_seed(0)
    stain = StainConfig(name="cd3", label="CD3")
    network = DualDiffusion(replace(PRESETS[preset].model, stains=(stain,))).eval()
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return network.requires_grad_(False)


def _stages(network: DualDiffusion, trunk: torch.dtype, layout: torch.memory_format) -> dict[str, nn.Module]:
    (stain,) = network.config.stains
    device = next(network.parameters()).device
    cpu = network.cpu()  # folding builds its constants where the weights are
    stages: dict[str, nn.Module] = {"encoder": EncoderEngine(cpu, trunk)}
    for k in STEPS:
        stages[f"image k={k}"] = BranchEngine(cpu, "images", stain, START_SIGMAS[k], trunk)
    stages["cells"] = BranchEngine(cpu, "cells", stain, [cpu.config.sigma_max], trunk)
    network.to(device)
    placed = {name: module.eval().to(device) for name, module in stages.items()}
    for module in placed.values():
        for parameter in module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)
    return placed


def stage_inputs(network: DualDiffusion, stage: str, batch: int, tile: int, seed: int) -> list[Tensor]:
    """Random inputs of a stage, on the CPU."""
    generator = torch.Generator().manual_seed(1000 * seed + batch)
    if stage == "encoder":
        return [torch.randint(0, 256, (batch, tile, tile, 3), dtype=torch.uint8, generator=generator)]
    features = [
        torch.randn(batch, c, tile >> (level + 1), tile >> (level + 1), generator=generator).half()
        for level, c in enumerate(network.config.features)
    ]
    shape = (batch, 1, tile, tile) if stage == "cells" else (batch, int(stage.rpartition("=")[2]), 3, tile, tile)
    return [*features, torch.randn(shape, generator=generator).half()]


def _inputs(network: DualDiffusion, bench: Bench, stage: str, batch: int, seed: int) -> list[Tensor]:
    return [x.to(bench.device) for x in stage_inputs(network, stage, batch, bench.options.tile, seed)]


@torch.inference_mode()
def _eager(module: nn.Module, inputs: list[Tensor]) -> Any:
    return module(*inputs)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@torch.inference_mode()
def _flops(module: nn.Module, inputs: list[Tensor]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return float(counter.get_total_flops())


@torch.inference_mode()
def _parity(network: DualDiffusion, stages: dict[str, nn.Module], bench: Bench, layout: str) -> None:
    """The stages in a row against the unfolded network in float32, on smooth, blank, saturated and random tiles."""
    tile, device = bench.options.tile, bench.device
    he = _golden_tiles(tile)
    seeds = np.arange(len(he), dtype=np.int64)[:, None]
    origins = np.zeros((len(he), 2), np.int64)
    features = stages["encoder"](torch.from_numpy(he).to(device))
    checks: dict[str, Check] = {}
    for k in STEPS:
        noise, cell_noise = sampler_noise(seeds, origins, steps=k, size=(tile, tile))
        golden = stain_tiles(network, he, sigmas=START_SIGMAS[k], seeds=seeds, origins=origins)
        image = stages[f"image k={k}"](*features, torch.from_numpy(noise).to(device))
        checks[f"image k={k}"] = grey_levels(image, golden["STAIN_CD3"])
        if k == 1:
            cells = stages["cells"](*features, torch.from_numpy(cell_noise).to(device))
            checks["cells"] = grey_levels(cells, golden["CELLS_CD3"])
    found = {name: check.as_dict() for name, check in checks.items()}
    bench.result.data.setdefault("parity", {})[layout] = found
    far = [n for n, c in checks.items() if c.max_levels > MAX_LEVELS or c.share_over_one > MAX_SHARE_OVER_ONE]
    if far:
        raise ValueError(f"over the limit against float32: {', '.join(far)}")


def _golden_tiles(tile: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 255, (2, tile // 16, tile // 16, 3), dtype=np.uint8)
    smooth = coarse.repeat(16, axis=1).repeat(16, axis=2)
    glass = np.full((1, tile, tile, 3), 243, np.uint8)
    saturated = np.where(np.indices((tile, tile)).sum(0) // 32 % 2, 255, 0).astype(np.uint8)
    noise = rng.integers(0, 256, (1, tile, tile, 3), dtype=np.uint8)
    return np.concatenate([smooth, glass, np.repeat(saturated[None, ..., None], 3, axis=3), noise])


class Captured:
    """A stage as a CUDA graph with its own input tensors, which live as long as the graph. On a CPU it runs eagerly."""

    def __init__(self, module: nn.Module, inputs: list[Tensor]) -> None:
        self._module, self._inputs = module, [tensor.clone() for tensor in inputs]
        self._graph: Any = None
        if inputs[0].is_cuda:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    module(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._outputs = module(*self._inputs)

    def __call__(self, inputs: list[Tensor]) -> Any:
        for held, tensor in zip(self._inputs, inputs, strict=True):
            held.copy_(tensor)
        if self._graph is None:
            return self._module(*self._inputs)
        self._graph.replay()
        return self._outputs


def _compiled(module: nn.Module) -> Callable[[list[Tensor]], Any]:
    compiled = torch.compile(module, dynamic=False)
    return lambda inputs: compiled(*inputs)
