"""Cells as instances: the cells of a map by watershed, and how many cells two sets share.

What the client writes as GeoJSON and what evaluation scores are the same cells. Coordinates follow the convention of
slides: pixel 0 spans [0, 1), so its centre lies at 0.5.

Most cells touch no other. What is expensive is done only where it decides something: distances inside small windows
around connected regions, the watershed only on regions that hold several peaks.

Shapes: H, W of a map; N peaks or cells; P pixels that belong to cells; K regions that are connected by sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial.distance import cdist
from skimage.segmentation import watershed

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.imaging.outlines import Outlines, follow_outlines
from staindiffuser.imaging.peaks import distances_to_edge, local_peaks, smoothed

__all__ = ["MATCH_UM", "PROBABILITY", "Cells", "cell_centroids", "count_matches", "find_cells"]

MATCH_UM = 6.0
"""Two centroids at most this far apart may be the same cell (docs, "The mathematics")."""
PROBABILITY = 128
"""Of 255: from this value on a pixel belongs to a cell."""
SMALLEST_UM2 = 12.0
"""A lymphocyte's nucleus has about 30 µm²; what is smaller than this is a speck."""
APART_UM = 3.0
"""The peaks of two cells are at least this far apart."""
_WINDOWS = (12, 16, 20, 24, 32, 48)
"""Sides of the windows in which the distances of small regions are computed, many at once, pixels."""
_DENSE = 0.4
"""Share of a map that the boxes of its regions cover from which on distances are computed everywhere at once."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of a map, from top to bottom by their innermost pixels."""

    centroids: NDArray[np.float64]
    """[N, 2] x, y, pixels; a pixel's centre is at + 0.5."""
    areas: NDArray[np.int64]
    """[N], pixels."""
    probabilities: NDArray[np.float64]
    """[N], mean of the map over the cell, 0 … 1."""
    outlines: Outlines
    """Of each cell, if they were asked for; else none."""

    @classmethod
    def none(cls) -> Cells:
        """No cells."""
        nothing = np.zeros(0)
        return cls(
            centroids=np.zeros((0, 2)), areas=nothing.astype(np.int64), probabilities=nothing, outlines=Outlines.none()
        )

    def __len__(self) -> int:
        return len(self.areas)


@dataclass(frozen=True, kw_only=True)
class _Pixels:
    """The labelled pixels of an image, in reading order."""

    flat: NDArray[np.intp]
    """[P] flat indices."""
    y: NDArray[np.int32]
    x: NDArray[np.int32]
    label: NDArray[np.int32]

    @classmethod
    def of(cls, labels_HW: NDArray[np.int32], where: UInt8Array | BoolArray) -> _Pixels:
        """The pixels of a label image that are true in ``where``, [H, W]."""
        flat = np.flatnonzero(where.view(bool))
        y, x = np.divmod(flat.astype(np.int32), np.int32(labels_HW.shape[1]))
        return cls(flat=flat, y=y, x=x, label=labels_HW.ravel()[flat])


@dataclass(frozen=True, kw_only=True)
class _Regions:
    """Regions of a map that are connected by sides, numbered from 1."""

    count: int
    """K."""
    labels: NDArray[np.int32]
    """[H, W]."""
    pixels: _Pixels
    """All of their pixels."""
    boxes: NDArray[np.int32]
    """[4, K + 1] y0, x0, y1, x1."""


@dataclass(frozen=True, kw_only=True)
class _Measures:
    """What the pixels of each label amount to; entry 0 of each array means nothing."""

    centroids: NDArray[np.float64]
    """[K + 1, 2] x, y."""
    areas: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    first: NDArray[np.intp]
    """[K + 1], flat index of the first pixel in reading order."""

    @classmethod
    def of(cls, pixels: _Pixels, map_HW: UInt8Array, count: int) -> _Measures:
        """Measure the labels 1 to ``count``."""
        label, value = pixels.label, map_HW.ravel()[pixels.flat]
        areas = np.bincount(label, minlength=count + 1)
        mean_x, mean_y, mean = (
            np.bincount(label, values, minlength=count + 1) / np.maximum(1, areas)
            for values in (pixels.x, pixels.y, value)
        )
        first = np.zeros(count + 1, np.intp)
        first[label[::-1]] = pixels.flat[::-1]  # the last one written stays
        return cls(
            centroids=np.stack([mean_x, mean_y], axis=-1) + 0.5, areas=areas, probabilities=mean / 255, first=first
        )


