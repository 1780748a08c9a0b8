"""The gate before publishing, on engines that are plain functions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import GraphsError, ParityError
from staindiffuser.export.parity import Golden, check_parity
from staindiffuser.triton_models.engine.engine_onnxruntime import OnnxRuntimeEngine
from tests.synthetic_graphs import write_graphs


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[GraphSet, Golden, dict[str, OnnxRuntimeEngine]]:
    folder = tmp_path_factory.mktemp("graphs")
    graphs = write_graphs(folder, tile=32)
    engines = {name: OnnxRuntimeEngine(folder / engine.file, threads=1) for name, engine in graphs.engines.items()}
    return graphs, Golden.load(folder / graphs.golden), engines


class Changed:
    """An engine whose output is changed on the way out."""

    def __init__(self, engine: OnnxRuntimeEngine, change: Any) -> None:
        self.engine, self.change = engine, change

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        return {name: self.change(array.copy()) for name, array in self.engine.run(inputs, outputs).items()}

    def close(self) -> None:
        pass


def changed(case: Any, name: str, change: Any) -> dict[str, Any]:
    return {**case[2], name: Changed(case[2][name], change)}


def add(levels: int, count: int | None = None) -> Any:
    def change(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        flat = array.reshape(-1)
        part = slice(None) if count is None else slice(count)
        flat[part] = np.where(flat[part] > 128, flat[part] - levels, flat[part] + levels)
        return array

    return change


def test_engines_that_wrote_the_samples_pass_at_every_batch(case: Any) -> None:
    graphs, golden, engines = case
    results = check_parity(engines, graphs, golden, (1, 2, 5))
    assert set(results) == set(graphs.engines)
    for name, entries in results.items():
        assert [entry.batch for entry in entries] == [1, 2, 5]
        assert all(entry.samples == golden.samples for entry in entries)
        assert all(entry.max_levels <= 1 for entry in entries), name
    assert results["he_encoder"][0].max_feature > 0


def test_one_level_everywhere_passes_and_is_recorded(case: Any) -> None:
    graphs, golden, _ = case
    result = check_parity(changed(case, "stain_cd3", add(1)), graphs, golden, (1,))["stain_cd3"][0]
    assert result.max_levels == 1
    assert result.mean_levels == pytest.approx(1)
    assert result.share_over_one == 0


def test_two_levels_pass_only_where_they_are_rare(case: Any) -> None:
    graphs, golden, _ = case
    values = 32 * 32 * 3
    rare = check_parity(changed(case, "stain_cd3", add(2, values // 2000)), graphs, golden, (1,))["stain_cd3"][0]
    assert rare.max_levels == 2
    with pytest.raises(ParityError, match=r"stain_cd3 differs .* more than one on 0\.488%"):
        check_parity(changed(case, "stain_cd3", add(2, 15)), graphs, golden, (1,))


def test_three_levels_anywhere_are_refused(case: Any) -> None:
    graphs, golden, _ = case
    with pytest.raises(ParityError, match=r"cells_ck818 differs from torch by up to 3 grey levels.* at batch 2"):
        check_parity(changed(case, "cells_ck818", add(3, 1)), graphs, golden, (2,))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(case: Any, value: float) -> None:
    graphs, golden, _ = case

    def poison(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        array.reshape(-1)[-1] = value
        return array

    with pytest.raises(ParityError, match="NaN or infinity in FEATURES_0"):
        check_parity(changed(case, "he_encoder", poison), graphs, golden, (1,))


def test_output_that_golden_lacks_is_refused(case: Any) -> None:
    graphs, golden, engines = case
    short = Golden(golden.inputs, {name: a for name, a in golden.outputs.items() if name != "CELLS_CD3"})
    with pytest.raises(ParityError, match="golden samples lack CELLS_CD3"):
        check_parity(engines, graphs, short, (1,))


def test_unreadable_golden_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(GraphsError, match="holds no golden samples"):
        Golden.load(path)
    np.savez(path, HE=np.zeros((0, 32, 32, 3), np.uint8), ORIGIN=np.zeros((0, 2)), SEED=np.zeros((0, 1)))
    with pytest.raises(GraphsError, match="holds no golden samples"):
        Golden.load(path)
