"""How well the measures of quality tell tiles apart, and what is gained by leaving flagged ones out.

Fields of tissue that neither training nor statistics have seen stand against the same fields with something wrong with
them, against images that are virtual IHC already (the model's own), and against other tissue.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from staindiffuser.benchmarks.artefacts import ARTEFACTS
from staindiffuser.client.model_view import ModelView
from staindiffuser.errors import UsageError
from staindiffuser.export.builders import BuildOptions, Engine
from staindiffuser.export.choosing import available, load_candidate
from staindiffuser.export.description import GraphSet
from staindiffuser.export.parity import run_pipeline
from staindiffuser.export.quality import compose_field, field_plans
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.optical_density import dab_mask
from staindiffuser.imaging.slides import open_slide
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles

__all__ = ["EXACT", "KEPT", "QualityReport", "auroc", "bench_quality"]

EXACT = "onnxruntime fp32"

KEPT = (1.0, 0.9, 0.75, 0.5)
"""Shares of the fields that are kept in the abstention curves."""
LEAST_TISSUE = 0.2
IHC = "virtual IHC"

Scores = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """The outcome; every mapping is by kind of tile."""

    model_name: str
    engine: str
    """Target and precision that scored them, such as ``openvino int8``."""
    reference: str
    limits: Mapping[str, float]
    fields: int
    """Held-out fields that the others stand against."""
    slides: int
    """They come from so many slides (regions)."""
    flagged_anyway: float
    """Share of the held-out fields that is flagged."""
    counts: Mapping[str, int]
    unlike_auroc: Mapping[str, float]
    """How often a field of the kind scores above a held-out one by ``unlike`` alone."""
    auroc: Mapping[str, float]
    """By the largest of all measures, each in shares of its limit: what the flag goes by."""
    flagged: Mapping[str, float]
    """Share of the kind that is flagged."""
    dice: Mapping[str, Mapping[str, Mapping[str, float]]]
    """By stain, measure and share kept: the pooled Dice of the DAB masks of the kept fields, worst by the measure left
    out first."""

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.model_name} on {self.engine}: knows {self.reference}; limits {dict(self.limits)}"
        yield f"{self.fields} held-out fields of {self.slides} slides, of which {self.flagged_anyway:.1%} are flagged"
        yield f"{'kind':>18} {'fields':>7} {'AUROC':>7} {'unlike':>7} {'flagged':>8}"
        for kind, count in self.counts.items():
            scores = f"{self.auroc[kind]:7.3f} {self.unlike_auroc[kind]:7.3f} {self.flagged[kind]:8.1%}"
            yield f"{kind:>18} {count:7} {scores}"
        for stain, by_measure in self.dice.items():
            for measure, curve in by_measure.items():
                kept = ", ".join(f"{float(share):.0%}: {value:.3f}" for share, value in curve.items())
                yield f"DAB-Dice of {stain}, kept by {measure}: {kept}"


class _Judge:
    """The whole pipeline in this process, one field at a time, on the engines that a server has."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.graphs = GraphSet.load(folder)
        if self.graphs.quality is None:
            raise UsageError(f"{folder} has no engines that judge tiles: add them with `staindiffuser export quality`")
        self.quality = self.graphs.quality
        self.engine = engine
        found, absent = available(self.graphs, BuildOptions(max_batch=1))
        if engine not in found:
            raise UsageError(f"--engine {engine}: there is {', '.join(found)} here; {absent}")
        with ExitStack() as stack:
            built = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "engines"
            self._engines = load_candidate(folder, engine, found[engine], "single", built, stack)
            self._open = stack.pop_all()

    def close(self) -> None:
        self._open.close()

    def tile(self, he: UInt8Array) -> Scores:
        """The measures of a field [T, T, 3]."""
        outputs = self._run({name: self._engines[name] for name in ("he_encoder", "quality")}, he)
        return dict(zip(self.quality.tile, outputs["QUALITY"].tolist(), strict=True))

    def everything(self, he: UInt8Array) -> dict[str, NDArray[np.generic]]:
        """All outputs for a field, without the batch dimension."""
        return self._run(self._engines, he)

    def _run(self, engines: Mapping[str, Engine], he: UInt8Array) -> dict[str, NDArray[np.generic]]:
        inputs: dict[str, NDArray[Any]] = {
            "HE": he[None],
            "ORIGIN": np.zeros((1, 2), np.int64),
            "SEED": np.zeros((1, 1), np.int64),
        }
        outputs = run_pipeline(
            engines, self.graphs.engines, steps=self.graphs.steps, tile=self.graphs.tile, inputs=inputs
        )[1]
        return {name: array[0] for name, array in outputs.items()}

    def flag(self, scores: Scores) -> float:
        """The largest measure in shares of its limit; flagged above 1."""
        return max(scores[name] / limit for name, limit in self.quality.limits.items())


def bench_quality(
    graphs: Path,
    tiles: Sequence[Path],
    others: Sequence[str] = (),
    *,
    engine: str = EXACT,
    most: int = 60,
    progress: Callable[[str], None] = lambda line: None,
) -> QualityReport:
    """Score held-out fields, the same with artefacts, virtual IHC and other tissue.

    Args:
        graphs: with the engines that judge tiles.
        tiles: folders of paired tiles whose test split is held-out tissue.
        others: ``NAME=SLIDE`` or ``NAME=SLIDE@MPP``.
        engine: of :data:`~staindiffuser.export.choosing.CANDIDATES`, such as ``openvino int8``.
        most: fields at most from each folder and slide.
        progress: called with one line per kind.

    Raises:
        UsageError: the graphs judge nothing, there are no held-out fields, an item of ``others`` is malformed, or the
            engine cannot run here.
        DataError, SlideError: tiles or slides cannot be read.
    """
    judge = _Judge(graphs, engine)
    try:
        return _bench(judge, tiles, others, most, progress)
    finally:
        judge.close()


