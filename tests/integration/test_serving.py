"""A real Triton server: started, secured, watched and stopped, with nothing of it left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc as triton

from staindiffuser.errors import ServerLostError, UsageError
from staindiffuser.export.errors import ManifestError
from staindiffuser.export.manifest import Manifest
from staindiffuser.export.repository import build_repository
from staindiffuser.serving import server as server_module
from staindiffuser.serving.arguments import RESTRICTED
from staindiffuser.serving.errors import PortInUseError, ServerMissingError, ServerStartError
from staindiffuser.serving.readiness import require_identity
from staindiffuser.serving.runtime import TRITON_ROOT, find_runtime
from staindiffuser.serving.server import TritonServer
from tests.running_serve import eventually
from tests.synthetic_graphs import write_graphs


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    write_graphs(folder / "graphs", tile=32)
    return build_repository(folder / "graphs", folder / "repository", max_batch=2, threads=1)


@pytest.fixture(scope="module")
def running(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository) as server:
        yield server


def processes(pid: int) -> list[int]:
    """The process group of a tritonserver: itself and its stubs."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ProcessLookupError):
                if os.getpgid(int(folder.name)) == pid and "State:\tZ" not in (folder / "status").read_text():
                    found.append(int(folder.name))
    return found


def started_with(pid: int) -> tuple[str, Path]:
    """What a tritonserver was told: the prefix of its shared memory, and the folder that is its own."""
    command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    prefix = re.search(r"shm-region-prefix-name=([^\0]+)", command)
    models = re.search(r"--model-repository=([^\0]+)", command)
    assert prefix is not None
    assert models is not None
    return prefix[1], Path(models[1]).parent


def model_file(repository: Path) -> Path:
    """What the Python backend runs."""
    (path,) = repository.glob("staindiffuser/*/model.py")
    return path


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob(f"staindiffuser_{os.getpid()}_*")}


def test_ready_with_its_model(running: TritonServer) -> None:
    client = triton.InferenceServerClient(running.url)
    assert client.is_server_ready()
    assert running.alive
    assert client.is_model_ready("staindiffuser")
    config = client.get_model_config("staindiffuser", as_json=True)["config"]
    assert config["parameters"]["model_version"]["string_value"] == running.manifest.model_version
    client.close()


def test_metrics_on_loopback(running: TritonServer) -> None:
    with urllib.request.urlopen(running.metrics_url, timeout=10) as response:
        assert b"nv_inference_count" in response.read()


def test_nothing_listens_beyond_loopback(running: TritonServer) -> None:
    """/proc/net/tcp* of the server: every listening socket is bound to 127.0.0.1."""
    inodes = set()
    for pid in processes(running.pid):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(link.readlink()))
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{running.pid}/net/{table}").read_text(encoding="utf-8").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                listening.append(fields[1].split(":")[0])
    assert len(listening) >= 2
    assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and as an IPv6 address


def test_control_protocols_are_closed(running: TritonServer) -> None:
    client = triton.InferenceServerClient(running.url)
    calls = {
        "model-repository": client.get_model_repository_index,
        "shared-memory": client.get_system_shared_memory_status,
        "trace": client.get_trace_settings,
        "logging": client.get_log_settings,
    }
    assert set(calls) == set(RESTRICTED)
    for call in calls.values():
        with pytest.raises(triton.InferenceServerException, match="protocol is restricted"):
            call()
    with pytest.raises(triton.InferenceServerException, match="protocol is restricted"):
        client.unload_model("staindiffuser")
    client.close()


def test_the_repository_stays_as_it_was(running: TritonServer) -> None:
    """The Python backend compiles what it runs; that must not land among verified files."""
    assert not list(running.repositories[0].rglob("*.pyc"))


def test_stopping_leaves_nothing_behind(repository: Path) -> None:
    with TritonServer(repository) as server:
        pid = server.pid
        assert len(processes(pid)) == 2
        assert shared_memory()
        prefix, folder = started_with(pid)
        assert folder.is_dir()
    assert processes(pid) == []
    assert not server.alive
    assert not folder.exists()
    assert eventually(lambda: not {n for n in shared_memory() if n.startswith(prefix)})
    server.stop()  # a second time is nothing


def test_killed_server_is_reported_and_cleaned_up(repository: Path) -> None:
    with TritonServer(repository) as server:
        pid = server.pid
        prefix = started_with(pid)[0]
        assert any(name.startswith(prefix) for name in shared_memory())
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ServerLostError, match="Triton was ended by SIGKILL"):
            server.wait(20)
        assert not server.alive
    assert eventually(lambda: processes(pid) == [])
    assert not {name for name in shared_memory() if name.startswith(prefix)}


