"""BentoML with one worker; raw bytes take its ASGI route, since its own inputs are JSON, forms and files."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["BENTOML_DO_NOT_TRACK"] = "True"  # before the import
import bentoml

from staindiffuser.benchmarks.rivals.fastapi_server import application
from staindiffuser.benchmarks.rivals.pipeline import arguments, load_answers

_REPOSITORY, _THREADS = "STAINDIFFUSER_RIVAL_REPOSITORY", "STAINDIFFUSER_RIVAL_THREADS"


@functools.cache
def _answers() -> Callable[[bytes], bytes]:
    return load_answers(Path(os.environ[_REPOSITORY]), int(os.environ[_THREADS]))


@bentoml.service(workers=1, traffic={"timeout": 600, "concurrency": 64})  # type: ignore[misc, unused-ignore]
@bentoml.asgi_app(application(lambda body: _answers()(body)), path="/")  # type: ignore[misc, unused-ignore]
class Stainer:
    """BentoML imports this module again in its worker, where the engines are loaded."""

    def __init__(self) -> None:
        _answers()


if __name__ == "__main__":
    repository, threads, port = arguments()
    os.environ |= {_REPOSITORY: os.fspath(repository), _THREADS: str(threads)}
    service = "staindiffuser.benchmarks.rivals.bentoml_server:Stainer"
    options = ["--host", "127.0.0.1", "--port", str(port), "--backlog", "512", "--api-workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", service, *options])
