"""The colon model's cell maps on other laboratories' tissue: what is left alone stays so, and what fails is known."""

from __future__ import annotations

from pathlib import Path

import pytest

import staindiffuser
from staindiffuser.imaging.instances import HALF
from staindiffuser.training.checkpoint import Checkpoint
from tests.rough_masks import REGIONS, cell_values, positive_share

COLON = Path(next(iter(staindiffuser.__path__))).resolve() / "checkpoints" / "colon"


@pytest.mark.slow
def test_what_no_stain_marks_is_left_alone(real_data: Path) -> None:
    checkpoint = Checkpoint.load(COLON)
    for region in REGIONS:
        if region.unmarked:
            for stain, values in cell_values(checkpoint, region, real_data).items():
                share = positive_share(values, checkpoint.config.thresholds.get(stain, HALF))
                assert share <= 0.05, (region.name, stain)
