"""How the rate grows with the number of servers, simulated from service times that were measured, and what stops it.

A tile passes through the client's processor, the network, a server, the network, and the client's processor again. Each
of these is a queue with as many places as there are processors, links or servers; requests wait in the order in which
they come, and a server has at most a few of them at a time. Two ways to use many servers: one client that spreads one
slide over all of them, and a client beside every server, each with slides of its own (as a cluster of Ray's runs them),
where all share one link to the storage.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Place", "Scale", "Workload", "simulate"]

SERVER_COUNTS = (1, 2, 4, 8, 16, 32, 64)
TILES_PER_SERVER = 200
"""Simulated; the first and last tenth of the time, in which queues fill and empty, weigh little then."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Service times and sizes of one tile, measured; and what the machines have."""

    server_ms: float
    """Of one server, with requests waiting: `bench serving` gives tiles a second."""
    client_ms: float
    """Processor time of the client: `bench slide` gives it per slide."""
    client_cores: int = 2
    request_bytes: int
    response_bytes: int
    storage_bytes: int
    """Read of the slide, and written of the results."""
    network_gbit: float = 10.0
    """Of the client's link; of the storage's, where clients share it."""
    in_flight: int = 4
    """Requests of a client to one server at a time."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What so many servers do."""

    servers: int
    tiles_per_second: float
    bottleneck: str
    """The place that is busy for most of the time."""
    busy: float
    """For which share of it."""


@dataclass
class Place:
    """A queue, and who serves it."""

    name: str
    capacity: int = 1
    running: int = 0
    spent: float = 0.0
    waiting: deque[int] = field(default_factory=deque)


def simulate(workload: Workload, *, shared_client: bool, counts: Sequence[int] = SERVER_COUNTS) -> list[Scale]:
    """Run the simulation for each number of servers.

    Args:
        workload: of a tile.
        shared_client: one client for all servers; otherwise one beside each, with one storage for all.
        counts: numbers of servers.
    """
    return [_simulate(workload, servers, shared_client) for servers in counts]


def _simulate(workload: Workload, servers: int, shared_client: bool) -> Scale:
    w, clients = workload, 1 if shared_client else servers
    link = 1e3 / (w.network_gbit * 1e9 / 8)  # milliseconds a byte
    client = [Place("the client's processor", w.client_cores) for _ in range(clients)]
    up, down = ([Place(f"the client's network, {way}") for _ in range(clients)] for way in ("out", "in"))
    compute = [Place("the servers") for _ in range(servers)]
    storage = Place("the storage's network")
    routes = []
    for server in range(servers):
        near = 0 if shared_client else server
        routes.append(
            [
                (storage, w.storage_bytes * link),
                (client[near], w.client_ms / 2),
                (up[near], w.request_bytes * link if shared_client else 0.0),  # a server beside it needs no network
                (compute[server], w.server_ms),
                (down[near], w.response_bytes * link if shared_client else 0.0),
                (client[near], w.client_ms / 2),
            ]
        )
    elapsed = _run(routes, w.in_flight, TILES_PER_SERVER)
    places = {id(p): p for route in routes for p, _ in route}.values()
    most: dict[str, float] = {}
    for place in places:
        most[place.name] = max(most.get(place.name, 0.0), place.spent / place.capacity / elapsed)
    name = max(most, key=lambda key: most[key])
    return Scale(
        servers=servers,
        tiles_per_second=1e3 * TILES_PER_SERVER * servers / elapsed,
        bottleneck=name,
        busy=most[name],
    )


def _run(routes: Sequence[Sequence[tuple[Place, float]]], in_flight: int, tiles: int) -> float:
    """Send ``tiles`` tiles along each route, at most ``in_flight`` at a time on one; milliseconds until the last."""
    events: list[tuple[float, int]] = []
    route_of: list[int] = []
    step: list[int] = []
    left = [tiles] * len(routes)
    now = 0.0

    def arrive(job: int) -> None:
        place, time = routes[route_of[job]][step[job]]
        if place.running < place.capacity:
            place.running += 1
            place.spent += time
            heapq.heappush(events, (now + time, job))
        else:
            place.waiting.append(job)

    def send(route: int) -> None:
        if left[route]:
            left[route] -= 1
            route_of.append(route)
            step.append(0)
            arrive(len(step) - 1)

    for _ in range(in_flight):
        for route in range(len(routes)):
            send(route)
    while events:
        now, job = heapq.heappop(events)
        place, _ = routes[route_of[job]][step[job]]
        place.running -= 1
        if place.waiting:
            arrive(place.waiting.popleft())
        step[job] += 1
        if step[job] < len(routes[route_of[job]]):
            arrive(job)
        else:
            send(route_of[job])
    return now
