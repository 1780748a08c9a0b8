"""Patients dealt to folds: each validated on once, whole, and the test split left alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from staindiffuser.errors import UsageError
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.folds import Fold
from staindiffuser.training.tiles.mixed_tiles import open_tiles
from staindiffuser.training.tiles.writing import PairedTilesWriter

PATIENTS = {"a": 5, "b": 3, "c": 3, "d": 2, "e": 2, "f": 1}
"""To the number of their tiles, two slides each."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    with PairedTilesWriter(tmp_path, ["cd3"], masks=False, patients=True) as writer:
        for patient, count in [*PATIENTS.items(), ("t", 2)]:
            for number in range(count):
                image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                writer.add(
                    f"{patient}{number}",
                    he=image,
                    stains={"cd3": image},
                    slide=f"{patient}-{number % 2}",
                    split="test" if patient == "t" else "val" if patient == "f" else "train",
                    mpp=0.5,
                    patient=patient,
                )
    return tmp_path


def test_each_patient_is_validated_on_once(folder: Path) -> None:
    seen: Counter[str | None] = Counter()
    for number in (1, 2, 3):
        tiles = open_tiles([folder], fold=Fold.parse(f"{number}/3"))
        val, train = tiles.split("val"), tiles.split("train")
        assert {tile.patient for tile in val}.isdisjoint({tile.patient for tile in train})
        assert {tile.patient for tile in tiles.split("test")} == {"t"}
        assert len(val) + len(train) == sum(PATIENTS.values())
        assert 5 <= len(val) <= 6
        seen.update(tile.patient for tile in val)
    assert seen == PATIENTS


def test_patients_of_several_folders_are_dealt_together(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    with PairedTilesWriter(other, ["cd3"], masks=False) as writer:
        for number in range(4):
            image = np.random.default_rng(number + 9).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            writer.add(f"o{number}", he=image, stains={"cd3": image}, slide=f"o{number}", split="train", mpp=0.5)
    validated = [
        {tile.slide for tile in open_tiles([folder, other], fold=Fold(number=number, of=5)).split("val")}
        for number in range(1, 6)
    ]
    assert set.union(*validated) >= {"o0", "o1", "o2", "o3"}
    assert sum(map(len, validated)) == len(set.union(*validated))


@pytest.mark.parametrize("text", ["", "2", "0/5", "6/5", "1/1", "a/b", "2/5x"])
def test_what_is_no_fold(text: str) -> None:
    with pytest.raises(UsageError, match="such as 2/5"):
        Fold.parse(text)


def test_more_folds_than_patients(folder: Path) -> None:
    with pytest.raises(DataError, match=r"6 patients .* cannot be dealt to 7 folds"):
        open_tiles([folder], fold=Fold(number=1, of=7))
