"""The proxy in front of Triton on a network: an HAProxy configuration with TLS, client authentication and limits.

Triton's own front end stays on loopback. HAProxy lets through only the calls that clients need, for the ensembles that
are served (``grpc_guard.lua``), counts requests per client, spreads them over the servers that are healthy, and writes
an access log with request ids and without payload.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from staindiffuser.errors import UsageError
from staindiffuser.export.wire import ENSEMBLE
from staindiffuser.serving import rollout

__all__ = ["CALLS", "ProxyOptions", "ProxyServer", "write_proxy"]

CALLS = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelInfer")
"""Calls of the inference protocol that clients may make."""
INFER = "/inference.GRPCInferenceService/ModelInfer"
_GUARD = Path(__file__).with_name("grpc_guard.lua")


@dataclass(frozen=True, kw_only=True)
class ProxyServer:
    """One Triton server behind the proxy."""

    pool: str = "main"
    """Servers of one pool serve the same version of the same model, or the same versions of several."""
    host: str
    grpc_port: int
    metrics_port: int

    @classmethod
    def parse(cls, text: str) -> ProxyServer:
        """Read ``[POOL@]HOST:GRPC_PORT:METRICS_PORT``.

        Raises:
            UsageError: it is something else.
        """
        match = re.fullmatch(r"(?:([a-z][a-z0-9-]*)@)?([A-Za-z0-9.-]+):(\d{1,5}):(\d{1,5})", text)
        if not match:
            raise UsageError(
                f"--server {text}: must be HOST:GRPC_PORT:METRICS_PORT, such as 127.0.0.1:8001:8002, with POOL@ before "
                "it where there are several pools"
            )
        return cls(pool=match[1] or "main", host=match[2], grpc_port=int(match[3]), metrics_port=int(match[4]))


@dataclass(frozen=True, kw_only=True)
class ProxyOptions:
    """What the proxy listens to, and whom it serves."""

    listen: str
    """``ADDRESS:PORT`` for gRPC with TLS."""
    metrics_listen: str = ""
    """``ADDRESS:PORT`` for Prometheus with TLS; empty for none."""
    health_listen: str = ""
    """``ADDRESS:PORT`` that answers ``/healthz`` without TLS: 200 while a server is healthy; empty for none."""
    servers: tuple[ProxyServer, ...]
    certificate: Path
    """PEM: the proxy's certificate with its chain, and its key."""
    client_ca: Path | None = None
    """PEM: the authority whose client certificates are accepted."""
    tokens: Path | None = None
    """Lines ``TOKEN NAME``: a client sends the header ``authorization: Bearer TOKEN``; the log calls it NAME."""
    requests_per_10s: int = 2000
    """Calls of one client in ten seconds; more are refused."""
    in_flight: int = 256
    """Requests at a time to one server; further ones wait here, and hold up all others of their connection: HAProxy
    before 3.1 reads no further where a body finds no room. So it is more than a server takes into its own queues, which
    refuse at once what is too much."""
    max_message: int = 64 << 20
    """Largest request, bytes."""

    @property
    def pools(self) -> dict[str, list[ProxyServer]]:
        """The servers by pool."""
        pools: dict[str, list[ProxyServer]] = {}
        for server in self.servers:
            pools.setdefault(server.pool, []).append(server)
        return pools

    def __post_init__(self) -> None:
        for option, address in (
            ("--listen", self.listen),
            ("--metrics-listen", self.metrics_listen),
            ("--health-listen", self.health_listen),
        ):
            if address and not re.fullmatch(r"[A-Za-z0-9.*\[\]:-]*:\d{1,5}", address):
                raise UsageError(f"{option} {address}: must be ADDRESS:PORT, such as 0.0.0.0:8443")
        if not self.servers:
            raise UsageError("--server: name at least one")
        if self.client_ca is None and self.tokens is None:
            raise UsageError("nobody could be told apart: give --client-ca, --tokens or both")
        for path in (self.certificate, self.client_ca, self.tokens):
            if path is not None and (not path.is_file() or re.search(r"\s", str(path))):
                raise UsageError(f"{path} is not a file, or its path contains a space")
        for option, number in (
            ("--requests-per-10s", self.requests_per_10s),
            ("--in-flight", self.in_flight),
            ("--max-message", self.max_message),
        ):
            if number < 1:
                raise UsageError(f"{option} {number}: must be at least 1")