def test_a_supervisor_that_is_killed_leaves_the_ports_to_the_next_one(repository: Path) -> None:
    with TritonServer(repository) as server:
        pid, url = server.pid, server.url
        prefix = started_with(pid)[0]
        parent = psutil.Process(pid).parent()
        assert parent is not None
        parent.kill()
        with pytest.raises(ServerLostError, match="Triton's supervisor was ended by SIGKILL"):
            server.wait(20)
        os.kill(pid, signal.SIGSTOP)  # as slow to end as it can be
        server.restart()
        assert server.url == url
        assert server.pid != pid
        assert processes(pid) == []
        server.probe(20)
    assert not {name for name in shared_memory() if name.startswith(prefix)}


PARENT = """
    import sys, threading, time
    from pathlib import Path
    from staindiffuser.serving.server import TritonServer
    server = TritonServer(Path(sys.argv[1]))
    thread = threading.Thread(target=server.__enter__)
    thread.start()
    thread.join()          # the thread that started the server ends; the server must not
    time.sleep(1)
    print(server.pid, server.alive, flush=True)
    time.sleep(60)
"""


def test_the_server_dies_with_whoever_started_it(repository: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(repository)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    number, alive = parent.stdout.readline().split()
    pid = int(number)
    assert alive == "True"
    assert processes(pid)
    prefix, folder = started_with(pid)
    assert list(Path("/dev/shm").glob(f"{prefix}*"))
    parent.kill()
    parent.communicate()
    assert eventually(lambda: processes(pid) == [])
    assert eventually(lambda: not list(Path("/dev/shm").glob(f"{prefix}*")))
    assert eventually(lambda: not folder.exists())


def test_port_in_use_is_named(repository: Path) -> None:
    with contextlib.closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with (
            pytest.raises(PortInUseError, match=f"port {port} is in use by process") as error,
            TritonServer(repository, grpc_port=port),
        ):
            pass
        assert isinstance(error.value, UsageError)
        with (
            pytest.raises(PortInUseError, match=f"port {port} is in use by process"),
            TritonServer(repository, metrics_port=port),
        ):
            pass


def test_one_port_for_both_is_refused(repository: Path) -> None:
    server = TritonServer(repository, grpc_port=8001, metrics_port=8001)
    with pytest.raises(PortInUseError, match="--grpc-port and --metrics-port are both 8001"), server:
        pass


def test_ready_means_that_the_server_which_was_started_answers(running: TritonServer) -> None:
    with triton.InferenceServerClient(running.url) as client:
        config = client.get_model_config("staindiffuser").config
    assert config.parameters["server_id"].string_value == running.identity
    with pytest.raises(ServerStartError, match=f"another server answers at {running.url}"):
        require_identity(config, "0" * 32, running.url)


def test_chosen_ports_and_log(repository: Path, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    log = tmp_path / "triton.log"
    log.write_text("error: from an older run\n")
    with TritonServer(repository, grpc_port=port, log=log) as server:
        assert server.url == f"127.0.0.1:{port}"
    assert "Started GRPCInferenceService" in log.read_text()


def test_a_repository_that_was_changed_is_refused(repository: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(repository, tmp_path / "changed"))
    model_file(changed).write_text("import os\n")
    with pytest.raises(ManifestError, match=r"staindiffuser/\d+/model\.py differs"), TritonServer(changed):
        pass


def test_a_failed_start_quotes_the_reason(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Path(shutil.copytree(repository, tmp_path / "broken"))
    model_file(broken).write_text("raise RuntimeError('no such luck')\n")
    monkeypatch.setattr(server_module, "verify", lambda path, checkpoint=None: Manifest.load(path))
    with pytest.raises(ServerStartError, match="no such luck") as error, TritonServer(broken):
        pass
    assert "\n" not in str(error.value)


def test_too_little_shared_memory_is_said_before_the_start(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1 << 20

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ServerMissingError, match=r"/dev/shm has 1 MiB free, .* --shm-size"), TritonServer(repository):
        pass


def test_another_triton_is_run_from_its_folder(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as in the vendor's container, here of the wheel's files: the container's entry point needs no more."""
    wheel = find_runtime()
    python = tmp_path / "backends" / "python"
    for folder in (tmp_path / "bin", python):
        folder.mkdir(parents=True)
    (tmp_path / "bin" / "tritonserver").symlink_to(wheel.server)
    (tmp_path / "lib").symlink_to(wheel.libraries)
    for source in (*wheel.python_backend.iterdir(), wheel.stub):
        (python / source.name).symlink_to(source)
    monkeypatch.setenv(TRITON_ROOT, str(tmp_path))
    with TritonServer(repository) as server:
        assert str(tmp_path / "bin" / "tritonserver") in Path(f"/proc/{server.pid}/cmdline").read_text(encoding="utf-8")
    (python / "triton_python_backend_stub").unlink()
    with pytest.raises(ServerMissingError, match="STAINDIFFUSER_TRITON must name Triton's folder"):
        find_runtime()


def test_missing_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServerMissingError, match="install it with: pip install"):
        find_runtime()
