"""What the engines do on an NVIDIA GPU: ``make verify-gpu``. Needs torch (2.11 or newer) and NumPy, nothing else.

It finds what is installed, checks every engine against torch in float32, and measures each stage (the encoder, a
image at k = 1, 2, 4, its cells) at each batch size: eager, compiled, under a captured CUDA graph, and by TensorRT
where it is installed. Times are CUDA events; floating-point operations are counted by torch; the share is of the
fastest matrix product that the same card shows. Measurements that no longer fit into the time limit are left out and
listed.

``--device cpu`` runs the same logic on a processor with a small model, to test it; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from staindiffuser.benchmarks.gpu_tensorrt import TensorRTStage, tensorrt_modules
from staindiffuser.errors import DependencyError, StainDiffuserError
from staindiffuser.export.modules import BranchEngine, EncoderEngine
from staindiffuser.export.parity import MAX_LEVELS, MAX_SHARE_OVER_ONE
from staindiffuser.training.config import PRESETS, StainConfig
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.infer import sampler_noise, stain_tiles
from staindiffuser.training.model.network import DualDiffusion

__all__ = ["Measurement", "Report", "main", "verify_gpu"]

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = (1, 2, 4)
TIME_LIMIT = 420.0
"""Seconds after which nothing new is begun."""
_SECONDS_EACH = 0.6
_COMPILE_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One stage at one batch size in one way of running it."""

    stage: str
    batch: int
    how: str
    milliseconds: float
    """Median of one run of the whole batch."""
    tflops: float
    """Reached, 10¹² floating-point operations a second."""
    share_of_peak: float
    memory_mib: float
    """Most device memory that torch held during the runs (weights, activations); 0 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is written to ``benchmarks/results/<gpu>.json``."""

    device: str
    compute_capability: str
    torch: str
    cuda: str
    installed: dict[str, str]
    preset: str
    tile: int
    precision: str
    peak_tflops: float
    """Fastest half-precision matrix product measured on this card."""
    gflop_per_tile: dict[str, float]
    parity: dict[str, dict[str, float]]
    """Per stage: ``max_levels`` and ``share_over_one`` against torch in float32."""
    parity_passed: bool
    plan_bytes: dict[str, int]
    """Bytes of TensorRT's plans, by builder and stage; k = 1, 2 and 4 share their weights."""
    plan_memory_bytes: dict[str, int]
    """Scratch memory of those plans on the device."""
    measurements: tuple[Measurement, ...]
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass
class _Clock:
    """The device's stopwatch and the time limit."""

    device: torch.device
    limit: float
    began: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return time.monotonic() - self.began > self.limit

    def milliseconds(self, run: Callable[[], object], seconds: float) -> float:
        """Median time of one run; at least three runs, about ``seconds`` in all."""
        for _ in range(2):
            run()
        times: list[float] = []
        until = time.monotonic() + seconds
        while len(times) < 3 or (time.monotonic() < until and len(times) < 200):
            if self.device.type == "cuda":
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