def write_proxy(options: ProxyOptions, folder: Path) -> Path:
    """Write ``haproxy.cfg``, ``grpc_guard.lua`` and which pool serves what (see :mod:`~staindiffuser.serving.rollout`).

    Written again into the same folder, it keeps what was promoted.

    Returns:
        The configuration; run it with ``haproxy -W -f``.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        guard = folder.resolve() / _GUARD.name
        shutil.copyfile(_GUARD, guard)
        configuration = folder / "haproxy.cfg"
        configuration.write_text(_configuration(options, guard), encoding="utf-8")
        addresses = {name: [f"{s.host}:{s.grpc_port}" for s in pool] for name, pool in options.pools.items()}
        rollout.write_pools(folder, addresses)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from error
    return configuration


def _configuration(options: ProxyOptions, guard: Path) -> str:
    certificate = options.certificate.absolute()  # a link stays one: Kubernetes renews what it points to
    parts = [
        _GLOBAL.format(guard=guard, socket=guard.with_name(rollout.SOCKET)),
        _DEFAULTS,
        _grpc_frontend(options, certificate, guard.with_name(rollout.ROUTES)),
        *(_backend(name, pool, options.in_flight) for name, pool in options.pools.items()),
    ]
    if options.metrics_listen:
        parts.append(_metrics(options, certificate))
    if options.health_listen:
        parts.append(_health(options))
    return "\n".join(parts)


def _tls(options: ProxyOptions, certificate: Path) -> str:
    """TLS options of a listener: a client certificate is required, unless a token may stand for it."""
    text = f"ssl crt {certificate}"
    if options.client_ca is not None:
        verify = "required" if options.tokens is None else "optional"
        text += f" ca-file {options.client_ca.absolute()} verify {verify}"
    return text


def _who(options: ProxyOptions) -> list[str]:
    """Rules that set txn.client to the name of a known client."""
    rules = []
    if options.tokens is not None:
        token = f"req.hdr(authorization),word(2,' '),map_str({options.tokens.absolute()})"
        rules.append(f'http-request set-var(txn.client) {token} if {{ req.hdr(authorization) -m beg "Bearer " }}')
        rules.append("http-request del-header authorization")
    if options.client_ca is not None:
        rules.append("http-request set-var(txn.client) ssl_c_s_dn(CN) if { ssl_c_used }")
    return rules


def _refuse(status: int, message: str, condition: str) -> str:
    """A rule that answers with a gRPC status."""
    return f'http-request return status 200 hdr "grpc-status" "{status}" hdr "grpc-message" "{message}" if {condition}'


def _route(routes: Path) -> list[str]:
    """Rules that set txn.pool: by the version of a slide that was begun, else by the model's name, else the current."""
    table = f"map_str({routes})"
    return [
        "http-request set-var(txn.version) req.hdr(x-staindiffuser-version)",
        "http-request set-var(txn.model) req.hdr(x-staindiffuser-model)",
        f"http-request set-var(txn.pool) str(version/),concat(,txn.version),{table}",
        f"http-request set-var(txn.pool) str(model/),concat(,txn.model),{table} if !{{ var(txn.pool) -m found }}",
        _refuse(5, "no such model", "!{ var(txn.pool) -m found } { var(txn.model) -m found }"),
        f"http-request set-var(txn.pool) str({rollout.CURRENT}),{table} if !{{ var(txn.pool) -m found }}",
    ]


def _grpc_frontend(options: ProxyOptions, certificate: Path, routes: Path) -> str:
    calls = " ".join(f"/inference.GRPCInferenceService/{call}" for call in CALLS)
    rules = [
        f"bind {options.listen} {_tls(options, certificate)} alpn h2",
        "unique-id-format %[uuid()]",
        "unique-id-header x-request-id",
        # The id under which Triton logs the request, and its trace; the header goes on to Triton (W3C's traceparent).
        "http-request set-var(txn.request) req.hdr(x-staindiffuser-request) "
        "if { req.hdr(x-staindiffuser-request) -m reg ^[0-9a-f]{16}$ }",
        "http-request set-var(txn.trace) req.hdr(traceparent),field(2,-) "
        "if { req.hdr(traceparent) -m reg ^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$ }",
        *_who(options),
        _refuse(16, "a client certificate or a token is needed", "!{ var(txn.client) -m found }"),
        _refuse(12, "this call is not offered", f"!{{ path {calls} }}"),
        "stick-table type string len 128 size 100k expire 10m store http_req_rate(10s)",
        "http-request track-sc0 var(txn.client)",
        # Urgent requests also leave this proxy's queue first (RFC 9218: urgency 0 to 7, 3 by default).
        "http-request set-priority-class int(-1) if { req.hdr(priority) -m beg u=1 }",
        # And before both what is answered at once: a client waits seconds for it, and not for others' tiles.
        f"http-request set-priority-class int(-2) if !{{ path {INFER} }}",
        _refuse(8, "too many requests: slow down", f"{{ sc_http_req_rate(0) gt {options.requests_per_10s} }}"),
        *_route(routes),
        f"filter lua.grpc_guard {ENSEMBLE} {options.max_message}",
        'log-format "time=%tr client=%{+Q}[var(txn.client)] address=%ci id=%ID request=%[var(txn.request)] '
        "trace=%[var(txn.trace)] call=%[capture.req.uri] http=%ST "
        'received=%U sent=%B queue_ms=%Tw total_ms=%Ta server=%b/%s end=%tsc"',
        "use_backend %[var(txn.pool)]",
        f"default_backend {next(iter(options.pools))}",
    ]
    return _section("frontend grpc", rules)


