"""FastAPI with one uvicorn worker; requests are computed in its thread pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from staindiffuser.benchmarks.rivals.pipeline import BINARY, arguments, load_answers

__all__ = ["application"]


def application(answer: Callable[[bytes], bytes]) -> FastAPI:
    """``POST /``, without FastAPI's validation, which raw bytes do not need."""
    app = FastAPI(openapi_url=None)

    async def stain(request: Request) -> Response:
        return Response(await run_in_threadpool(answer, await request.body()), media_type=BINARY)

    app.add_api_route("/", stain, methods=["POST"], response_model=None)
    return app


if __name__ == "__main__":
    repository, threads, port = arguments()
    config: dict[str, Any] = {"log_level": "error", "access_log": False, "lifespan": "off", "backlog": 512}
    uvicorn.run(application(load_answers(repository, threads)), host="127.0.0.1", port=port, **config)
