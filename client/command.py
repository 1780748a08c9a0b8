"""``staindiffuser stain``: stains each input into its own folder and decides the exit code."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from staindiffuser.client.connection import StainClient
from staindiffuser.client.errors import FileNameError, OutputError
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.progress import TerminalReporter
from staindiffuser.client.run_record import RunRecord
from staindiffuser.client.staining import SlideJob
from staindiffuser.client.target import Target
from staindiffuser.errors import EXIT_SOME_FAILED, InputError, StainDiffuserError, UsageError

__all__ = ["default_output", "outputs_for", "run_command"]


def run_command(
    inputs: Sequence[Path], output: Path | None, target: Target, options: StainingOptions, *, as_json: bool = False
) -> int:
    """Stain every input and report on stderr; the server is started or contacted for the first usable one.

    Args:
        inputs: slides and tiles.
        output: the result folder, or the parent of the result folders of several inputs.
        target: the server.
        options: for all inputs.
        as_json: print each ``run.json`` as one line on stdout.

    Returns:
        The exit code: 0, or 1 if some inputs failed and others did not.

    Raises:
        StainDiffuserError: all inputs failed (the last one's error), or the server did.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC and tifffile repeat on stderr what our errors say
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    reporter = TerminalReporter()
    failures: list[StainDiffuserError] = []
    with ExitStack() as open_target:
        client: StainClient | None = None
        for path, folder in outputs_for(inputs, output).items():
            try:
                with SlideJob(path, folder, options) as job:
                    if client is None:
                        client = open_target.enter_context(target.connect(options.in_flight, reporter.say))
                    run = _stain(job, client, reporter)
            except (
                InputError,
                OutputError,
                FileNameError,
            ) as error:  # anything else would fail for the other inputs too
                failures.append(error)
                continue
            if as_json:
                line = {**run.to_dict(), "output": str(folder)}
                sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
                sys.stdout.flush()
            reporter.say(f"{folder}: {', '.join(run.outputs)} · {run.seconds.total:.1f} s · {run.notice}")
    all_failed = len(failures) == len(inputs)
    for failure in failures[:-1] if all_failed else failures:
        reporter.say(f"error: {failure}")
    if all_failed:
        raise failures[-1]
    return EXIT_SOME_FAILED if failures else 0


def _stain(job: SlideJob, client: StainClient, reporter: TerminalReporter) -> RunRecord:
    """Stain a slide; if that is interrupted and rows are saved, say how to continue."""
    try:
        return job.stain(client, reporter)
    except InputError:
        raise
    except BaseException:
        if job.run is not None and job.run.saved_rows:
            saved, rows = job.run.saved_rows, job.run.plan.rows
            command = shlex.join(["staindiffuser", *sys.argv[1:]])
            reporter.say(f"{saved} of {rows} rows are saved; to continue, run the same command again: {command}")
        raise


def outputs_for(inputs: Sequence[Path], output: Path | None) -> dict[Path, Path]:
    """The result folder of each input.

    Raises:
        UsageError: an input is named twice, or two inputs would share a folder.
    """
    if len(set(inputs)) < len(inputs):
        raise UsageError("an input is named twice")
    if len(inputs) == 1:
        return {inputs[0]: output if output is not None else default_output(inputs[0])}
    outputs = {path: (output or Path()) / default_output(path).name for path in inputs}
    if len(set(outputs.values())) < len(outputs):
        raise UsageError("two inputs have the same name and would share a folder: stain them separately with --output")
    return outputs


def default_output(path: Path) -> Path:
    """``./<slide>-stained``, where ``<slide>`` is the file name without ``.svs``, ``.ome.tif`` and the like."""
    stem = re.sub(r"(\.ome)?\.[A-Za-z0-9]{1,5}$", "", path.name) or path.name
    return Path(f"{stem}-stained")


def _terminate(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM like Ctrl-C: finished rows stay saved, and a server of our own is stopped."""
    raise KeyboardInterrupt
