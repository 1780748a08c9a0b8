"""Ray Serve with one replica; a request travels from Ray's HTTP proxy to the replica's process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import
import ray
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from ray import serve

from staindiffuser.benchmarks.rivals.pipeline import BINARY, arguments, load_answers


class Stainer:
    """The engines of one repository."""

    def __init__(self, repository: Path, threads: int) -> None:
        self.answer = load_answers(repository, threads)

    async def __call__(self, request: Request) -> Response:
        """One request."""
        return Response(await run_in_threadpool(self.answer, await request.body()), media_type=BINARY)


if __name__ == "__main__":
    repository, threads, port = arguments()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2 * 10**8)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    # Ray would limit the replica to one core through OMP_NUM_THREADS, but the engines choose their threads themselves.
    deployment = serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})(Stainer)
    serve.run(deployment.bind(repository, threads))
    signal.sigwait({signal.SIGTERM})