class _Atlas:
    """The regions that hold several peaks, cut out, laid side by side and parted by watershed.

    Regions do not influence one another, so the parts are those that a watershed of the whole map would give.
    """

    def __init__(
        self,
        chosen: NDArray[np.intp],
        regions: _Regions,
        height_HW: FloatArray,
        map_HW: UInt8Array,
        peaks_N: NDArray[np.intp],
    ) -> None:
        """Part the regions.

        Args:
            chosen: labels of the regions.
            regions: all regions.
            height_HW: see :func:`_height`.
            map_HW: the map.
            peaks_N: flat indices of the peaks in these regions; the n-th makes the part n + 1.
        """
        y0, x0, y1, x1 = regions.boxes[:, chosen]
        tops, lefts, shape = _shelves(y1 - y0, x1 - x0, map_HW.shape[1])
        height, values, inside = np.zeros(shape, np.float32), np.zeros(shape, np.uint8), np.zeros(shape, bool)
        boxes = np.stack([chosen, y0, x0, y1, x1, tops, lefts], axis=-1).tolist()
        for region, top, left, bottom, right, to_y, to_x in boxes:
            here = np.s_[top:bottom, left:right]
            there = np.s_[to_y : to_y + bottom - top, to_x : to_x + right - left]
            height[there], values[there] = height_HW[here], map_HW[here]
            inside[there] = regions.labels[here] == region
        place = np.zeros(regions.count + 1, np.intp)
        place[chosen] = np.arange(len(chosen))
        place_N = place[regions.labels.ravel()[peaks_N]]
        self.displacements_N2 = np.stack([(x0 - lefts)[place_N], (y0 - tops)[place_N]], axis=-1).astype(np.float64)
        """From the atlas to the map, x, y, of each part."""
        y, x = np.divmod(peaks_N, map_HW.shape[1])
        markers = np.zeros(shape, np.int32)
        markers[y - (y0 - tops)[place_N], x - (x0 - lefts)[place_N]] = np.arange(1, len(peaks_N) + 1)
        self.labels: NDArray[np.int32] = watershed(-height, markers, mask=inside) if len(peaks_N) else markers
        pixels = _Pixels.of(self.labels, self.labels > 0)
        self.measures = _Measures.of(pixels, values, len(peaks_N))
        """Of each part, in the atlas."""


def find_cells(
    map_HW: UInt8Array, mpp: float, within: tuple[int, int, int, int] | None = None, *, outlines: bool = True
) -> Cells:
    """Split a map into cells: watershed of the distance to the edge, from its peaks.

    Args:
        map_HW: probability × 255, or a coarse mask; from 128 on a pixel belongs to a cell.
        mpp: pixel size, µm.
        within: x0, y0, x1, y1; only cells whose centroid has x0 ≤ x < x1 and y0 ≤ y < y1.
        outlines: also follow their outlines.
    """
    map_HW = np.ascontiguousarray(map_HW)
    positive = (map_HW >= PROBABILITY).view(np.uint8)
    regions = _regions_of(positive)
    if regions.count == 0:
        return Cells.none()
    height = _height(positive, regions)
    peaks_N = local_peaks(height, max(1, round(APART_UM / mpp)))
    region_N = regions.labels.ravel()[peaks_N]
    peaks_of_region = np.bincount(region_N, minlength=regions.count + 1)
    shared = peaks_of_region[region_N] > 1
    # A region with one peak is a cell as it is: the watershed would fill it from there.
    own = _Measures.of(regions.pixels, map_HW, regions.count)
    centroids, areas, probabilities = own.centroids[region_N], own.areas[region_N], own.probabilities[region_N]
    atlas = _Atlas(np.flatnonzero(peaks_of_region > 1), regions, height, map_HW, peaks_N[shared])
    centroids[shared] = atlas.measures.centroids[1:] + atlas.displacements_N2
    areas[shared], probabilities[shared] = atlas.measures.areas[1:], atlas.measures.probabilities[1:]
    keep = areas * mpp * mpp >= SMALLEST_UM2
    if within is not None:
        x, y = centroids.T
        keep &= (x >= within[0]) & (x < within[2]) & (y >= within[1]) & (y < within[3])
    followed = Outlines.none()
    if outlines:
        label, first = region_N.copy(), own.first[region_N]
        # The atlas lies below the map, its labels after the map's: one image in which all are traced at once.
        label[shared] = np.arange(1, len(atlas.displacements_N2) + 1) + regions.count
        first[shared] = atlas.measures.first[1:] + map_HW.size
        below = np.where(atlas.labels > 0, atlas.labels + np.int32(regions.count), 0)
        followed = follow_outlines([regions.labels, below], label[keep], first[keep])
        displacements = np.zeros((len(keep), 2))
        displacements[shared] = atlas.displacements_N2 - [0, map_HW.shape[0] + 1]
        followed = followed.moved(displacements[keep])
    return Cells(centroids=centroids[keep], areas=areas[keep], probabilities=probabilities[keep], outlines=followed)