def verify_gpu(
    *,
    preset: str = "base",
    device: str = "cuda",
    tile: int = 256,
    batches: Sequence[int] = (1, 8, 32),
    limit: float = TIME_LIMIT,
    seconds_each: float = _SECONDS_EACH,
    progress: Callable[[str], None] = lambda message: None,
) -> Report:
    """Check and measure; see the module.

    Args:
        preset: size of the network, whose weights are random.
        device: ``cuda``, or ``cpu`` to test the logic.
        tile: height and width, pixels.
        batches: batch sizes.
        limit: seconds after which nothing new is begun.
        seconds_each: time spent on each measurement.
        progress: told what is being done.

    Raises:
        DependencyError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DependencyError("no NVIDIA GPU that torch can use: run it on a machine with one (torch with CUDA)")
    target = torch.device(device)
    clock = _Clock(target, limit)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    network = _network(preset).to(target)
    trunk = torch.float16 if device == "cuda" else torch.float32  # half-precision convolutions on a CPU take minutes
    stages = _stages(network, trunk)
    progress("counting operations and checking against float32")
    flops = {name: _flops(module, _inputs(network, name, 1, tile, target)) for name, module in stages.items()}
    parity = _parity(network, stages, tile, target)
    peak = _peak(clock, seconds_each)
    progress(f"matrix peak {peak / 1e12:.1f} TFLOP/s")
    measurements: list[Measurement] = []
    left_out: list[str] = []

    def measure(name: str, batch: int, how: str, prepare: Callable[[list[Tensor]], Callable[[], object]]) -> None:
        if clock.over:
            left_out.append(f"{name}, batch {batch}, {how}: the time limit")
            return
        try:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            run = prepare(_inputs(network, name, batch, tile, target))
            milliseconds = clock.milliseconds(run, seconds_each)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            left_out.append(f"{name}, batch {batch}, {how}: {str(error).splitlines()[0][:160]}")
            return
        reached = flops[name] * batch / milliseconds * 1e3
        memory = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
        measurements.append(
            Measurement(
                stage=name,
                batch=batch,
                how=how,
                milliseconds=milliseconds,
                tflops=reached / 1e12,
                share_of_peak=reached / peak,
                memory_mib=memory,
            )
        )
        progress(f"{name}, batch {batch}, {how}: {milliseconds:.2f} ms, {reached / peak:.0%} of the peak")

    for name, module in stages.items():
        for batch in batches:
            measure(name, batch, "eager", lambda tensors, m=module: lambda: m(*tensors))  # type: ignore[misc]
            if device == "cuda":
                measure(name, batch, "cuda graph", lambda tensors, m=module: _captured(m, tensors))  # type: ignore[misc]
    plan_bytes: dict[str, int] = {}
    plan_memory: dict[str, int] = {}
    for label, trt in tensorrt_modules().items() if device == "cuda" else ():
        for name in stages:
            if clock.over:
                left_out.append(f"{name}, {label}: the time limit")
                continue
            progress(f"building {name} with {label}")
            try:
                stage = TensorRTStage(trt, network, name, trunk, tile=tile, batches=tuple(batches))
            except (StainDiffuserError, RuntimeError, ImportError) as error:
                left_out.append(f"{name}, {label}: {str(error).splitlines()[0][:160]}")
                continue
            plan_bytes[f"{label} {name}"], plan_memory[f"{label} {name}"] = stage.plan_bytes, stage.memory_bytes
            parity[f"{label} {name}"] = stage.difference(stages[name], _inputs(network, name, batches[0], tile, target))
            for batch in batches:
                measure(name, batch, label, stage.prepare)
    if device == "cuda":  # last: compiling takes the longest and is the first to be left out
        for name, module in stages.items():
            measure(name, _COMPILE_BATCH, "compiled", lambda tensors, m=module: _compiled(m, tensors))  # type: ignore[misc]
    properties = torch.cuda.get_device_properties(0) if device == "cuda" else None
    passed = all(p["max_levels"] <= MAX_LEVELS and p["share_over_one"] <= MAX_SHARE_OVER_ONE for p in parity.values())
    return Report(
        device=properties.name if properties else platform.processor() or platform.machine(),
        compute_capability=f"{properties.major}.{properties.minor}" if properties else "",
        torch=torch.__version__,
        cuda=str(torch.version.cuda or ""),
        installed={label: str(module.__version__) for label, module in tensorrt_modules().items()},
        preset=preset,
        tile=tile,
        precision=str(trunk).removeprefix("torch."),
        peak_tflops=peak / 1e12,
        gflop_per_tile={name: value / 1e9 for name, value in flops.items()},
        parity=parity,
        parity_passed=passed,
        plan_bytes=plan_bytes,
        plan_memory_bytes=plan_memory,
        measurements=tuple(measurements),
        left_out=tuple(left_out),
        seconds=time.monotonic() - clock.began,
    )


def _network(preset: str) -> DualDiffusion:
    """One stain, random weights whose gains are not zero, so that every layer matters."""
    stain = StainConfig(name="cd3", label="CD3")
    network = DualDiffusion(replace(PRESETS[preset].model, stains=(stain,))).eval()
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return network.requires_grad_(False)


def _stages(network: DualDiffusion, trunk: torch.dtype) -> dict[str, nn.Module]:
    (stain,) = network.config.stains
    device = next(network.parameters()).device
    cpu = network.cpu()  # folding builds its constants where the weights are
    stages: dict[str, nn.Module] = {"encoder": EncoderEngine(cpu, trunk)}
    for k in STEPS:
        stages[f"image k={k}"] = BranchEngine(cpu, "images", stain, START_SIGMAS[k], trunk)
    stages["cells"] = BranchEngine(cpu, "cells", stain, [cpu.config.sigma_max], trunk)
    network.to(device)
    return {name: module.eval().to(device) for name, module in stages.items()}


def _inputs(network: DualDiffusion, stage: str, batch: int, tile: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    if stage == "encoder":
        return [torch.randint(0, 256, (batch, tile, tile, 3), dtype=torch.uint8, generator=generator).to(device)]
    features = [
        torch.randn(batch, c, tile >> (level + 1), tile >> (level + 1), generator=generator).half().to(device)
        for level, c in enumerate(network.config.encoder.channels)
    ]
    shape = (batch, 1, tile, tile) if stage == "cells" else (batch, int(stage.rpartition("=")[2]), 3, tile, tile)
    return [*features, torch.randn(shape, generator=generator).half().to(device)]


@torch.inference_mode()
def _flops(module: nn.Module, inputs: list[Tensor]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return float(counter.get_total_flops())


@torch.inference_mode()
def _parity(
    network: DualDiffusion, stages: dict[str, nn.Module], tile: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """The stages in a row against the unfolded network in float32, on smooth, blank, saturated and random tiles."""
    he = _golden_tiles(tile)
    seeds = np.arange(len(he), dtype=np.int64)[:, None]
    origins = np.zeros((len(he), 2), np.int64)
    (features) = stages["encoder"](torch.from_numpy(he).to(device))
    results = {}
    for k in STEPS:
        noise, cell_noise = sampler_noise(seeds, origins, steps=k, size=(tile, tile))
        golden = stain_tiles(network, he, sigmas=START_SIGMAS[k], seeds=seeds, origins=origins)
        image = stages[f"image k={k}"](*features, torch.from_numpy(noise).to(device))
        results[f"image k={k}"] = _difference(image, golden["STAIN_CD3"])
        if k == 1:
            cells = stages["cells"](*features, torch.from_numpy(cell_noise).to(device))
            results["cells"] = _difference(cells, golden["CELLS_CD3"])
    return results


def _golden_tiles(tile: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 255, (2, tile // 16, tile // 16, 3), dtype=np.uint8)
    smooth = coarse.repeat(16, axis=1).repeat(16, axis=2)
    glass = np.full((1, tile, tile, 3), 243, np.uint8)
    saturated = np.where(np.indices((tile, tile)).sum(0) // 32 % 2, 255, 0).astype(np.uint8)
    noise = rng.integers(0, 256, (1, tile, tile, 3), dtype=np.uint8)
    return np.concatenate([smooth, glass, np.repeat(saturated[None, ..., None], 3, axis=3), noise])


def _difference(found: Tensor, golden: np.ndarray[Any, Any]) -> dict[str, float]:
    levels = np.abs(found.cpu().numpy().astype(np.int16) - golden.astype(np.int16))
    return {"max_levels": float(levels.max()), "share_over_one": float((levels > 1).mean())}


def _peak(clock: _Clock, seconds: float) -> float:
    """Fastest matrix product, floating-point operations a second."""
    cuda = clock.device.type == "cuda"
    best = 0.0
    for size in (4096, 8192, 12288) if cuda else (512,):
        dtype = torch.float16 if cuda else torch.float32
        a = torch.randn(size, size, device=clock.device, dtype=dtype)
        b = torch.randn(size, size, device=clock.device, dtype=dtype)
        milliseconds = clock.milliseconds(lambda a=a, b=b: a @ b, seconds)  # type: ignore[misc]
        best = max(best, 2.0 * size**3 / milliseconds * 1e3)
    return best


def _captured(module: nn.Module, inputs: list[Tensor]) -> Callable[[], object]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(3):
            module(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        held = module(*inputs)

    def replay() -> object:
        graph.replay()
        return held

    return replay


def _compiled(module: nn.Module, inputs: list[Tensor]) -> Callable[[], object]:
    compiled = torch.compile(module, dynamic=False)

    def run() -> object:
        with torch.inference_mode():
            return compiled(*inputs)

    run()
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="verify-gpu", description="Check and measure the engines on this GPU.")
    parser.add_argument("--preset", default="base", choices=sorted(PRESETS))
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--batch", default="1,8,32", help="batch sizes, such as 1,8,32")
    parser.add_argument("--output", type=Path, help="JSON file; by default benchmarks/results/<gpu>.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help=argparse.SUPPRESS)
    parser.add_argument("--seconds-each", type=float, default=_SECONDS_EACH, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    try:
        with torch.inference_mode():
            report = verify_gpu(
                preset=chosen.preset,
                device=chosen.device,
                tile=chosen.tile,
                batches=tuple(int(part) for part in chosen.batch.split(",")),
                seconds_each=chosen.seconds_each,
                progress=lambda message: print(message, file=sys.stderr),  # noqa: T201
            )
    except StainDiffuserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    name = re.sub(r"[^a-z0-9]+", "-", report.device.lower()).strip("-")
    output: Path = chosen.output or RESULTS / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    verdict = "within" if report.parity_passed else "OVER"
    sys.stdout.write(f"{output}: {len(report.measurements)} measurements, parity {verdict} the limit\n")
    return 0 if report.parity_passed else 5


if __name__ == "__main__":
    sys.exit(main())
