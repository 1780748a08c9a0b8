"""The same engines behind PyTriton: a Python function with its ``@batch`` decorator.

``python -m staindiffuser.benchmarks.rival_pytriton REPOSITORY THREADS`` prints ``port`` and the port of gRPC once it
answers, and serves until its standard input ends. Triton merges the requests that wait, and the function gets them as
one batch.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np

from staindiffuser.benchmarks.rival import Arrays, load_pipeline, output_names
from staindiffuser.export.manifest import verify
from staindiffuser.export.triton_config import ENSEMBLE, wire_inputs, wire_outputs


def main(repository: Path, threads: int) -> None:
    """Serve until standard input ends."""
    from pytriton.decorators import batch
    from pytriton.model_config import ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    manifest = verify(repository)
    run, names = load_pipeline(manifest, repository, threads), output_names(manifest)

    @batch  # type: ignore[untyped-decorator]
    def stain(**inputs: np.ndarray) -> Arrays:  # type: ignore[type-arg]
        outputs = run(inputs)
        return {name: outputs[name] for name in names}

    taken = [Tensor(name=t.name, dtype=np.dtype(t.dtype).type, shape=t.shape) for t in wire_inputs(manifest.tile)]
    given = [
        Tensor(name=t.name, dtype=np.dtype(t.dtype).type, shape=t.shape)
        for t in wire_outputs(manifest)
        if t.name in names
    ]
    http, grpc = _free_ports(2)
    local = "127.0.0.1"
    config = TritonConfig(http_address=local, http_port=http, grpc_address=local, grpc_port=grpc, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=ENSEMBLE,
            infer_func=stain,
            inputs=taken,
            outputs=given,
            config=ModelConfig(max_batch_size=manifest.max_batch),
        )
        triton.run()
        # Triton's log goes to the same standard output, in pieces that need not end with a line.
        sys.stdout.write(f"\nport {grpc}\n")
        sys.stdout.flush()
        sys.stdin.read()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
