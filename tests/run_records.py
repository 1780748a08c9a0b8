"""A run record for tests that need one and do not stain."""

from __future__ import annotations

from staindiffuser.client import run_record as records
from staindiffuser.client.run_record import RunRecord
from staindiffuser.client.testing import FAKE_CONTRACT

__all__ = ["run_record"]


def run_record(*, outputs: dict[str, int] | None = None) -> RunRecord:
    """A plausible record of the fake model."""
    return RunRecord(
        format=records.FORMAT,
        notice="A substitute.",
        input=records.InputRecord(
            path="/slides/a.svs", sha256="0" * 64, bytes=1, format="aperio (tifffile)", size=(100, 80), mpp=(0.5, 0.5),
            mpp_from="file", level_read=0,
        ),
        model=records.model_record(FAKE_CONTRACT),
        request=records.Request(
            model_version=FAKE_CONTRACT.model_version, stains=("cd3",), seed=0, mpp=None, cells=True,
            allow_damaged=False, preview=False
        ),
        stains=FAKE_CONTRACT.stains[:1],
        seed=0,
        steps=2,
        result=records.ResultRecord(size=(100, 80), mpp=(0.5, 0.5), resampled=False),
        tiles=records.TilesRecord(total=1, stained=1, side=256, stride=192, margin=32, batch=4, in_flight=3),
        resumed_rows=0,
        damaged=(),
        tissue_fraction=0.5,
        cells={"CD3": 3},
        scores=None,
        warnings=(),
        server=records.ServerRecord(url="fake:0", version="fake 0"),
        started="2026-01-01T00:00:00+00:00",
        seconds=records.Seconds(total=1.0, stages_summed_over_threads={"stain": 1.0}),
        versions={"python": "3"},
        outputs=outputs or {},
    )  # fmt: skip
