"""Slides on a cluster of Ray: each slide is a task, which another machine takes over where its own is lost.

The slides, the result folders and staindiffuser must be at the same paths on all machines. Results are the same bytes
as without a cluster, and an interrupted slide goes on from its saved rows, wherever the task runs next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from staindiffuser.errors import ServerLostError, StainDiffuserError, UsageError

__all__ = ["RESOURCE", "run_on_cluster"]

RESOURCE = "staindiffuser"
"""Ray's name for machines with a server, one slide at a time: ``ray start --resources '{"staindiffuser": 1}'``."""
RETRIES = 3
"""Times that a slide is begun again because the machine or the process that stained it was lost."""

Result = TypeVar("Result")


def run_on_cluster(
    address: str, work: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], say: Callable[[str], None]
) -> Iterator[tuple[int, Result | StainDiffuserError]]:
    """Call ``work`` with each set of arguments on a machine of the cluster.

    Args:
        address: of Ray's head, ``HOST:PORT``, or ``auto``; this machine must belong to the cluster.
        work: a function of a module, so that the other machines find it too.
        arguments: one set a slide; they are sent to other machines.
        say: is told where the work goes.

    Yields:
        The index of the arguments, and the result or, after the last retry, that the machine was lost; as they come.

    Raises:
        UsageError: there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its maker
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray {address}: no cluster answers ({' '.join(str(error).split())[:200]})") from error
    try:
        near = int(ray.cluster_resources().get(RESOURCE, 0))
        say(f"{len(arguments)} slides on {len(ray.nodes())} machines of {address}, {near or 'none'} with a server")
        resources = {RESOURCE: 1} if near else {}
        task = ray.remote(max_retries=RETRIES, num_cpus=1, resources=resources)(work)
        waiting = {task.remote(*each): index for index, each in enumerate(arguments)}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            index = waiting.pop(done)
            try:
                yield index, ray.get(done)
            except ray.exceptions.RayError as error:
                reason = " ".join(str(error).split())[:200]
                yield index, ServerLostError(f"the slide's machine was lost {RETRIES + 1} times ({reason})")
    finally:
        ray.shutdown()
