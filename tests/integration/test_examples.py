"""The code that people copy first: the README's example and the notebook run as they stand, on the model that ships."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from staindiffuser.training.simulate.tiles import simulate_tile
from tests.conftest import made_once

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "stain_a_tile.ipynb"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The engines are built once for all workers, and nothing is taken from or left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = made_once(tmp_path_factory, "examples-cache", Path.mkdir)
        patch.setenv("STAINDIFFUSER_CACHE", str(folder))
        yield


def brown_share(image: np.ndarray) -> float:
    """Share of the pixels that are clearly more red than blue."""
    return float((image[..., 0].astype(int) - image[..., 2] > 20).mean())


def test_readme_example_stains_a_tile_and_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    tile = simulate_tile(7, 3, size=512)
    Image.fromarray(tile.he).save(tmp_path / "tile.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    painted = np.asarray(Image.open("cd3.png"))
    assert painted.shape == tile.he.shape
    assert brown_share(painted) == pytest.approx(brown_share(tile.stains["cd3"]), abs=0.05)
    assert brown_share(painted) > 0.005


def test_notebook_runs_and_shows_the_stain() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), "strip the outputs"
    names: dict[str, Any] = {}
    shown = [run_cell("".join(cell["source"]), names) for cell in code]
    he, panels = (image for image in shown if isinstance(image, Image.Image))
    assert he.size == (512, 512)
    assert panels.size == (5 * 512, 512)  # H&E, then image and cell map of two stains


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as Jupyter does: the value of its last expression is what it shows."""
    *statements, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        statements.append(last)
    exec(compile(ast.Module(statements, type_ignores=[]), NOTEBOOK.name, "exec"), names)
    return (
        eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names) if isinstance(last, ast.Expr) else None
    )
