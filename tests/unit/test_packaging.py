"""What a wheel and a source distribution hold, and that a build of an incomplete checkout fails."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: list[str] = PYPROJECT["tool"]["hatch"]["build"]["hooks"]["custom"]["folders"]


def hatchling(*arguments: str, root: Path, without_viewer: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the build backend in this environment, without the network."""
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", *arguments],
        cwd=root,
        env={**os.environ, "STAINDIFFUSER_WITHOUT_OPENSEADRAGON": str(int(without_viewer))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose packages hold one module each."""
    root = tmp_path / "checkout"
    package = root / "src" / "staindiffuser"
    package.mkdir(parents=True)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, root / name)
    shutil.copyfile(ROOT / "src" / "staindiffuser" / "__init__.py", package / "__init__.py")
    (package / "py.typed").touch()
    for name in FOLDERS:
        (root / name).mkdir()
        (root / name / "module.py").touch()
        (package / name).symlink_to(Path("..", "..", name), target_is_directory=True)
    for name in ("tests", "docs"):
        (root / name).mkdir()
        (root / name / "file.py").touch()
    return root


def wheel_files(root: Path, folder: Path) -> set[str]:
    result = hatchling("-t", "wheel", "-d", str(folder), root=root)
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_every_package_is_named_and_linked() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages | {"checkpoints"} == set(FOLDERS)
    links = {path.name: path.resolve() for path in (ROOT / "src" / "staindiffuser").iterdir() if path.is_symlink()}
    assert links == {name: ROOT / name for name in FOLDERS}


def test_the_wheel_holds_every_package_and_the_models(tmp_path: Path) -> None:
    expected = {
        f"staindiffuser/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    top = {f"staindiffuser/{path.name}" for path in (ROOT / "src" / "staindiffuser").iterdir() if path.is_file()}
    assert wheel_files(ROOT, tmp_path) == expected | top
    assert {
        "staindiffuser/cli.py",
        "staindiffuser/py.typed",
        "staindiffuser/triton_models/noise/normal_quantiles.npy",
        "staindiffuser/checkpoints/demo/model.safetensors",
        "staindiffuser/checkpoints/demo/graphs/he_encoder.onnx",
    } <= expected | top


def test_the_sdist_holds_tests_and_docs_and_gives_the_same_wheel(checkout: Path, tmp_path: Path) -> None:
    result = hatchling("-t", "sdist", "-d", str(tmp_path), root=checkout)
    assert result.returncode == 0, result.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert len(names) == len(set(names))
    files = {name.removeprefix(f"{root.name}/") for name in names}
    assert {"tests/file.py", "docs/file.py", "pyproject.toml", "hatch_build.py"} <= files
    assert {f"{name}/module.py" for name in FOLDERS} <= files
    assert wheel_files(root, tmp_path / "from sdist") == wheel_files(checkout, tmp_path / "from checkout")


@pytest.mark.parametrize("target", ["wheel", "sdist"])
def test_a_build_without_a_package_fails(checkout: Path, tmp_path: Path, target: str) -> None:
    shutil.rmtree(checkout / "client")
    result = hatchling("-t", target, "-d", str(tmp_path), root=checkout)
    assert result.returncode != 0
    assert "lacks the folders client" in result.stderr
    assert not list(tmp_path.glob("*.whl")) + list(tmp_path.glob("*.tar.gz"))


def test_without_symbolic_links_the_wheel_is_complete_and_an_editable_install_refused(
    checkout: Path, tmp_path: Path
) -> None:
    complete = wheel_files(checkout, tmp_path / "with links")
    for name in FOLDERS:  # as git checks them out where it may not make links
        link = checkout / "src" / "staindiffuser" / name
        link.unlink()
        link.write_text(f"../../{name}", encoding="utf-8")
    assert wheel_files(checkout, tmp_path / "without") == complete
    result = hatchling("-t", "wheel:editable", "-d", str(tmp_path), root=checkout)
    assert result.returncode != 0
    assert "git config core.symlinks true" in " ".join(result.stderr.split())
    assert not list(tmp_path.glob("*.whl"))


FETCHED = Path("viewer", "static", "vendor", "openseadragon.min.js")


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a substitute for npm brings as OpenSeadragon."""
    content = tmp_path / "openseadragon.min.js"
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(
        '#!/bin/sh\nto="$3/node_modules/openseadragon/build/openseadragon"\nmkdir -p "$to"\n'
        f'cp "{content}" "$to/" || {{ echo "npm error no network" >&2; exit 1; }}\n'
        'echo BSD > "$3/node_modules/openseadragon/LICENSE.txt"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return content


def expect_openseadragon(root: Path, content: bytes) -> None:
    """Let the checkout's build expect this file."""
    path = root / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    own = PYPROJECT["tool"]["hatch"]["build"]["hooks"]["custom"]["openseadragon-sha256"]
    path.write_text(text.replace(own, hashlib.sha256(content).hexdigest()), encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="the substitute for npm is a shell script")
def test_npm_brings_openseadragon_into_the_wheel(checkout: Path, npm: Path, tmp_path: Path) -> None:
    npm.write_bytes(b"a library")
    expect_openseadragon(checkout, b"a library")
    result = hatchling("-t", "wheel", "-d", str(tmp_path), root=checkout, without_viewer=False)
    assert result.returncode == 0, result.stderr
    assert (checkout / FETCHED).read_bytes() == b"a library"
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        vendor = f"staindiffuser/{FETCHED.parent.as_posix()}"
        assert {f"{vendor}/{FETCHED.name}", f"{vendor}/openseadragon-LICENSE.txt"} <= set(archive.namelist())
    npm.unlink()  # it is there: npm is not asked again
    assert hatchling("-t", "wheel", "-d", str(tmp_path), root=checkout, without_viewer=False).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="the substitute for npm is a shell script")
@pytest.mark.parametrize("problem", ["no network", "another file"])
def test_without_openseadragon_a_wheel_is_refused_and_an_editable_install_warns(
    checkout: Path, npm: Path, tmp_path: Path, problem: str
) -> None:
    if problem == "another file":
        npm.write_bytes(b"not the one that is expected")
    result = hatchling("-t", "wheel", "-d", str(tmp_path), root=checkout, without_viewer=False)
    said = " ".join(result.stderr.split())
    assert result.returncode != 0
    assert problem in said
    assert "STAINDIFFUSER_WITHOUT_OPENSEADRAGON=1" in said
    assert not (checkout / FETCHED).exists()
    editable = hatchling("-t", "wheel:editable", "-d", str(tmp_path), root=checkout, without_viewer=False)
    assert editable.returncode == 0, editable.stderr
    assert "npm could not bring openseadragon" in " ".join((editable.stdout + editable.stderr).split())


def test_every_extra_that_the_code_names_exists() -> None:
    sources = [path for folder in (*FOLDERS, "src/staindiffuser") for path in (ROOT / folder).rglob("*.py")]
    named = {
        name for path in sources for name in re.findall(r"staindiffuser\[(\w+)\]", path.read_text(encoding="utf-8"))
    }
    assert {"train", "export"} <= named <= set(PYPROJECT["project"]["optional-dependencies"])
