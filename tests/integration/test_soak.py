"""Many clients, many kinds of request, some given up halfway: every answer is right, and memory does not grow."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton

from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.repository import build
from staindiffuser.serving.server import TritonServer
from tests.synthetic_graphs import write_graphs

TILE = 64
OUTPUTS = ("STAIN_CD3", "CELLS_CD3", "STAIN_CK818", "CELLS_CK818")
CLIENTS, REQUESTS, PHASE = 16, 2000, 500
GIVE_UP = 0.003
"""Seconds after which a client that has no patience cancels its request."""


@dataclass(frozen=True)
class Case:
    """A request of which the answer is known; its tiles are unlike those of every other case."""

    arrays: dict[str, np.ndarray]
    outputs: tuple[str, ...]

    def send(self, client: triton.InferenceServerClient, timeout: float = 60) -> dict[str, np.ndarray]:
        inputs = []
        for name, array in self.arrays.items():
            dtype = "UINT8" if array.dtype == np.uint8 else "INT64"
            inputs.append(triton.InferInput(name, list(array.shape), dtype).set_data_from_numpy(array))
        outputs = [triton.InferRequestedOutput(name) for name in self.outputs]
        result = client.infer("staindiffuser", inputs, outputs=outputs, client_timeout=timeout)
        return {name: result.as_numpy(name) for name in self.outputs}


def cases() -> list[Case]:
    rng = np.random.default_rng(0)
    made = []
    for index in range(24):
        batch = 1 + index % 4
        arrays = {
            "HE": rng.integers(0, 255, (batch, TILE, TILE, 3), dtype=np.uint8),
            "ORIGIN": rng.integers(-64, 64, (batch, 2)) * 16,
            "SEED": rng.integers(0, 2**40, (batch, 1)),
        }
        made.append(Case(arrays, tuple(rng.permutation(OUTPUTS)[: 1 + index % 4])))
    return made


@pytest.fixture(scope="module", params=["python", "single"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("soak")
    write_graphs(folder / "graphs", tile=TILE)
    options = BuildOptions(max_batch=4, threads=1)
    with TritonServer(
        build(folder / "graphs", folder / "models", flavour=request.param, options=options).repository
    ) as s:
        yield s


def memory(server: TritonServer) -> int:
    """Bytes that the server's processes have written, and their shared memory.

    Not USS, which counts the pages of Triton's own program (some 25 MiB) while no other Triton runs on the machine,
    and does not while one does.
    """
    triton_process = psutil.Process(server.pid)
    total = 0
    for process in [triton_process, *triton_process.children(recursive=True)]:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
        kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
        total += kib["Anonymous"] + kib["Pss_Shmem"]
    return total << 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_thousand_mixed_requests(server: TritonServer) -> None:
    known = cases()
    with triton.InferenceServerClient(server.url) as client:
        expected = [case.send(client) for case in known]

    def one_client(number: int, requests: int) -> collections.Counter[str]:
        rng = np.random.default_rng([number, requests])
        outcomes: collections.Counter[str] = collections.Counter()
        with triton.InferenceServerClient(server.url) as client:
            for _ in range(requests):
                index, kind = int(rng.integers(len(known))), rng.random()
                case: Any = known[index]
                if kind < 0.05:
                    off_grid = {**case.arrays, "ORIGIN": case.arrays["ORIGIN"] + 1}
                    outcomes[status_of(Case(off_grid, case.outputs), client, 60)] += 1
                elif kind < 0.15:
                    outcomes[status_of(case, client, GIVE_UP)] += 1
                else:
                    answer = case.send(client)
                    same = all((answer[name] == array).all() for name, array in expected[index].items())
                    outcomes["right" if same else "WRONG"] += 1
        return outcomes

    total: collections.Counter[str] = collections.Counter()
    used = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for phase in range(REQUESTS // PHASE):
            counts = [PHASE // CLIENTS + (number < PHASE % CLIENTS) for number in range(CLIENTS)]
            for outcomes in pool.map(one_client, range(phase * CLIENTS, (phase + 1) * CLIENTS), counts):
                total += outcomes
            used.append(memory(server))
    print(", ".join(f"{bytes_used / 2**20:.1f}" for bytes_used in used), "MiB after each", PHASE, "requests")
    assert total.total() == REQUESTS
    assert set(total) <= {"right", "StatusCode.INVALID_ARGUMENT", "StatusCode.DEADLINE_EXCEEDED", "answered"}, total
    assert total["right"] > 0.8 * REQUESTS
    assert total["StatusCode.INVALID_ARGUMENT"] > 0
    assert total["StatusCode.DEADLINE_EXCEEDED"] > 0
    assert used[-1] <= 1.05 * used[0], [f"{bytes_used / 2**20:.0f} MiB" for bytes_used in used]
    with triton.InferenceServerClient(server.url) as client:
        for case, answer in zip(known, expected, strict=True):
            for name, array in case.send(client).items():
                np.testing.assert_array_equal(array, answer[name])


def status_of(case: Case, client: triton.InferenceServerClient, timeout: float) -> str:
    """How a request ended that may not be answered."""
    try:
        case.send(client, timeout)
    except triton.InferenceServerException as error:
        return str(error.status())
    return "answered"
