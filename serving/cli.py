"""The commands ``serve`` (start the embedded server and watch it until it is stopped), ``doctor`` and ``proxy``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from staindiffuser.files import check_file

if TYPE_CHECKING:
    from staindiffuser.serving.model_links import ServedModel
    from staindiffuser.serving.rollout import Promotion
    from staindiffuser.serving.server import TritonServer

__all__ = ["doctor", "promote", "proxy", "rollback", "serve"]


def serve(
    repositories: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[REPO]...",
            help="Model repositories from `export build`, or names of shipped models; `demo` by default. Of several, "
            "clients choose one (`stain --model`).",
        ),
    ] = None,
    grpc_port: Annotated[int, typer.Option(help="gRPC port on 127.0.0.1; 0: a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics port on 127.0.0.1; 0: a free one.")] = 8002,
    fast: Annotated[
        bool | None,
        typer.Option(
            "--fast/--exact",
            help="A model that ships: the fastest engines of this CPU, measured once (default), or float32, whose "
            "pixels are the same on every machine, give or take one grey level.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each CPU engine; 0: all cores.")] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            help="Refuse engines that do not come from this checkpoint. With several repositories, one for each, in "
            "their order."
        ),
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Append Triton's log to this file.")] = None,
    restarts: Annotated[int, typer.Option(min=0, help="Restarts in a row after crashes before giving up.")] = 5,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that SIGTERM leaves for the requests in progress.")
    ] = 30.0,
    audit: Annotated[
        Path | None, typer.Option(help="Append starts, failures, crashes, restarts and stops to this file.")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(callback=check_file, help="Append one line of JSON per request to this file: id, size, status."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready line as one JSON object.")] = False,
) -> None:
    """Serve model repositories on this machine, gRPC on loopback only, until SIGTERM (exit 0) or Ctrl-C (130).

    SIGTERM drains: requests in progress finish, new ones are refused as unavailable. A crash is followed by a restart.

    Examples:

    staindiffuser serve models --grpc-port 8001

    staindiffuser serve demo colon
    """
    import signal
    from types import FrameType

    from staindiffuser.errors import EXIT_INTERRUPTED, StainDiffuserError
    from staindiffuser.serving import systemd
    from staindiffuser.serving.audit import AuditLog
    from staindiffuser.serving.demo import repository_of
    from staindiffuser.serving.server import TritonServer
    from staindiffuser.serving.watch import keep_running

    def say(message: str) -> None:
        typer.echo(message, err=True)

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    log_book = AuditLog(audit, say)
    try:
        asked: list[Path | None] = list(repositories) if repositories else [None]
        chosen = [repository_of(repository, say, fast=fast) for repository in asked]
        log_book.record("start", repositories=[str(path.absolute()) for path in chosen], grpc_port=grpc_port)
        server = TritonServer(
            *chosen,
            grpc_port=grpc_port or None,
            metrics_port=metrics_port or None,
            log=log,
            threads=threads,
            checkpoints=checkpoint or (),
            requests=requests,
        )
        with server:
            try:
                ready = _ready(server)
                log_book.record("ready", **ready, server_id=server.identity)
                typer.echo(json.dumps(ready, ensure_ascii=False) if as_json else _ready_text(server))
                systemd.notify("READY=1")
                keep_running(server, restarts=restarts, audit=log_book, say=say)
            except _Stop as signalled:
                systemd.notify("STOPPING=1")
                if signalled.number == signal.SIGTERM:
                    log_book.record("drained", complete=server.drain(drain_timeout))
                raise
    except StainDiffuserError as error:
        log_book.record("failed", reason=str(error), exit_code=error.exit_code)
        raise
    except _Stop as signalled:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # what is left takes a moment
        log_book.record("stop", signal=signal.Signals(signalled.number).name)
        say("stopped")
        if signalled.number == signal.SIGINT:
            raise typer.Exit(EXIT_INTERRUPTED) from None


def doctor(
    repositories: Annotated[
        list[Path] | None, typer.Argument(metavar="[REPO]...", help="Model repositories to verify as well.")
    ] = None,
    grpc_port: Annotated[int, typer.Option(help="Port that `serve` is to use.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Metrics port that `serve` is to use.")] = 8002,
    certificate: Annotated[
        list[Path] | None, typer.Option(help="PEM certificate whose dates are checked. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Report what this machine can run: processor, GPU, targets, Triton, memory, ports, repositories, certificates.

    Ends with 0, or with the exit code of the first problem.

    Example: staindiffuser doctor models --certificate server.pem
    """
    from dataclasses import asdict

    from staindiffuser.serving.doctor import examine

    findings = []
    ports = [(grpc_port, "--grpc-port"), (metrics_port, "--metrics-port")]
    for finding in examine(repositories=repositories or (), ports=ports, certificates=certificate or ()):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{finding.status:8} {finding.name}: {finding.detail}")
    if as_json:
        typer.echo(json.dumps({"findings": [asdict(finding) for finding in findings]}, ensure_ascii=False))
    problems = [finding.exit_code for finding in findings if finding.status == "problem"]
    if problems:
        raise typer.Exit(problems[0])


