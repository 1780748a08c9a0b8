"""``staindiffuser serve``: start the embedded server and watch it until it is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["serve"]


def serve(
    repository: Annotated[
        Path | None,
        typer.Argument(help="Model repository from `export build`; the demonstration model by default."),
    ] = None,
    grpc_port: Annotated[int, typer.Option(help="gRPC port on 127.0.0.1; 0: a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics port on 127.0.0.1; 0: a free one.")] = 8002,
    threads: Annotated[int | None, typer.Option(help="Threads of each CPU engine; 0: all cores.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Refuse engines that do not come from this checkpoint.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Append Triton's log to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready line as one JSON object.")] = False,
) -> None:
    """Serve a model repository on this machine, gRPC on loopback only, until SIGTERM (exit 0) or Ctrl-C (130).

    Example: staindiffuser serve models --grpc-port 8001
    """
    import json
    import signal
    from types import FrameType

    from staindiffuser.errors import EXIT_INTERRUPTED
    from staindiffuser.serving.demo import demo_repository
    from staindiffuser.serving.server import TritonServer

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        chosen = repository or demo_repository(lambda message: typer.echo(message, err=True))
        server = TritonServer(
            chosen,
            grpc_port=grpc_port or None,
            metrics_port=metrics_port or None,
            log=log,
            threads=threads,
            checkpoint=checkpoint,
        )
        with server:
            manifest = server.manifest
            if as_json:
                ready = {
                    "ready": True,
                    "grpc": server.url,
                    "metrics": server.metrics_url,
                    "pid": server.pid,
                    "model_name": manifest.model_name,
                    "model_version": manifest.model_version,
                    "notice": manifest.notice,
                    "stains": [stain.name for stain in manifest.stains],
                    "tile": manifest.tile,
                    "steps": manifest.steps,
                    "max_batch": manifest.max_batch,
                    "target": manifest.target,
                }
                typer.echo(json.dumps(ready, ensure_ascii=False))
            else:
                stains = ", ".join(stain.label for stain in manifest.stains)
                typer.echo(
                    f"ready: {server.url} serves {stains} of model {manifest.model_name} "
                    f"({manifest.model_version[:12]}), tiles of {manifest.tile} px, batches up to {manifest.max_batch}"
                )
                typer.echo(f"metrics: {server.metrics_url}")
                typer.echo(manifest.notice)
            while True:
                server.wait(3600)
    except _Stop as signalled:
        typer.echo("stopped", err=True)
        if signalled.number == signal.SIGINT:
            raise typer.Exit(EXIT_INTERRUPTED) from None


class _Stop(BaseException):
    """A signal to stop; not an Exception, so that no handler of errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