def cell_centroids(map_HW: UInt8Array, mpp: float) -> NDArray[np.float64]:
    """The centroids of a map's cells; see :func:`find_cells`.

    Returns:
        [N, 2] x, y, µm.
    """
    centroids: NDArray[np.float64] = find_cells(map_HW, mpp, outlines=False).centroids * mpp
    return centroids


def count_matches(a_N2: NDArray[np.float64], b_M2: NDArray[np.float64], *, within: float = MATCH_UM) -> int:
    """The largest number of pairs, each point used once, that are at most ``within`` apart (Hopcroft and Karp 1973)."""
    if not len(a_N2) or not len(b_M2):
        return 0
    near = csr_array(cdist(a_N2, b_M2) <= within)
    return int((maximum_bipartite_matching(near, perm_type="column") >= 0).sum())


def _regions_of(positive: UInt8Array) -> _Regions:
    count, labels = cv2.connectedComponents(positive, connectivity=4, ltype=cv2.CV_32S)
    pixels = _Pixels.of(labels.astype(np.int32, copy=False), positive)
    label, y, x = pixels.label, pixels.y, pixels.x
    boxes = np.zeros((4, count), np.int32)
    boxes[0, label[::-1]], boxes[2, label] = y[::-1], y + 1  # in reading order: the last one written stays
    boxes[1] = positive.shape[1]
    np.minimum.at(boxes[1], label, x)
    np.maximum.at(boxes[3], label, x + 1)
    return _Regions(labels=labels.astype(np.int32, copy=False), pixels=pixels, boxes=boxes, count=count - 1)


def _height(positive: UInt8Array, regions: _Regions) -> FloatArray:
    """Distance to the edge after a Gaussian of 1 px, 0 outside the regions: float32 [H, W]."""
    distance = _distances(positive, regions)
    height = smoothed(distance, 1.0)
    return cv2.bitwise_and(height, height, mask=positive).astype(np.float32, copy=False)


def _distances(positive: UInt8Array, regions: _Regions) -> FloatArray:
    """Distance of each pixel to the nearest that belongs to no region; the map's frame is no edge."""
    h, w = positive.shape
    y0, x0, y1, x1 = regions.boxes[:, 1:]
    tall, wide = y1 - y0, x1 - x0
    if len(regions.pixels.flat) == positive.size:  # without any edge the frame has to be one
        return distances_to_edge(np.pad(positive, 1))[1:-1, 1:-1]
    if (tall * wide).sum() > _DENSE * positive.size:
        return distances_to_edge(positive)
    # The nearest edge of a pixel lies in the box of its region, or beside it. So a region needs no more than its box
    # and a margin of one pixel, which also keeps windows apart that are laid above one another.
    computed: list[FloatArray] = []
    begin, stride = np.zeros(regions.count + 1, np.int32), np.zeros(regions.count + 1, np.int32)
    total = 0
    left = np.ones(regions.count, bool)
    inside = (y0 > 0) & (x0 > 0) & (y1 < h) & (x1 < w)
    for side in _WINDOWS:
        chosen = np.flatnonzero(left & inside & (np.maximum(tall, wide) <= side - 2)) if side <= min(h, w) else left[:0]
        if not len(chosen):
            continue
        left[chosen] = False
        top, start = np.minimum(y0[chosen] - 1, h - side), np.minimum(x0[chosen] - 1, w - side)
        windows = sliding_window_view(positive, (side, side))[top, start]
        computed.append(distances_to_edge(windows.reshape(-1, side)).ravel())
        stride[chosen + 1] = side
        begin[chosen + 1] = total + np.arange(len(chosen)) * side * side - top * side - start
        total += computed[-1].size
    for number in np.flatnonzero(left).tolist():
        top, start = max(0, y0[number] - 1), max(0, x0[number] - 1)
        box = distances_to_edge(positive[top : y1[number] + 1, start : x1[number] + 1])
        computed.append(box.ravel())
        stride[number + 1], begin[number + 1] = box.shape[1], total - top * box.shape[1] - start
        total += box.size
    pixels = regions.pixels
    distances = np.zeros(positive.shape, np.float32)
    place = begin[pixels.label] + pixels.y * stride[pixels.label] + pixels.x
    distances.ravel()[pixels.flat] = np.concatenate(computed)[place]
    return distances


def _shelves(
    tall: NDArray[np.int32], wide: NDArray[np.int32], width: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], tuple[int, int]]:
    """Lay boxes on shelves, the tallest first, one pixel apart: their tops and lefts, and the shape of it all."""
    tops, lefts = np.zeros(len(tall), np.intp), np.zeros(len(tall), np.intp)
    top = left = bottom = 0
    for number in np.argsort(-tall, kind="stable").tolist():
        if left + wide[number] > width:
            top, left = bottom + 1, 0
        tops[number], lefts[number] = top, left
        left += int(wide[number]) + 1
        bottom = max(bottom, top + int(tall[number]))
    return tops, lefts, (bottom, width)
