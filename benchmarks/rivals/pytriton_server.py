"""PyTriton: a Python function with its ``@batch`` decorator. Triton merges the requests that wait into one batch."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import numpy as np

from staindiffuser.benchmarks.rivals.pipeline import Arrays, arguments, load_pipeline, output_names
from staindiffuser.export.manifest import verify
from staindiffuser.export.wire import ENSEMBLE, wire_inputs, wire_outputs


def main(repository: Path, threads: int, port: int) -> None:
    """Serve until SIGTERM; ``port`` is that of gRPC."""
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
    with socket.create_server(("127.0.0.1", 0)) as listener:
        http = listener.getsockname()[1]
    local = "127.0.0.1"
    config = TritonConfig(http_address=local, http_port=http, grpc_address=local, grpc_port=port, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=ENSEMBLE,
            infer_func=stain,
            inputs=taken,
            outputs=given,
            config=ModelConfig(max_batch_size=manifest.max_batch),
        )
        triton.run()
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main(*arguments())
