"""Several models behind one proxy, and the change from one version to another without losing a request.

Servers behind the proxy belong to *pools*; all servers of a pool serve the same: one version of one model, or
of several, the first of which the pool stands for. A map file,
``routes.map``, tells HAProxy which pool a request goes to, by its headers:

- ``x-staindiffuser-version``: the version that the client has found when it connected. A slide that was begun with one
  version goes on with it, whatever is promoted meanwhile.
- ``x-staindiffuser-model``: the model that the client asks for by name, where it does not have a version yet.
- neither: the pool ``current``.

To promote is to change the map, in the running process through its socket and in the file for its next start.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from staindiffuser.errors import InputError, UsageError
from staindiffuser.export.wire import ENSEMBLE
from staindiffuser.serving.errors import ServerStartError
from staindiffuser.serving.model_links import MODELS

__all__ = ["CURRENT", "POOLS", "ROUTES", "SOCKET", "Promotion", "promote", "rollback", "write_pools"]

ROUTES, POOLS, SOCKET, HISTORY = "routes.map", "pools.json", "admin.sock", "promotions.jsonl"
"""Files in the proxy's folder."""
CURRENT = "current"
_PROBE_SECONDS = 120.0
_KINDS = ("STAIN", "CELLS")


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A pool that became the one for its model."""

    model_name: str
    model_version: str
    pool: str
    previous: str
    """The pool that it took over from; the same if there was none."""
    live: bool
    """False if the proxy was not running: it will read the map when it starts."""


@dataclass(frozen=True, kw_only=True)
class _Served:
    """A model that a server says it serves."""

    model_name: str
    model_version: str
    number: str
    """Of the ensemble's version, which clients name in their requests."""


def write_pools(folder: Path, pools: Mapping[str, Sequence[str]]) -> None:
    """Write the pools' addresses, and the map where there is none; routes to pools that are gone are dropped.

    Args:
        folder: the proxy's.
        pools: ``HOST:GRPC_PORT`` of each server, by pool; the first pool is the current one until one is promoted.

    Raises:
        OSError: the folder cannot be written.
    """
    _write(folder / POOLS, json.dumps(pools, indent=1))
    routes = {key: pool for key, pool in _routes(folder).items() if pool in pools}
    _write_routes(folder, {CURRENT: next(iter(pools)), **routes})


def promote(folder: Path, pool: str) -> Promotion:
    """Send new work for a pool's models to that pool; slides that were begun elsewhere go on there.

    Args:
        folder: the proxy's, where :func:`staindiffuser.serving.proxy.write_proxy` has written.
        pool: of servers that all answer, with the same version.

    Raises:
        UsageError: the folder or the pool does not exist, or cannot be written.
        ServerStartError: a server of the pool does not answer a probe tile, or they do not serve the same.
    """
    pools = _pools(folder)
    if pool not in pools:
        raise UsageError(f"{folder} has no pool {pool}: it has {', '.join(pools)}")
    served = _examine(pools[pool])
    new = served[0]
    routes = _routes(folder)
    previous = routes.get(f"model/{new.model_name}", routes[CURRENT])
    changes: dict[str, str] = {}
    old = None
    with contextlib.suppress(ServerStartError):  # it may be gone, which is a reason to promote another
        before = _examine(pools[previous])
        old = before[0]
        for model in before:
            changes |= {f"version/{model.number}": previous, f"model/{model.model_name}": previous}
    if previous == routes[CURRENT] and (old is None or old.model_name == new.model_name):
        changes[CURRENT] = pool
    if old is not None and old.model_name != new.model_name:
        previous = pool  # the first of its model
    for model in served:
        changes |= {f"version/{model.number}": pool, f"model/{model.model_name}": pool}
    live = _apply(folder, routes, changes)
    promotion = Promotion(
        model_name=new.model_name, model_version=new.model_version, pool=pool, previous=previous, live=live
    )
    _record(folder, promotion)
    return promotion


def rollback(folder: Path, model_name: str = "") -> Promotion:
    """Promote the pool that the last promotion has replaced.

    Args:
        folder: the proxy's.
        model_name: of that model; by default of the one promoted last.

    Raises:
        UsageError: nothing has been promoted.
        ServerStartError: see :func:`promote`.
    """
    try:
        lines = (folder / HISTORY).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    past = [entry for entry in map(json.loads, lines) if model_name in ("", entry["model_name"])]
    if not past:
        raise UsageError(f"{folder}: nothing{f' of {model_name}' if model_name else ''} has been promoted yet")
    return promote(folder, past[-1]["previous"])


