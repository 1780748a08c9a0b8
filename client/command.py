"""What ``staindiffuser stain`` does: which folder for which input, which server, and what an exit code means."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from staindiffuser.client.connection import StainClient
from staindiffuser.client.contract import Stainer
from staindiffuser.client.errors import OutputError
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.output import RUN_JSON, ResultFolder
from staindiffuser.client.progress import Reporter, TerminalReporter
from staindiffuser.client.staining import stain_slide
from staindiffuser.errors import EXIT_SOME_FAILED, InputError, StainDiffuserError, UsageError
from staindiffuser.imaging.slides import open_slide

__all__ = ["Server", "default_output", "outputs_for", "run_command"]


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where the staining is done."""

    address: str | None = None
    """``HOST:PORT`` of a server that runs."""
    repository: Path | None = None
    """A model repository to be served meanwhile; the shipped demonstration model where both are None."""
    timeout: float = 300.0
    """Seconds for the answer to a request."""
    use_proxy: bool = False
    """Obey ``http_proxy``."""

    def __post_init__(self) -> None:
        if self.address is not None and self.repository is not None:
            raise ValueError(
                "--server and --repository exclude each other: the first is for a server that runs already"
            )
        if self.address is not None and not re.fullmatch(r"[^\s/]+:\d{1,5}", self.address):
            raise ValueError(f"--server must be HOST:PORT of the server's gRPC end, not {self.address!r}")
        if self.timeout <= 0:
            raise ValueError(f"--timeout must be positive, not {self.timeout:g}")

    @contextmanager
    def connect(self, in_flight: int, reporter: Reporter) -> Iterator[StainClient]:
        """A client of it; a server of our own runs inside the context."""
        if self.address is not None:
            with self._client(self.address, in_flight) as client:
                yield client
            return
        # The server's packages are needed only here: a client of a remote server does without.
        from staindiffuser.serving.demo import demo_repository
        from staindiffuser.serving.server import TritonServer

        if self.repository is None:
            reporter.say("serving the demonstration model, which was made for trying the software only")
        with (
            TritonServer(self.repository or demo_repository(reporter.say)) as server,
            self._client(server.url, in_flight) as client,
        ):
            yield client

    def _client(self, address: str, in_flight: int) -> StainClient:
        return StainClient(address, in_flight=in_flight, deadline=self.timeout, use_proxy=self.use_proxy)


def run_command(
    inputs: Sequence[Path], output: Path | None, server: Server, options: StainingOptions, *, as_json: bool = False
) -> int:
    """Stain every input; say on stderr what happens.

    Returns:
        The exit code: 0, or 1 where some slides failed and others did not.

    Raises:
        StainDiffuserError: the only input failed, all of them failed, or the server did.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own lines on stderr repeat what the error says
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # so do tifffile's
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    reporter = TerminalReporter()
    places = outputs_for(inputs, output)
    failures: dict[Path, StainDiffuserError] = {}
    _check_places(places, options)
    for path in inputs:  # before a server is started in vain
        try:
            with open_slide(path) as slide:
                slide.pixel_size(options.mpp)
        except InputError as error:
            failures[path] = error
    if len(failures) < len(inputs):
        with server.connect(options.in_flight, reporter) as client:
            client.contract.select(options.stains)
            _stain_all(
                [path for path in inputs if path not in failures], places, client, options, reporter, failures, as_json
            )
    if len(failures) == len(inputs):
        if len(inputs) > 1:
            for failure in list(failures.values())[:-1]:
                reporter.say(f"error: {failure}")
        raise failures[inputs[-1]]
    for failure in failures.values():
        reporter.say(f"error: {failure}")
    return EXIT_SOME_FAILED if failures else 0


def outputs_for(inputs: Sequence[Path], output: Path | None) -> dict[Path, Path]:
    """The result folder of each input.

    Raises:
        UsageError: an input is named twice, or two of them would share a folder.
    """
    if len(set(inputs)) < len(inputs):
        raise UsageError("an input is named twice")
    if len(inputs) == 1:
        return {inputs[0]: output if output is not None else default_output(inputs[0])}
    places = {path: (output or Path()) / default_output(path).name for path in inputs}
    if len(set(places.values())) < len(places):
        raise UsageError("two inputs have the same name and would share a folder: stain them one by one with --output")
    return places


def default_output(path: Path) -> Path:
    """``./<slide>-stained``: the name without ``.svs``, ``.ome.tif`` and the like."""
    stem = re.sub(r"(\.ome)?\.[A-Za-z0-9]{1,5}$", "", path.name) or path.name
    return Path(f"{stem}-stained")


def _stain_all(
    inputs: Sequence[Path],
    places: dict[Path, Path],
    client: Stainer,
    options: StainingOptions,
    reporter: Reporter,
    failures: dict[Path, StainDiffuserError],
    as_json: bool,
) -> None:
    for path in inputs:
        try:
            run = stain_slide(path, places[path], client, options, reporter)
        except (InputError, OutputError) as error:  # a lost server would fail for the others too
            failures[path] = error
            continue
        if as_json:
            sys.stdout.write(json.dumps({**run, "output": str(places[path])}, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        reporter.say(f"{places[path]}: {', '.join(run['outputs'])} · {run['seconds']['total']:.1f} s · {run['notice']}")


def _check_places(places: dict[Path, Path], options: StainingOptions) -> None:
    """Refuse an output that cannot be written before any work is done; trying leaves nothing behind."""
    for place in places.values():
        if options.resume and (place / RUN_JSON).exists():
            continue
        with ResultFolder(place, overwrite=options.overwrite or options.resume):
            pass


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the work as Ctrl-C does: temporary files and a server of our own do not outlive it."""
    raise SystemExit(128 + number)
