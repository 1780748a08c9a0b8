"""LitServe with one worker process, as it comes; bodies travel to it through LitServe's queue.

No ``from __future__ import annotations``: LitServe hands the annotations of ``decode_request`` to FastAPI.
"""

from pathlib import Path
from typing import Annotated, Any

import litserve
from fastapi import Body, Response

from staindiffuser.benchmarks.rivals.pipeline import BINARY, arguments, load_answers

Bytes = Annotated[bytes, Body(media_type=BINARY)]


class Stainer(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """The engines of one repository."""

    def __init__(self, repository: Path, threads: int) -> None:
        super().__init__(api_path="/")
        self.repository, self.threads = repository, threads

    def setup(self, device: Any) -> None:
        """Load the engines in the worker."""
        self.answer = load_answers(self.repository, self.threads)

    def decode_request(self, request: Bytes) -> bytes:
        """Nothing to decode."""
        return request

    def predict(self, body: bytes) -> bytes:
        """Compute one request."""
        return self.answer(body)

    def encode_response(self, answer: bytes) -> Response:
        """The bytes."""
        return Response(answer, media_type=BINARY)


if __name__ == "__main__":
    repository, threads, port = arguments()
    server = litserve.LitServer(Stainer(repository, threads), accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="error", generate_client_file=False)
