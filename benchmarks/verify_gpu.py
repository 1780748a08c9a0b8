"""``make verify-gpu``: checks and measures the project on an NVIDIA GPU, in at most eight minutes.

Each step runs in its own process, so that a crash or a broken CUDA context ends only that step. It writes
``<step>.json`` and ``<step>.log`` to the output folder before the next step begins; ``report.json`` and ``report.md``
summarise them. If a step fails, the report names it, the other steps run all the same, and the exit code is 5.

``--device cpu`` rehearses everything with a small model; its timings mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staindiffuser.benchmarks.gpu.options import GpuOptions, StepResult
from staindiffuser.errors import DependencyError
from staindiffuser.files import write_json

__all__ = ["STEPS", "Step", "main"]

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 480.0
FAILED = 5
_GRACE = 30.0
"""Seconds that a step may exceed its limit to finish what it is doing, before it is killed."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step."""

    name: str
    module: str
    seconds: float
    """Its share of :data:`TIME_LIMIT`; 0 for the last step, which gets the rest."""


STEPS = (
    Step(name="environment", module="environment", seconds=30),
    Step(name="noise", module="noise", seconds=30),
    Step(name="engines", module="engines", seconds=60),
    Step(name="server", module="server", seconds=60),
    Step(name="stages", module="stages", seconds=150),
    Step(name="tensorrt", module="tensorrt_stage", seconds=70),
    Step(name="training", module="training", seconds=0),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 5 if a step failed, 6 without a GPU."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _parser().parse_args(given)
    output: Path = chosen.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if chosen.step:
        return _run_step(chosen, output)
    only = chosen.only.split(",") if chosen.only else [step.name for step in STEPS]
    began = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    for step in (s for s in STEPS if s.name in only):
        remaining = chosen.limit - (time.monotonic() - began)
        share = step.seconds * chosen.limit / TIME_LIMIT
        limit = max(0.0, min(share, remaining) if share else remaining - _GRACE)
        sys.stderr.write(f"{step.name}: at most {limit:.0f} s\n")
        code = _start(step, given, output, limit)
        results[step.name] = _read(step, output, code)
        _summarise(results, output, time.monotonic() - began)
        sys.stderr.write(f"{step.name}: {_line(results[step.name])}\n")
        if code == DependencyError.exit_code:  # no GPU
            sys.stderr.write(f"error: {results[step.name]['errors'][0]}\n")
            return DependencyError.exit_code
    failed = [name for name, result in results.items() if result["status"] == "failed"]
    sys.stdout.write(f"{output / 'report.md'}: {len(results)} steps, failed: {', '.join(failed) or 'none'}\n")
    return FAILED if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="verify-gpu",
        description="Check and measure the project on this NVIDIA GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="folder for the results")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds for everything")
    parser.add_argument("--only", default="", help=f"steps, by commas: {','.join(step.name for step in STEPS)}")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu rehearses")
    graphs = ROOT / "checkpoints" / "demo" / "graphs"
    parser.add_argument("--graphs", type=Path, default=graphs, help="graphs folder whose engines are checked")
    parser.add_argument("--preset", default="base", help="size of the network whose stages are timed")
    parser.add_argument("--tile", type=int, default=256, help="pixels")
    parser.add_argument("--batch", default="1,8,32", help="batch sizes that stages are timed with")
    parser.add_argument("--seconds-each", type=float, default=0.4, help="time spent on one measurement")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--train-preset", default="demo", help="recipe that the rest of the time trains")
    parser.add_argument("--tiles", type=Path, help="paired tiles to train on; by default some are simulated")
    parser.add_argument("--step", choices=[step.name for step in STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--step-limit", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser


def _start(step: Step, given: Sequence[str], output: Path, limit: float) -> int:
    """Run a step in its own process; returns its exit code, negative if it was killed."""
    command = [sys.executable, "-m", "staindiffuser.benchmarks.verify_gpu", *given]
    command += ["--output", str(output), "--step", step.name, "--step-limit", str(limit)]
    (output / f"{step.name}.json").unlink(missing_ok=True)
    environment = dict(os.environ)
    if "cpu" in given:  # a rehearsal's timings do not matter
        environment["OMP_NUM_THREADS"] = "1"
    with (output / f"{step.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        # Interrupted training gets another minute to write its snapshot.
        grace = _GRACE + (60 if step.name == "training" else 0)
        try:
            return process.wait(timeout=limit + grace)
        except BaseException as error:
            process.kill()
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return process.returncode
            raise


def _run_step(chosen: argparse.Namespace, output: Path) -> int:
    """Run one step, in its own process."""
    options = GpuOptions(
        output=output,
        device=chosen.device,
        graphs=chosen.graphs,
        preset=chosen.preset,
        tile=chosen.tile,
        batches=tuple(int(part) for part in chosen.batch.split(",")),
        seconds_each=chosen.seconds_each,
        compiled=not chosen.no_compile,
        train_preset=chosen.train_preset,
        tiles=chosen.tiles,
        limit=chosen.step_limit,
    )
    module = next(step.module for step in STEPS if step.name == chosen.step)
    result = StepResult(path=output / f"{chosen.step}.json", limit=options.limit)
    code = 0
    try:
        importlib.import_module(f"staindiffuser.benchmarks.gpu.{module}").run(options, result)
    except DependencyError as error:
        result.errors.append(str(error))
        code = error.exit_code if chosen.step == "environment" else FAILED
    except Exception as error:  # a step's failure is its result
        result.errors.append(f"{type(error).__name__}: {error}")
        raise
    finally:
        result.write()
    return code or (FAILED if result.errors else 0)


def _read(step: Step, output: Path, code: int) -> dict[str, Any]:
    """Read a step's result. If its process died, the step has failed, and what it had written is kept."""
    path = output / f"{step.name}.json"
    found: dict[str, Any] = {"status": "failed", "seconds": 0.0, "errors": [], "left_out": []}
    if path.is_file():
        found.update(json.loads(path.read_text(encoding="utf-8")))
    if code < 0:
        found["errors"].append(f"the step was killed (signal {-code}): see {step.name}.log")
    elif code and not found["errors"]:
        found["errors"].append(f"the step ended with exit code {code}: see {step.name}.log")
    if found["errors"]:
        found["status"] = "failed"
        write_json(path, found)
    return found


def _line(result: dict[str, Any]) -> str:
    reason = result["errors"][0] if result["errors"] else result.get("skipped", "")
    return f"{result['status']} in {result['seconds']:.0f} s{': ' if reason else ''}{reason}"


def _summarise(results: dict[str, dict[str, Any]], output: Path, seconds: float) -> None:
    write_json(output / "report.json", {"seconds": round(seconds, 1), "steps": results})
    device = results.get("environment", {}).get("device", "unknown device")
    lines = [f"# Verified on {device}", "", "| step | result | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {_cell(result)} | {result['seconds']:.0f} |" for name, result in results.items()]
    for name, result in results.items():
        problems = [*result["errors"], *(f"left out: {what}" for what in result["left_out"])]
        if problems:
            lines += ["", f"## {name}", "", *(f"- {problem}" for problem in problems)]
    rows = [m for name in ("stages", "tensorrt") for m in results.get(name, {}).get("measurements", [])]
    if rows:
        lines += ["", "| stage | batch | how | ms | TFLOP/s | of the peak |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {m['stage']} | {m['batch']} | {m['how']} | {m['milliseconds']:.2f} | {m['tflops']:.2f} "
            f"| {m['share_of_peak']:.0%} |"
            for m in rows
        ]
    (output / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(result: dict[str, Any]) -> str:
    return f"{result['status']}{': ' + result['skipped'] if result.get('skipped') else ''}"


if __name__ == "__main__":
    sys.exit(main())