def _bench(
    judge: _Judge, tiles: Sequence[Path], others: Sequence[str], most: int, progress: Callable[[str], None]
) -> QualityReport:
    side, mpp = judge.graphs.tile, judge.graphs.mpp
    plans = [plan for folder in tiles for plan in field_plans(PairedTiles.load(folder).split("test"), side, mpp, most)]
    rng = np.random.default_rng(0)
    groups: dict[str, list[Scores]] = {}
    held_out: list[Scores] = []
    slides: set[str] = set()
    overlaps: dict[str, list[tuple[int, int, int]]] = {}
    measured: dict[str, list[Scores]] = {}
    for slide, members in plans:
        he = compose_field([tile.he for tile in members], members[0].mpp, side, mpp)
        outputs = judge.everything(he)
        scores = dict(zip(judge.quality.tile, outputs["QUALITY"].tolist(), strict=True))
        if scores["tissue"] < LEAST_TISSUE:
            continue
        held_out.append(scores)
        slides.add(slide)
        for kind, spoil in ARTEFACTS.items():
            groups.setdefault(kind, []).append(judge.tile(spoil(he, rng)))
        image = outputs[f"STAIN_{judge.graphs.stains[-1].name.upper()}"]
        groups.setdefault(IHC, []).append(judge.tile(np.asarray(image, np.uint8)))
        for stain in (s.name for s in judge.graphs.stains):
            found = _overlap(members, stain, np.asarray(outputs[f"STAIN_{stain.upper()}"], np.uint8), side, mpp)
            if found is not None:
                of_stain = outputs[f"QUALITY_{stain.upper()}"].tolist()
                overlaps.setdefault(stain, []).append(found)
                measured.setdefault(stain, []).append(
                    {**scores, **dict(zip(judge.quality.stain, of_stain, strict=True))}
                )
    if len(held_out) < 2:
        raise UsageError("the test splits of --tiles hold fewer than two fields of tissue: give others")
    progress(f"{len(held_out)} held-out fields")
    for item in others:
        name, _, rest = item.partition("=")
        if not rest:
            raise UsageError(f"--other {item}: must be NAME=SLIDE or NAME=SLIDE@MPP")
        groups[name] = [judge.tile(he) for he in _slide_fields(rest, side, mpp, most)]
        groups[name] = [scores for scores in groups[name] if scores["tissue"] >= LEAST_TISSUE]
        progress(f"{name}: {len(groups[name])} fields")
    ordinary = [judge.flag(scores) for scores in held_out]
    unlike = [scores["unlike"] for scores in held_out]
    flags = {kind: [judge.flag(scores) for scores in group] for kind, group in groups.items()}
    return QualityReport(
        model_name=judge.graphs.name,
        engine=judge.engine,
        reference=judge.quality.reference,
        limits=judge.quality.limits,
        fields=len(held_out),
        slides=len(slides),
        flagged_anyway=float(np.mean(np.array(ordinary) > 1)),
        counts={kind: len(group) for kind, group in groups.items()},
        unlike_auroc={kind: auroc(unlike, [s["unlike"] for s in group]) for kind, group in groups.items()},
        auroc={kind: auroc(ordinary, values) for kind, values in flags.items()},
        flagged={kind: float(np.mean(np.array(values) > 1)) for kind, values in flags.items()},
        dice={stain: _abstention(overlaps[stain], measured[stain]) for stain in overlaps},
    )


def auroc(low: Sequence[float], high: Sequence[float]) -> float:
    """How often a value of ``high`` is above one of ``low``, ties counting half; NaN if either is empty."""
    if not low or not high:
        return float("nan")
    ranks = rankdata([*low, *high])[len(low) :]
    return float((ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(low) * len(high)))


def _overlap(
    members: Sequence[PairedTile], stain: str, painted: UInt8Array, side: int, mpp: float
) -> tuple[int, int, int] | None:
    """Pixels in both DAB masks, in the true one and in the painted one; None where there is no true image."""
    paths = [tile.stains.get(stain) for tile in members]
    present = [path for path in paths if path is not None]
    if len(present) < len(paths):
        return None
    true, found = dab_mask(compose_field(present, members[0].mpp, side, mpp)), dab_mask(painted)
    return int((true & found).sum()), int(true.sum()), int(found.sum())


def _abstention(overlaps: Sequence[tuple[int, int, int]], measured: Sequence[Scores]) -> dict[str, dict[str, float]]:
    """By measure and share kept, the pooled Dice."""
    counts = np.array(overlaps, np.float64)
    curves = {}
    for measure in ("unlike", "disagreement", "uncertainty"):
        order = np.argsort([scores[measure] for scores in measured], kind="stable")
        kept = {share: counts[order[: max(1, round(share * len(order)))]].sum(axis=0) for share in KEPT}
        curves[measure] = {f"{share:g}": float(2 * both / max(a + b, 1.0)) for share, (both, a, b) in kept.items()}
    return curves


def _slide_fields(text: str, side: int, mpp: float, most: int) -> Iterator[UInt8Array]:
    """Fields of a slide at the model's pixel size, evenly spread over a grid without overlap."""
    path, _, own = text.rpartition("@")
    given = float(own) if path else None
    with open_slide(Path(path or own)) as slide:
        view = ModelView(slide, slide.pixel_size(given), mpp)
        corners = [
            (x, y) for y in range(0, view.size[1] - side + 1, side) for x in range(0, view.size[0] - side + 1, side)
        ]
        count = min(most, len(corners))
        for x, y in (corners[number * len(corners) // count] for number in range(count)):
            yield np.ascontiguousarray(view.read(x, y, side, side))