def _backend(name: str, servers: Sequence[ProxyServer], in_flight: int) -> str:
    rules = [
        "balance leastconn",
        "retries 3",
        "option redispatch",
        "retry-on conn-failure",
        # A server is healthy while its metrics list the ensemble. gRPC's own check needs bytes that no check can send.
        "option httpchk",
        "http-check send meth GET uri /metrics ver HTTP/1.1 hdr host triton",
        f"http-check expect rstring nv_inference_request_success.model=.{ENSEMBLE}.",
    ]
    rules += [
        f"server triton{number} {server.host}:{server.grpc_port} proto h2 maxconn {in_flight} "
        f"check port {server.metrics_port} check-proto h1 inter 1s fall 2 rise 1 observe layer4 error-limit 5 "
        "on-error mark-down"
        for number, server in enumerate(servers)
    ]
    return _section(f"backend {name}", rules)


def _metrics(options: ProxyOptions, certificate: Path) -> str:
    rules = [
        f"bind {options.metrics_listen} {_tls(options, certificate)} alpn http/1.1",
        *_who(options),
        "http-request deny deny_status 401 unless { var(txn.client) -m found }",
        "http-request deny deny_status 404 unless { path /metrics } METH_GET",
    ]
    front = _section("frontend metrics", [*rules, "default_backend metrics"])
    servers = [
        f"server triton{number} {server.host}:{server.metrics_port} check inter 5s"
        for number, server in enumerate(options.servers)
    ]
    return f"{front}\n{_section('backend metrics', servers)}"


def _health(options: ProxyOptions) -> str:
    none = " ".join(f"{{ nbsrv({pool}) lt 1 }}" for pool in options.pools)
    rules = [f"bind {options.health_listen}", "monitor-uri /healthz", f"monitor fail if {none}"]
    return _section("frontend health", [*rules, "http-request deny deny_status 404"])


def _section(title: str, rules: Sequence[str]) -> str:
    return "\n".join([title, *(f"    {rule}" for rule in rules), ""])


_GLOBAL = """\
# Written by `staindiffuser proxy`. Run it with: haproxy -W -f haproxy.cfg
# After a certificate has been replaced: haproxy -c -f haproxy.cfg, then kill -USR2 to the master.
global
    log stdout format raw local0 info
    maxconn 1000
    # For `staindiffuser promote`; it belongs to the user who runs HAProxy.
    stats socket {socket} mode 600 level admin
    noreuseport
    # After a reload the old process finishes its requests, the longest of which may take `timeout server`.
    hard-stop-after 340s
    # One Lua state a thread: with one for all, several threads end the process (haproxy/haproxy#2467, mended in 2024).
    lua-load-per-thread {guard}
    ssl-default-bind-options ssl-min-ver TLSv1.2
    ssl-default-bind-ciphers ECDHE+AESGCM:ECDHE+CHACHA20
    tune.h2.max-concurrent-streams 64
    # Tiles are megabytes: with 16 kB at a time, the proxy costs a tenth of the throughput, with these a twenty-fifth.
    tune.bufsize 65536
    tune.h2.max-frame-size 65536
    tune.h2.initial-window-size 1048576
"""
_DEFAULTS = """\
defaults
    mode http
    log global
    # Half a request: headers must be complete in 10 s, and a body that makes no progress for 60 s is given up.
    timeout http-request 10s
    timeout connect 5s
    timeout client 60s
    timeout queue 30s
    timeout server 330s
    timeout http-keep-alive 330s
    timeout check 5s
"""
