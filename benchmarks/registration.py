"""How well sections are registered: real pairs with landmarks, as scanned and rotated with a third erased; wrong pairs.

A wrong pair must be refused. Each is an image that a laboratory could pick by mistake: the section mirrored (mounted
upside down), or a section of another block.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.glass import glass_percentile
from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.registration.landmarks import Points, read_pair, target_error
from staindiffuser.training.prepare.registration.overview import overviews
from staindiffuser.training.prepare.registration.register import LEAST_SCORE, WORKING_SIDE, Registration, register
from staindiffuser.training.prepare.sections import Section

__all__ = [
    "OWN",
    "Case",
    "RegistrationReport",
    "SectionPair",
    "bench_registration",
    "find_section_pairs",
    "rotated_and_erased",
]


MPP = 10.0
"""Pixel size that the images are said to have, µm; it cancels out."""
SIDES = ("left", "top", "right", "bottom")
"""In the order in which rotations by 90° bring them to the left."""
FIRST_ANGLE = 22.5
"""Degrees, half way between two of the rotations that are tried first."""
OWN = "own"
"""The IHC that belongs to the H&E."""


@dataclass(frozen=True, kw_only=True)
class SectionPair:
    """Two sections, each with its landmarks beside it."""

    he: Path
    ihc: Path

    @property
    def name(self) -> str:
        """The IHC file's name."""
        return self.ihc.stem

    def landmarks(self) -> tuple[Points, Points]:
        """On the H&E and on the IHC, [n, 2], pixels.

        Raises:
            DataError: a file of landmarks cannot be read.
        """
        return read_pair(self.he.with_suffix(".csv"), self.ihc.with_suffix(".csv"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One registration."""

    pair: str
    ihc: str
    """``own``, or which wrong one: ``mirrored``, or another pair's name."""
    rotated: float
    """Degrees, counter-clockwise."""
    erased: str | None
    """Side of the IHC of which a third was made glass before it was rotated."""
    score: float
    correlation: float
    agreement: float
    used: bool
    """Whether the score was high enough."""
    median: float | None
    """Relative target registration error of the landmarks that were not erased; None for wrong pairs."""
    maximum: float | None
    """Its maximum, likewise."""
    seconds: float
    """Wall-clock time of reading and registering."""
    cpu_seconds: float
    """Processor time of all threads."""


@dataclass(frozen=True, kw_only=True)
class RegistrationReport:
    """What was measured."""

    least_score: float
    """A registration with a lower score is refused."""
    working_side: int
    """Pixels."""
    cores: int
    """Cores available to this process."""
    landmarks: dict[str, int]
    """Per pair."""
    before: dict[str, float]
    """Per pair, the median error where nothing is registered, as scanned."""
    cases: list[Case]

    def of(self, pair: str, *, own: bool = True, erased: bool | None = None) -> list[Case]:
        """The cases of a pair with its own IHC (or wrong ones), with or without a third erased (None: both)."""
        return [
            case
            for case in self.cases
            if case.pair == pair
            and (case.ihc == OWN) == own
            and (erased is None or (case.erased is not None) == erased)
        ]

    def lines(self) -> Iterator[str]:
        """A summary, two lines a pair."""
        for pair, before in self.before.items():
            (plain,), rotated, wrong = self.of(pair, erased=False), self.of(pair, erased=True), self.of(pair, own=False)
            yield (
                f"{pair}: as scanned median {plain.median:.2%}, largest {plain.maximum:.2%} of the diagonal (before "
                f"{before:.2%}, {self.landmarks[pair]} landmarks), score {plain.score:.2f}"
            )
            medians = [case.median for case in rotated if case.used and case.median is not None]
            if medians:
                yield (
                    f"  rotated, a third erased: {len(medians)} of {len(rotated)} used, medians {min(medians):.2%} to "
                    f"{max(medians):.2%}, lowest score {min(case.score for case in rotated):.2f}"
                )
            yield (
                f"  wrong pairs: {sum(not case.used for case in wrong)} of {len(wrong)} refused, highest score "
                f"{max(case.score for case in wrong):.2f}"
            )


def find_section_pairs(folder: Path) -> list[SectionPair]:
    """Pairs in ANHIR's layout: ``NAME_HE.jpg`` and IHC images in one folder, landmarks beside each as ``.csv``.

    Raises:
        DataError: there is none.
    """
    pairs = [
        SectionPair(he=he, ihc=ihc)
        for he in sorted(folder.rglob("*HE.jpg"))
        for ihc in sorted(he.parent.glob("*.jpg"))
        if ihc != he and ihc.with_suffix(".csv").is_file()
    ]
    if not pairs:
        raise DataError(f"{folder} holds no pair: expected NAME_HE.jpg and another image, each with a .csv beside it")
    return pairs


def rotated_and_erased(
    image: UInt8Array, points: Points, degrees: float, side: str | None
) -> tuple[UInt8Array, Points, npt.NDArray[np.bool_]]:
    """An image with a third of it made glass, then rotated on a canvas that holds all of it.

    Args:
        image: uint8 [H, W, 3].
        points: [n, 2] (x, y) on it, pixels.
        degrees: counter-clockwise.
        side: of :data:`SIDES`, or None to erase nothing.

    Returns:
        The image, the points on it, and which of them were not erased.
    """
    height, width = image.shape[:2]
    there = np.ones((height, width), bool)
    if side is not None:
        left = np.rot90(there, SIDES.index(side))  # a view
        left[:, : left.shape[1] // 3] = False
    glass = np.rint(glass_percentile(image))
    kept = np.where(there[..., None], image, glass.astype(np.uint8))
    cos, sin = abs(np.cos(np.radians(degrees))), abs(np.sin(np.radians(degrees)))
    # Not a pixel more for what is rounding only, at multiples of 90°.
    size = (int(np.ceil(width * cos + height * sin - 1e-6)), int(np.ceil(width * sin + height * cos - 1e-6)))
    turn = np.asarray(cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0), np.float64)
    turn[:, 2] += (size[0] - width) / 2, (size[1] - height) / 2
    fill = tuple(float(value) for value in glass)
    rotated = np.asarray(cv2.warpAffine(kept, turn, size, flags=cv2.INTER_LINEAR, borderValue=fill), np.uint8)
    column, row = np.clip(np.rint(points).astype(int), 0, (width - 1, height - 1)).T
    return rotated, points @ turn[:, :2].T + turn[:, 2], there[row, column]


def bench_registration(
    folder: Path, *, angles: int = 8, progress: Callable[[str], None] = lambda line: None
) -> RegistrationReport:
    """Register every pair, as scanned and rotated by ``angles`` angles with a third erased; then with wrong IHC.

    What is measured is what ``prepare pairs`` does, but for its refusal of landmarks that are far apart.

    Args:
        folder: pairs in ANHIR's layout.
        angles: spread evenly over the circle.
        progress: told each result.

    Raises:
        DataError: the folder holds no pairs, or one cannot be read.
    """
    pairs = find_section_pairs(folder)
    poses: list[tuple[float, str | None]] = [(0.0, None)]
    poses += [(FIRST_ANGLE + 360 * index / angles, SIDES[index % len(SIDES)]) for index in range(angles)]
    report = RegistrationReport(
        least_score=LEAST_SCORE,
        working_side=WORKING_SIDE,
        cores=len(os.sched_getaffinity(0)),
        landmarks={},
        before={},
        cases=[],
    )
    with tempfile.TemporaryDirectory() as scratch:
        for pair in pairs:
            he_points, ihc_points = pair.landmarks()
            for ihc, image in _images(pair, pairs):
                diagonal = float(np.hypot(image.shape[0], image.shape[1]))
                if ihc == OWN:
                    report.landmarks[pair.name] = len(he_points)
                    before = target_error(he_points, ihc_points, he_points, diagonal).median
                    report.before[pair.name] = round(before, 5)
                for degrees, side in poses:
                    rotated, points, there = rotated_and_erased(image, ihc_points, degrees, side)
                    found, coordinates, seconds, cpu_seconds = _registered(pair.he, rotated, he_points, Path(scratch))
                    median = maximum = None
                    if ihc == OWN and there.any():
                        error = target_error(coordinates[there], points[there], he_points[there], diagonal)
                        median, maximum = round(error.median, 5), round(error.maximum, 5)
                    case = Case(
                        pair=pair.name,
                        ihc=ihc,
                        rotated=degrees,
                        erased=side,
                        score=found.score,
                        correlation=found.correlation,
                        agreement=found.agreement,
                        used=found.good,
                        median=median,
                        maximum=maximum,
                        seconds=round(seconds, 2),
                        cpu_seconds=round(cpu_seconds, 2),
                    )
                    report.cases.append(case)
                    progress(_line(case))
    return report


def _images(pair: SectionPair, pairs: Sequence[SectionPair]) -> Iterator[tuple[str, UInt8Array]]:
    """The pair's own IHC, and wrong ones: [H, W, 3]."""
    own = _read(pair.ihc)
    yield OWN, own
    yield "mirrored", np.ascontiguousarray(own[:, ::-1])
    yield from ((other.name, _read(other.ihc)) for other in pairs if other.he != pair.he)


def _read(path: Path) -> UInt8Array:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def _registered(he: Path, ihc: UInt8Array, points: Points, scratch: Path) -> tuple[Registration, Points, float, float]:
    """Register as ``prepare pairs`` does: what it found, where it puts ``points``, seconds, processor seconds."""
    path = scratch / "ihc.png"
    Image.fromarray(ihc).save(path, compress_level=1)
    begun, cpu = time.perf_counter(), time.process_time()
    with Section(he, mpp=MPP) as first, Section(path, mpp=MPP) as second:
        he_plane, planes = overviews(first, {"ihc": second})
        found = register(he_plane, planes["ihc"])
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
        coordinates = found.warp.points(first.pixels_to_um(points)) / MPP - 0.5
    return found, coordinates, seconds, cpu_seconds


def _line(case: Case) -> str:
    pose = f"rotated by {case.rotated:g}°, {case.erased} third erased" if case.erased else "as scanned"
    error = "" if case.median is None else f"median {case.median:.2%}, largest {case.maximum:.2%}, "
    verdict = "used" if case.used else "refused"
    return f"{case.pair}, IHC {case.ihc}, {pose}: {error}score {case.score:.2f}, {verdict}, {case.seconds:.1f} s"
