"""``staindiffuser stain``: stains each slide into its own folder, says what became of it, and decides the exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from staindiffuser.allocator import use_few_arenas
from staindiffuser.client.cluster import run_on_cluster
from staindiffuser.client.contract import ModelContract, Stainer
from staindiffuser.client.errors import FileNameError, OutputError
from staindiffuser.client.inputs import SlideInput, find_inputs
from staindiffuser.client.names import SlideNames, hide_arguments
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.progress import Reporter, TerminalReporter
from staindiffuser.client.run_record import RunRecord, gate_text
from staindiffuser.client.staining import SlideJob
from staindiffuser.client.summary import Outcome, Status, write_summary
from staindiffuser.client.target import Target
from staindiffuser.client.tracing import exporting
from staindiffuser.errors import EXIT_SOME_FAILED, InputError, StainDiffuserError, UsageError
from staindiffuser.interruption import sigterm_like_ctrl_c

__all__ = ["run_command", "stain_one"]

_OF_ONE_SLIDE = (InputError, OutputError, FileNameError)
"""Errors that do not stop the other slides."""


def run_command(
    inputs: Sequence[Path],
    output: Path | None,
    target: Target,
    options: StainingOptions,
    *,
    as_json: bool = False,
    dry_run: bool = False,
    command: str = "",
    cluster: str = "",
) -> int:
    """Stain every slide and report on stderr; the server is started or contacted for the first usable one.

    With several slides, a complete result of the same options is kept, and ``summary.csv`` is written.

    Args:
        inputs: slides, folders, patterns and lists; see :func:`staindiffuser.client.inputs.find_inputs`.
        output: the result folder, or the parent of the result folders of several slides.
        target: the server.
        options: for all slides.
        as_json: print one line per slide on stdout: its ``run.json``, or its error.
        dry_run: do everything up to the first request, and estimate the rest.
        command: the command line, shown when work is interrupted.
        cluster: address of the Ray cluster whose machines do the work; empty for this one.

    Returns:
        The exit code: 0, or 1 if some slides failed and others did not.

    Raises:
        StainDiffuserError: all slides failed (the last one's error), or the server did.
    """
    use_few_arenas()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC and tifffile repeat on stderr what our errors say
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    reporter = TerminalReporter()
    hide: Callable[[str], str] = str if options.keep_names else functools.partial(hide_arguments, inputs=inputs)
    try:
        slides = find_inputs(inputs, output)
        batch = _Batch(slides, target, options, reporter, as_json=as_json, dry_run=dry_run, command=command)
        hide = batch.hide
        if len(slides) > 1 and options.mask not in ("auto", "none"):
            raise UsageError(f"--mask {options.mask} fits one slide, not {len(slides)}: stain that slide by itself")
        if len(slides) > 1 and options.cells_from is not None:
            raise UsageError(f"--cells-from {options.cells_from} fits one slide, not {len(slides)}")
        try:
            with sigterm_like_ctrl_c(), exporting(reporter.say):
                if cluster:
                    batch.run_on(cluster)
                else:
                    batch.run()
        finally:
            if len(slides) > 1 and not dry_run:
                path = write_summary(output or Path(), batch.outcomes_of_all())
                reporter.say(f"{batch.count_text()}; {path}")
        return batch.exit_code()
    except StainDiffuserError as error:
        if not reporter.is_terminal:
            error.args = (hide(str(error)),)
        raise


class _Batch:
    """The slides of one command."""

    def __init__(
        self,
        slides: Sequence[SlideInput],
        target: Target,
        options: StainingOptions,
        reporter: TerminalReporter,
        *,
        as_json: bool,
        dry_run: bool,
        command: str,
    ) -> None:
        self.reporter = reporter
        self._names = [SlideNames(slide.path, keep=options.keep_names, number=n) for n, slide in enumerate(slides, 1)]
        reporter.hide = self.hide
        self._slides, self._target, self._as_json, self._dry_run = slides, target, as_json, dry_run
        self._command = command
        keep = len(slides) > 1 and not options.overwrite
        self._in_flight = options.in_flight
        threads = options.in_flight * max(1, len(target.addresses))
        self._options = dataclasses.replace(options, resume=options.resume or keep, in_flight=threads)
        self._outcomes: list[Outcome] = []

    def run(self) -> None:
        """Stain every slide, or stop at an error that would fail for the others too."""
        started = time.monotonic()
        with ExitStack() as open_target:
            client: Stainer | None = None
            for number, (slide, names) in enumerate(zip(self._slides, self._names, strict=True), 1):
                options = dataclasses.replace(self._options, mpp=slide.mpp) if slide.mpp is not None else self._options
                self.reporter.prefix = f"slide {number} of {len(self._slides)} · " if len(self._slides) > 1 else ""
                try:
                    with SlideJob(slide.path, slide.output, options, names) as job:
                        if client is None:
                            connection = self._target.connect(self._in_flight, self.reporter.say)
                            client = open_target.enter_context(connection)
                            self._say_model(client.contract)
                        work = self._plan if self._dry_run else self._stain
                        outcome = work(names, slide, job, client)
                except _OF_ONE_SLIDE as error:
                    outcome = Outcome(slide=slide, names=names, status="failed", error=error)
                except BaseException as error:  # it would end the other slides too
                    expected = error if isinstance(error, StainDiffuserError) else None
                    self._add(Outcome(slide=slide, names=names, status="interrupted", error=expected))
                    raise
                self._add(outcome)
                self._say(outcome)
                left = len(self._slides) - number
                if left and not self._dry_run:
                    remaining = (time.monotonic() - started) / number * left
                    self.reporter.say(f"{number} of {len(self._slides)} slides · about {_time(remaining)} left")

    def run_on(self, cluster: str) -> None:
        """Stain every slide on the machines of a Ray cluster."""
        if self._dry_run or not self._target.addresses:
            raise UsageError("--ray needs --server, and no --dry-run")
        options = dataclasses.replace(self._options, in_flight=self._in_flight)
        arguments = [(slide.absolute(), self._target, options) for slide in self._slides]
        outcomes: dict[int, Outcome] = {}
        for index, found in run_on_cluster(cluster, stain_one, arguments, self.reporter.say):
            slide, names = self._slides[index], self._names[index]
            if isinstance(found, StainDiffuserError):
                outcomes[index] = Outcome(slide=slide, names=names, status="failed", error=found)
            else:
                status, run, error = found
                outcomes[index] = Outcome(slide=slide, names=names, status=status, run=run, error=error)
            self._say(outcomes[index])
            self.reporter.say(f"{len(outcomes)} of {len(self._slides)} slides")
        for index in sorted(outcomes):
            self._add(outcomes[index])

    def _say_model(self, model: ModelContract) -> None:
        gate = gate_text(model.gate, model.stains)
        self.reporter.say(f"model {model.model_name} {model.model_version[:12]}; gate: {gate}")

    def outcomes_of_all(self) -> list[Outcome]:
        """One outcome per slide, including those that were not reached."""
        pairs = list(zip(self._slides, self._names, strict=True))[len(self._outcomes) :]
        left = [Outcome(slide=slide, names=names, status="not started") for slide, names in pairs]
        return [*self._outcomes, *left]

    def hide(self, text: str) -> str:
        """The text without the names of the slides, unless they are kept."""
        for names in self._names:
            text = names.hidden(text)
        return text

    def count_text(self) -> str:
        """How many slides were stained, kept, failed."""
        states = [outcome.status for outcome in self.outcomes_of_all()]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))

    def exit_code(self) -> int:
        """0, or 1 if some slides failed; raises the last error if all of them did."""
        errors = [outcome.error for outcome in self._outcomes if outcome.error is not None]
        if errors and len(errors) == len(self._slides):
            raise errors[-1]
        return EXIT_SOME_FAILED if errors else 0

    def _stain(self, names: SlideNames, slide: SlideInput, job: SlideJob, client: Stainer) -> Outcome:
        command = self._command if names.keep or self.reporter.is_terminal else ""
        with _saying_how_to_continue(job, self.reporter, command):
            run = job.stain(client, self.reporter)
        return Outcome(slide=slide, names=names, status="kept" if job.kept else "stained", run=run)

    def _plan(self, names: SlideNames, slide: SlideInput, job: SlideJob, client: Stainer) -> Outcome:
        plan = job.plan(client.contract)
        stains = client.contract.select(self._options.stains)
        options = self._options
        estimate = plan.estimate(len(stains), cells=options.cells, combined=options.combined, formats=options.formats)
        for line in [plan.announcement(), *plan.warnings]:
            self.reporter.say(line)
        self.reporter.say(
            f"{slide.output}: about {estimate.disk_bytes >> 20} MiB of disk while staining, "
            f"{estimate.memory_bytes >> 20} MiB of memory"
        )
        numbers = {"tiles": len(plan.tiles), **dataclasses.asdict(estimate)}
        return Outcome(slide=slide, names=names, status="planned", plan=numbers)

    def _add(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        if self._as_json:
            sys.stdout.write(json.dumps(outcome.to_dict(), ensure_ascii=False) + "\n")
            sys.stdout.flush()

    def _say(self, outcome: Outcome) -> None:
        run, last = outcome.run, len(self._outcomes) == len(self._slides)
        if run is not None:
            outputs = ", ".join(run.outputs)
            self.reporter.say(f"{outcome.slide.output}: {outputs} · {run.seconds.total:.1f} s · {run.notice}")
        elif outcome.error is not None and not (last and all(other.error for other in self._outcomes)):
            self.reporter.say(f"error: {outcome.error}")  # if all slides fail, the last error ends the command


def stain_one(
    slide: SlideInput, target: Target, options: StainingOptions
) -> tuple[Status, RunRecord | None, StainDiffuserError | None]:
    """Stain a slide as one of several, on a machine of a cluster; what became of it."""
    batch = _Batch([slide], target, options, TerminalReporter(), as_json=False, dry_run=False, command="")
    with contextlib.suppress(StainDiffuserError):  # it is in the outcome
        batch.run()
    (outcome,) = batch.outcomes_of_all()
    return outcome.status, outcome.run, outcome.error


@contextmanager
def _saying_how_to_continue(job: SlideJob, reporter: Reporter, command: str) -> Iterator[None]:
    """If staining is interrupted and rows are saved, say how to continue."""
    try:
        yield
    except InputError:
        raise
    except BaseException:
        if job.run is not None and job.run.saved_rows:
            saved, rows = job.run.saved_rows, job.run.plan.rows
            again = f": {command}" if command else ""
            reporter.say(f"{saved} of {rows} rows are saved; to continue, run the same command again{again}")
        raise


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "a minute"