def _examine(addresses: Sequence[str]) -> list[_Served]:
    """Ask every server of a pool for a probe tile of every model."""
    found = {address: _probe_all(address) for address in addresses}
    first = next(iter(found.values()))
    for address, served in found.items():
        if served != first:
            raise ServerStartError(
                f"{address} serves {_text(served)}, but {addresses[0]} {_text(first)}: a pool serves one version"
            )
    return first


def _text(served: Sequence[_Served]) -> str:
    return ", ".join(f"{model.model_name} {model.model_version[:12]}" for model in served)


def _probe_all(address: str) -> list[_Served]:
    import tritonclient.grpc as triton

    try:
        with triton.InferenceServerClient(address, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
            parameters = client.get_model_config(ENSEMBLE, client_timeout=10).config.parameters
            offered = json.loads(parameters[MODELS].string_value or "[]")
            return [_probe(client, name) for name in [model["ensemble"] for model in offered] or [ENSEMBLE]]
    except (triton.InferenceServerException, KeyError, ValueError) as error:
        raise ServerStartError(f"{address} did not answer a probe tile: {' '.join(str(error).split())}") from error


def _probe(client: Any, ensemble: str) -> _Served:
    import tritonclient.grpc as triton

    config: Any = client.get_model_config(ensemble, client_timeout=10).config
    told = {name: value.string_value for name, value in config.parameters.items()}
    number = max(client.get_model_metadata(ensemble, client_timeout=10).versions, key=int)
    side = int(told["tile"])
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "HE": np.full((1, side, side, 3), 243, np.uint8),
        "ORIGIN": np.zeros((1, 2), np.int64),
        "SEED": np.zeros((1, 1), np.int64),
    }
    inputs = []
    for name, array in arrays.items():
        dtype = "UINT8" if array.dtype == np.uint8 else "INT64"
        inputs.append(triton.InferInput(name, list(array.shape), dtype).set_data_from_numpy(array))
    names = [f"{kind}_{stain['name'].upper()}" for stain in json.loads(told["stains"]) for kind in _KINDS]
    outputs = [triton.InferRequestedOutput(name) for name in names]
    client.infer(ensemble, inputs, model_version=number, outputs=outputs, client_timeout=_PROBE_SECONDS)
    return _Served(model_name=told["model_name"], model_version=told["model_version"], number=number)


def _apply(folder: Path, routes: Mapping[str, str], changes: Mapping[str, str]) -> bool:
    """Change the map: first what names a version, so that no slide that was begun is ever without its pool."""
    ordered = dict(sorted(changes.items(), key=lambda item: -item[0].startswith("version/")))
    _write_routes(folder, {**routes, **ordered})
    path = (folder / ROUTES).resolve()
    try:
        for key, pool in ordered.items():
            # The value that is there, or a new entry; HAProxy answers nothing if all is well.
            verb = "set" if key in routes else "add"
            said = _command(folder, f"{verb} map {path} {key} {pool}")
            if said:
                raise UsageError(f"HAProxy refuses the change of {path}: {said}; reload it (SIGUSR2) to read the file")
    except OSError:
        return False
    return True


def _command(folder: Path, text: str) -> str:
    """Run a command on HAProxy's socket; returns what it says."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(folder.resolve() / SOCKET))
        connection.sendall(f"{text}\n".encode())
        answer = b""
        while part := connection.recv(4096):
            answer += part
    return answer.decode().strip()


def _pools(folder: Path) -> dict[str, list[str]]:
    try:
        pools: dict[str, list[str]] = json.loads((folder / POOLS).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{folder} is not a proxy's folder: write one with `staindiffuser proxy`") from error
    except ValueError as error:
        raise InputError(f"{folder / POOLS} is damaged: write it again with `staindiffuser proxy`") from error
    return pools


def _routes(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / ROUTES).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    return dict(line.split(maxsplit=1) for line in lines)


def _write_routes(folder: Path, routes: Mapping[str, str]) -> None:
    try:
        _write(folder / ROUTES, "".join(f"{key} {pool}\n" for key, pool in routes.items()))
    except OSError as error:
        raise UsageError(f"{folder / ROUTES} cannot be written: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _record(folder: Path, promotion: Promotion) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    entry = {"time": now, **promotion.__dict__}
    try:
        with (folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UsageError(f"{folder / HISTORY} cannot be written: {error.strerror}") from error