def proxy(
    certificate: Annotated[Path, typer.Option(help="PEM file: the proxy's certificate, its chain, and its key.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for haproxy.cfg and grpc_guard.lua.")],
    server: Annotated[
        list[str] | None, typer.Option(help="[POOL@]HOST:GRPC_PORT:METRICS_PORT of a Triton server. Repeatable.")
    ] = None,
    listen: Annotated[str, typer.Option(help="ADDRESS:PORT for clients.")] = "0.0.0.0:8443",
    metrics_listen: Annotated[str, typer.Option(help="ADDRESS:PORT for Prometheus; none by default.")] = "",
    health_listen: Annotated[
        str, typer.Option(help="ADDRESS:PORT that answers /healthz without TLS, for probes; none by default.")
    ] = "",
    client_ca: Annotated[
        Path | None, typer.Option(help="PEM file: the authority whose client certificates are accepted.")
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="File of accepted tokens: lines `TOKEN NAME`.")] = None,
    requests_per_10s: Annotated[int, typer.Option(help="Calls that one client may make in ten seconds.")] = 2000,
    in_flight: Annotated[
        int, typer.Option(help="Requests at a time to one server; more than fit into its own queues.")
    ] = 256,
    max_message: Annotated[int, typer.Option(help="Largest request, bytes.")] = 64 << 20,
) -> None:
    """Write an HAProxy configuration that offers Triton on a network: TLS, known clients only, limits, access log.

    Example: staindiffuser proxy --certificate server.pem --client-ca clients.pem --output proxy
    """
    from staindiffuser.serving.proxy import ProxyOptions, ProxyServer, write_proxy

    options = ProxyOptions(
        listen=listen,
        metrics_listen=metrics_listen,
        health_listen=health_listen,
        servers=tuple(ProxyServer.parse(text) for text in server or ["127.0.0.1:8001:8002"]),
        certificate=certificate,
        client_ca=client_ca,
        tokens=tokens,
        requests_per_10s=requests_per_10s,
        in_flight=in_flight,
        max_message=max_message,
    )
    configuration = write_proxy(options, output)
    typer.echo(f"{configuration}: written; next: haproxy -W -f {configuration}")


FolderArgument = Annotated[Path, typer.Argument(metavar="PROXY", help="The folder that `proxy` wrote.")]


def promote(
    folder: FolderArgument,
    pool: Annotated[str, typer.Argument(help="Pool whose model is to take all new work.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Send new slides to another pool of servers behind the proxy; slides that were begun go on where they are.

    Example: staindiffuser promote proxy green
    """
    from staindiffuser.serving import rollout

    _say_promoted(rollout.promote(folder, pool), as_json)


def rollback(
    folder: FolderArgument,
    model: Annotated[str, typer.Option(help="Of this model; by default of the one promoted last.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Take the last `promote` back.

    Example: staindiffuser rollback proxy
    """
    from staindiffuser.serving import rollout

    _say_promoted(rollout.rollback(folder, model), as_json)


def _say_promoted(promotion: Promotion, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        typer.echo(json.dumps(asdict(promotion), ensure_ascii=False))
        return
    when = "new slides go there" if promotion.live else "from the proxy's next start: it is not running"
    typer.echo(f"{promotion.model_name} {promotion.model_version[:12]} of pool {promotion.pool}: {when}")


def _ready(server: TritonServer) -> dict[str, Any]:
    manifest = server.manifest
    return {
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
        "models": [
            {
                "name": model.manifest.model_name,
                "version": model.manifest.model_version,
                "ensemble": model.ensemble,
                "stains": [stain.name for stain in model.manifest.stains],
            }
            for model in server.models
        ],
    }


def _ready_text(server: TritonServer) -> str:
    served = "\nand ".join(_model_text(model) for model in server.models)
    notices = dict.fromkeys(model.manifest.notice for model in server.models)
    return "\n".join([f"ready: {server.url} serves {served}", f"metrics: {server.metrics_url}", *notices])


def _model_text(model: ServedModel) -> str:
    manifest = model.manifest
    stains = ", ".join(stain.label for stain in manifest.stains)
    return (
        f"{stains} of model {manifest.model_name} ({manifest.model_version[:12]}), tiles of {manifest.tile} px, "
        f"batches up to {manifest.max_batch}"
    )


class _Stop(BaseException):
    """A signal to stop; not an Exception, so that no handler of errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
