"""``staindiffuser bench compare``: two commits in turns; a slower one shows, and a wrong name is refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from staindiffuser.benchmarks.compare import compare
from staindiffuser.errors import InputError, UsageError
from tests.synthetic_graphs import write_graphs

ROOT = Path(__file__).resolve().parents[2]


def git(root: Path, *arguments: str) -> None:
    command = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with this checkout's sources, whose second commit takes a nap in every pipeline."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("export", "imaging", "triton_models"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "src").mkdir()
    package = shutil.copytree(
        ROOT / "src" / "staindiffuser",
        root / "src" / "staindiffuser",
        symlinks=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    assert (package / "export").is_symlink()
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "fast")
    parity = root / "export" / "parity.py"
    text = parity.read_text(encoding="utf-8")
    begin = 'tensors = {"HE": inputs["HE"]}'
    assert text.count(begin) == 1
    nap = "import time; end = time.process_time() + 0.05\n    while time.process_time() < end: pass\n    "
    parity.write_text(text.replace(begin, nap + begin), encoding="utf-8")
    git(root, "commit", "--quiet", "--all", "--message", "slow")
    return root


def test_the_slower_commit_shows(checkout: Path, tmp_path: Path) -> None:
    write_graphs(tmp_path, tile=32)
    said: list[str] = []
    slower = compare("HEAD~1", graphs=tmp_path, rounds=5, threads=1, root=checkout, progress=said.append)
    assert slower.cpu_ratio.low > 1.5
    assert slower.ms.cpu - slower.base_ms.cpu > 30
    assert slower.rounds == slower.ms.runs == slower.base_ms.runs == 5
    assert said[-1] == "round 5 of 5"
    same = compare("HEAD", graphs=tmp_path, rounds=5, threads=1, root=checkout)
    assert 0.7 < same.cpu_ratio.median < 1.4
    assert same.base != slower.base


def test_what_cannot_be_compared_is_refused(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="abacus: no such commit"):
        compare("abacus", root=checkout)
    with pytest.raises(InputError, match=r"cannot run .*graphs\.json is missing"):
        compare("HEAD", graphs=tmp_path, root=checkout)
