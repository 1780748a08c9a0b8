"""What :mod:`staindiffuser.imaging.instances` does pixel by pixel.

Maps are padded: a frame of one pixel of background around them, so that each pixel has four neighbours. Flat indices
are those of the padded map. A run is what a region has of one row without a gap.

Shapes: H, W of the padded map; R runs; K regions that are connected by sides; N peaks or cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import BoolArray, FloatArray
from staindiffuser.imaging.compiled import compiled

__all__ = [
    "Regions",
    "connected_regions",
    "distances_inside",
    "flood",
    "measure",
    "peaks_inside",
    "smooth_inside",
    "without_twins",
]

Labels = NDArray[np.int32]
Indices = NDArray[np.int64]

_FAR = 30_000
"""Pixels; farther than any edge, and its square fits 32 bits."""


class Regions(NamedTuple):
    """Regions that are connected by sides, in reading order of their first pixels; maybe not all of a map."""

    labels: Labels
    """[H, W], the region of each pixel, numbered from 1."""
    runs: Indices
    """[R, 3], row, first column and the one behind the last, region by region, in reading order."""
    starts: Indices
    """[K + 1], where those of each region begin."""
    boxes: Indices
    """[K, 4], y0, x0, y1, x1."""
    sizes: Indices
    """[K], pixels."""


def connected_regions(positive_HW: BoolArray, within: tuple[int, int, int, int] | None = None) -> Regions:
    """Find the regions of a map, whose frame is not positive.

    Args:
        positive_HW: the map.
        within: y0, x0, y1, x1; regions that lie outside are left out.
    """
    height, width = positive_HW.shape
    positive = positive_HW.ravel()
    changes = np.flatnonzero(positive[1:] != positive[:-1]) + 1
    row, first = np.divmod(changes[::2], width)
    runs = np.stack([row, first, first + changes[1::2] - changes[::2]], axis=-1)
    return _connect(runs, positive_HW.shape, within or (0, 0, height, width))


@compiled
def _connect(runs: Indices, shape: tuple[int, ...], within: tuple[int, int, int, int]) -> Regions:
    """Join runs that touch one another in successive rows: union-find, the earliest run is the root."""
    root = np.arange(len(runs))
    above, number = 0, 0
    while number < len(runs):
        row = runs[number, 0]
        begin = number
        while above < begin and runs[above, 0] < row - 1:
            above += 1
        while number < len(runs) and runs[number, 0] == row:
            first, end = runs[number, 1], runs[number, 2]
            while above < begin and runs[above, 2] <= first:
                above += 1
            other = above
            while other < begin and runs[other, 1] < end:
                one, two = _root(root, number), _root(root, other)
                root[max(one, two)] = min(one, two)
                other += 1
            number += 1
        above = begin
    # A root stands for its region: how many runs it has, and its box.
    length, box_of = np.zeros(len(runs), np.int64), np.empty((len(runs), 4), np.int64)
    for number in range(len(runs)):
        row, first, end = runs[number]
        parent = _root(root, number)
        root[number] = parent
        box = box_of[parent]
        if parent == number:
            box[0], box[1], box[2], box[3] = row, first, row + 1, end
        box[1], box[2], box[3] = min(box[1], first), row + 1, max(box[3], end)
        length[parent] += 1
    y0, x0, y1, x1 = within
    count = total = 0
    for number in range(len(runs)):
        box = box_of[number]
        if length[number] and (box[0] >= y1 or box[1] >= x1 or box[2] <= y0 or box[3] <= x0):
            length[number] = 0
        count += length[number] > 0
        total += length[number]
    region_of, starts = np.empty(len(runs), np.int64), np.zeros(count + 1, np.int64)
    boxes = np.empty((count, 4), np.int64)
    region = 0
    for number in range(len(runs)):
        if length[number]:
            region_of[number], boxes[region] = region, box_of[number]
            starts[region + 1] = starts[region] + length[number]
            region += 1
    labels, place = np.zeros(shape, np.int32), starts[:-1].copy()
    ordered, sizes = np.empty((total, 3), np.int64), np.zeros(count, np.int64)
    for number in range(len(runs)):
        if length[root[number]]:
            region = region_of[root[number]]
            row, first, end = runs[number]
            ordered[place[region]] = runs[number]
            place[region] += 1
            sizes[region] += end - first
            labels[row, first:end] = region + 1
    return Regions(labels, ordered, starts, boxes, sizes)


@compiled
def _root(root: Indices, number: int) -> int:
    while root[number] != number:
        root[number] = root[root[number]]
        number = root[number]
    return number


@compiled
def distances_inside(positive_HW: BoolArray, regions: Regions) -> FloatArray:
    """Euclidean distance of each pixel to the nearest that belongs to no region; the map's frame is no edge.

    The nearest edge of a pixel lies in the box of its region, or beside it.

    Returns:
        float32 [H, W]; 0 outside the regions.
    """
    height, width = positive_HW.shape
    distance = np.zeros((height, width), np.float32)
    buffer = np.empty(_largest(regions.boxes, 2), np.int32)
    for region in range(len(regions.boxes)):
        top, bottom = max(1, regions.boxes[region, 0] - 1), min(height - 1, regions.boxes[region, 2] + 1)
        left, right = max(1, regions.boxes[region, 1] - 1), min(width - 1, regions.boxes[region, 3] + 1)
        # Within the column first, as in Saito and Toriwaki (1994); then along the row, no farther than the best so far.
        gap = buffer[: (bottom - top) * (right - left)].reshape(bottom - top, right - left)
        for y in range(bottom - top):
            line, this, before = positive_HW[top + y, left:right], gap[y], gap[max(0, y - 1)]
            for x in range(right - left):
                this[x] = (min(before[x] + 1, _FAR) if y else _FAR) if line[x] else 0
        for y in range(bottom - top - 2, -1, -1):
            this, behind = gap[y], gap[y + 1]
            for x in range(right - left):
                this[x] = min(this[x], behind[x] + 1)
        for number in range(regions.starts[region], regions.starts[region + 1]):
            row, first, end = regions.runs[number]
            gaps, target = gap[row - top, first - left : end - left], distance[row, first:end]
            to_left, to_right = 1 if first > 1 else _FAR, 1 if end < width - 1 else _FAR
            for x in range(end - first):
                # Where the run ends, the gap is 0.
                aside = min(x + to_left, end - first - 1 - x + to_right)
                best = min(gaps[x], aside)
                best *= best
                aside = 1
                while aside * aside < best:
                    if aside <= x:
                        best = min(best, aside * aside + gaps[x - aside] * gaps[x - aside])
                    if x + aside < end - first:
                        best = min(best, aside * aside + gaps[x + aside] * gaps[x + aside])
                    aside += 1
                target[x] = np.sqrt(np.float32(best))
    return distance


@compiled
def _largest(boxes: Indices, margin: int) -> int:
    """Pixels of the largest box that is ``margin`` taller and wider."""
    largest = 0
    for region in range(len(boxes)):
        tall, wide = boxes[region, 2] - boxes[region, 0], boxes[region, 3] - boxes[region, 1]
        largest = max(largest, (tall + margin) * (wide + margin))
    return largest


@compiled
def smooth_inside(
    distance_HW: FloatArray, weights: tuple[float, float, float, float, float], regions: Regions
) -> FloatArray:
    """The distances after a Gaussian that reaches four pixels, reflected at the map's frame, 0 outside the regions.

    Args:
        distance_HW: float32 [H, W], see :func:`distances_inside`.
        weights: float32, from the middle outwards.
        regions: of the map.

    Returns:
        float32 [H, W].
    """
    height, width = distance_HW.shape
    smooth = np.zeros((height, width), np.float32)
    largest = _largest(regions.boxes, 8)
    source, along, both = np.empty(largest, np.float32), np.empty(largest, np.float32), np.empty(largest, np.float32)
    for region in range(len(regions.boxes)):
        y0, x0, y1, x1 = regions.boxes[region]
        wide = x1 - x0 + 8
        for row in range(y1 - y0 + 8):
            y = _reflected(y0 - 4 + row, height)
            line = source[row * wide : (row + 1) * wide]
            if x0 > 4 and x1 < width - 4:
                line[:] = distance_HW[y, x0 - 4 : x1 + 4]
            else:
                for x in range(wide):
                    line[x] = distance_HW[y, _reflected(x0 - 4 + x, width)]
        # All rows as one: what mixes the end of a row with the beginning of the next is not used.
        n = (y1 - y0 + 8) * wide - 8
        _weighted(
            weights, source[4 : n + 4],
            source[3 : n + 3], source[5 : n + 5], source[2 : n + 2], source[6 : n + 6],
            source[1 : n + 1], source[7 : n + 7], source[0:n], source[8 : n + 8], along[4 : n + 4],
        )  # fmt: skip
        n = (y1 - y0) * wide
        _weighted(
            weights, along[4 * wide : 4 * wide + n],
            along[3 * wide : 3 * wide + n], along[5 * wide : 5 * wide + n],
            along[2 * wide : 2 * wide + n], along[6 * wide : 6 * wide + n],
            along[wide : wide + n], along[7 * wide : 7 * wide + n], along[0:n], along[8 * wide : 8 * wide + n],
            both[:n],
        )  # fmt: skip
        for number in range(regions.starts[region], regions.starts[region + 1]):
            row, first, end = regions.runs[number]
            at = (row - y0) * wide + 4 - x0
            smooth[row, first:end] = both[at + first : at + end]
    return smooth


@compiled
def _weighted(
    weights: tuple[float, float, float, float, float], middle: FloatArray,
    a1: FloatArray, b1: FloatArray, a2: FloatArray, b2: FloatArray,
    a3: FloatArray, b3: FloatArray, a4: FloatArray, b4: FloatArray, target: FloatArray,
) -> None:  # fmt: skip
    """One pass of the Gaussian: pairs at the same distance first, so that mirrored shapes keep equal peaks."""
    w0, w1, w2, w3, w4 = weights
    for x in range(len(target)):
        target[x] = (
            w0 * middle[x] + w1 * (a1[x] + b1[x]) + w2 * (a2[x] + b2[x]) + w3 * (a3[x] + b3[x]) + w4 * (a4[x] + b4[x])
        )


@compiled
def _reflected(index: int, padded: int) -> int:
    """The row or column inside the padding that an index beyond the frame stands for: c b a | a b c | c b a."""
    last = padded - 2
    while index < 1 or index > last:
        index = 1 - index if index < 1 else 2 * last + 1 - index
    return index


@compiled
def peaks_inside(height_HW: FloatArray, regions: Regions, apart: int) -> Indices:
    """The pixels of the regions that no other within ``apart`` by rows and columns exceeds, in reading order.

    Returns:
        int64 [N], flat.
    """
    width = height_HW.shape[1]
    found = []
    for number in range(len(regions.runs)):
        row, first, end = regions.runs[number]
        here, above, below = height_HW[row], height_HW[row - 1], height_HW[row + 1]
        for x in range(first, end):
            value = here[x]
            if here[x - 1] > value or here[x + 1] > value or above[x] > value or below[x] > value:
                continue  # nearly all
            window = height_HW[max(0, row - apart) : row + apart + 1, max(0, x - apart) : x + apart + 1]
            if value > 0 and window.max() == value:
                found.append(row * width + x)
    return np.sort(np.array(found)) if len(found) else np.empty(0, np.int64)


@compiled
def without_twins(peaks: Indices, shape: tuple[int, ...], apart: int) -> Indices:
    """Of equally high peaks that are nearer than ``apart`` to one another, the first in reading order."""
    kept_HW, kept = np.zeros(shape, np.bool_), np.ones(len(peaks), np.bool_)
    for number in range(len(peaks)):
        y, x = peaks[number] // shape[1], peaks[number] % shape[1]
        if kept_HW[max(0, y - apart + 1) : y + apart, max(0, x - apart + 1) : x + apart].any():
            kept[number] = False
        else:
            kept_HW[y, x] = True
    return peaks[kept]


@compiled
def flood(height_HW: FloatArray, regions: Regions, peaks: Indices) -> None:
    """Deal each region's pixels to its peaks by watershed, from the highest pixel down, of equal ones the older first.

    The order is that of scikit-image's ``watershed(-height, markers, mask=region)``. A region with one peak is a cell
    as it is; the watershed would fill it from there.

    Args:
        height_HW: float32 [H, W], not negative.
        regions: their labels become the numbers of the peaks, from 1; 0 where a region has none.
        peaks: int64 [N], flat.
    """
    width = height_HW.shape[1]
    labels, starts = regions.labels.ravel(), regions.starts
    heights = height_HW.ravel().view(np.int32)  # floats that are not negative are ordered as their bits
    steps = np.array([-width, -1, 1, width])
    of_peak = labels[peaks] - 1
    order = np.argsort(of_peak, kind="mergesort")
    count = np.zeros(len(regions.sizes), np.int64)
    largest = 0
    for region in of_peak:
        count[region] += 1
        largest = max(largest, regions.sizes[region])
    heap = np.empty((largest, 2), np.int64)  # what comes first, its pixel
    at = 0
    for region in range(len(count)):
        label = -1 if count[region] > 1 else order[at] + 1 if count[region] else 0  # -1: not yet reached
        for number in range(starts[region], starts[region + 1]):
            row, first, end = regions.runs[number]
            labels[row * width + first : row * width + end] = label
        if label == -1:
            size = age = 0
            for number in order[at : at + count[region]]:
                labels[peaks[number]] = number + 1
                size = _push(heap, size, _key(heights[peaks[number]], 0), peaks[number])
            while size:
                pixel = heap[0, 1]
                size = _pop(heap, size)
                for step in steps:
                    if labels[pixel + step] == -1:
                        age += 1
                        labels[pixel + step] = labels[pixel]
                        size = _push(heap, size, _key(heights[pixel + step], age), pixel + step)
        at += count[region]


@compiled
def _key(height: int, age: int) -> int:
    first = 0x7FFFFFFF - np.int64(height)
    return (first << 32) | age  # type: ignore[return-value]  # NumPy's integers are those of the compiled loops


@compiled
def _push(heap: Indices, size: int, key: int, pixel: int) -> int:
    place = size
    while place and heap[(place - 1) >> 1, 0] > key:
        heap[place, 0], heap[place, 1] = heap[(place - 1) >> 1, 0], heap[(place - 1) >> 1, 1]
        place = (place - 1) >> 1
    heap[place, 0], heap[place, 1] = key, pixel
    return size + 1


@compiled
def _pop(heap: Indices, size: int) -> int:
    size -= 1
    key, pixel = heap[size, 0], heap[size, 1]
    place = 0
    while 2 * place + 1 < size:
        below = 2 * place + 1
        if below + 1 < size and heap[below + 1, 0] < heap[below, 0]:
            below += 1
        if key <= heap[below, 0]:
            break
        heap[place, 0], heap[place, 1] = heap[below, 0], heap[below, 1]
        place = below
    heap[place, 0], heap[place, 1] = key, pixel
    return size


@compiled
def measure(map_HW: NDArray[np.uint8], regions: Regions, count: int) -> tuple[Indices, NDArray[np.float64], Indices]:
    """What the pixels of each label amount to.

    Args:
        map_HW: the padded map.
        regions: after :func:`flood`.
        count: N; labels are 1 to N.

    Returns:
        int64 [N], areas; float64 [N, 3], means of x, y (of the map without its frame) and of the map's values; int64
        [N], flat index of the first pixel in reading order.
    """
    width = map_HW.shape[1]
    sums, first_of = np.zeros((count + 1, 4), np.int64), np.full(count + 1, -1)
    for number in range(len(regions.runs)):
        row, first, end = regions.runs[number]
        labels, values = regions.labels[row], map_HW[row]
        while first < end:
            cell, x, total = labels[first], first, 0
            while x < end and labels[x] == cell:
                total += values[x]
                x += 1
            if first_of[cell] < 0:
                first_of[cell] = row * width + first
            length = x - first
            sums[cell, 0] += length
            sums[cell, 1] += length * (first + x - 3) // 2  # of x - 1, over the pixels
            sums[cell, 2] += length * (row - 1)
            sums[cell, 3] += total
            first = x
    means = np.empty((count, 3))
    for cell in range(count):
        for column in range(3):
            means[cell, column] = sums[cell + 1, column + 1] / sums[cell + 1, 0]
    return sums[1:, 0].copy(), means, first_of[1:].copy()
