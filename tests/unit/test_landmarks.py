"""Landmarks are read by their index, and measure a registration's error."""

from __future__ import annotations

from pathlib import Path

import pytest

from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.registration.landmarks import read_pair, target_error


def test_landmarks(tmp_path: Path) -> None:
    he, ihc = tmp_path / "he.csv", tmp_path / "ihc.csv"
    he.write_text(",X,Y\n1,10,20\n2,30,40\n7,5,5\n")
    ihc.write_text(",X,Y\n2,33,44\n1,10,20\n3,9,9\n")
    fixed, moving = read_pair(he, ihc)
    assert fixed.tolist() == [[10, 20], [30, 40]]
    error = target_error(fixed, moving, fixed + 100, diagonal=50.0)
    assert (error.median, error.maximum, error.landmarks) == pytest.approx((0.05, 0.1, 2))
    assert error.before > 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "three columns"),
        ("index,a,b\n1,2,3\n", "three columns"),
        (",X,Y\n1,2,east\n", "row 2"),
        (",X,Y\n1,2,3\n1,4,5\n", "row 3: index '1' appears twice"),
        (",X,Y\n9,2,3\n", "no landmark in common"),
    ],
)
def test_landmarks_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text(",X,Y\n1,2,3\n")
    bad.write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        read_pair(good, bad)
    assert "bad.csv" in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_pair(good, tmp_path / "none.csv")
