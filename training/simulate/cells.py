"""The cells of a piece of tissue: where each lies, of which kind, how large, and what it truly carries."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from staindiffuser.imaging.arrays import BoolArray, FloatArray
from staindiffuser.training.simulate.randomness import jittered
from staindiffuser.training.simulate.tissue import STEP, Points, Tissue
from staindiffuser.training.simulate.world import World

__all__ = ["REACH", "Cells", "Kind", "erythrocytes", "place_cells", "vacuoles"]

REACH = 44
"""How far outside a box cells are placed, pixels: what is within reach of its pixels, and what could displace that."""
BLASTS = 0.3
"""Share of centroblasts among the cells of a follicle's core: large, pale nuclei between the small B cells."""


class Kind(IntEnum):
    """What a cell is. Only T lymphocytes carry CD3, only the epithelial kinds CK8/18."""

    EPITHELIAL = 0
    SQUAMOUS = 1
    LYMPHOCYTE = 2
    PLASMA = 3
    FIBROBLAST = 4
    ENDOTHELIAL = 5
    MUSCLE = 6
    GRANULOCYTE = 7
    DEBRIS = 8
    ERYTHROCYTE = 9
    MACROPHAGE = 10
    CENTROBLAST = 11


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Cells as columns; N of them. Lengths are pixels."""

    x: FloatArray
    y: FloatArray
    """World coordinates of the nucleus."""
    kind: npt.NDArray[np.int8]
    length: FloatArray
    """Semi-major axis of the nucleus."""
    width: FloatArray
    """Semi-minor axis."""
    angle: FloatArray
    """Of the major axis, radians."""
    numbers: FloatArray
    """Uniform numbers [6, N] for whatever else differs from cell to cell."""
    t_cell: BoolArray
    """Whether a lymphocyte is a T cell: the truth."""
    t_context: BoolArray
    """Whether its neighbourhood says so: differs from the truth for half of the undecidable cells."""

    def __len__(self) -> int:
        return len(self.x)

    def moved(self, dx: float, dy: float) -> Cells:
        """The same cells, shifted by pixels."""
        return dataclasses.replace(self, x=self.x + np.float32(dx), y=self.y + np.float32(dy))


@dataclass(frozen=True, kw_only=True)
class _Layer:
    x: FloatArray
    y: FloatArray
    kind: npt.NDArray[np.int8]
    length: FloatArray
    width: FloatArray
    angle: FloatArray
    room: FloatArray
    """Radius of the disc that two cells may not share."""
    rank: FloatArray
    """Of two cells too close the one of lower rank goes."""
    numbers: FloatArray


def place_cells(world: World, tissue: Tissue, box: tuple[int, int, int, int]) -> Cells:
    """The cells of a box of world pixels (x0, y0, x1, y1) and of a margin of ``REACH`` around it."""
    grown = _grown(box)
    layers = [_stroma(world, tissue, grown), _lymphoid(world, tissue, grown), _macrophages(world, tissue, grown)]
    # The others only where there is something for them to lie in: of most squares, nothing.
    if float(tissue.depth.max()) > -4:
        layers += [_epithelium(world, tissue, grown), _debris(world, tissue, grown)]
    if float(tissue.muscle.max()) > 0:
        layers.append(_muscle(world, tissue, grown))
    if float(tissue.vessel.max()) > 0:
        layers.append(_endothelium(world, tissue, grown))
    columns = {
        name: np.concatenate([getattr(layer, name) for layer in layers], axis=-1)
        for name in ("x", "y", "kind", "length", "width", "angle", "room", "rank", "numbers")
    }
    kept = _spread(columns["x"], columns["y"], columns["room"], columns["rank"])
    columns = {name: values[..., kept] for name, values in columns.items()}
    x, y, numbers = columns["x"], columns["y"], columns["numbers"]
    context = (columns["kind"] == Kind.LYMPHOCYTE) & (tissue.at(tissue.core, x, y) <= 0)
    undecidable = (columns["kind"] == Kind.LYMPHOCYTE) & (numbers[5] < world.config.undecidable_share)
    # The low digits of a number whose high digits rotate the nucleus: its shape must not reveal the coin toss.
    coin = (numbers[4] * np.float32(4096)) % 1 < 0.5
    return Cells(
        x=x, y=y, kind=columns["kind"], length=columns["length"], width=columns["width"], angle=columns["angle"],
        numbers=numbers, t_context=context, t_cell=np.where(undecidable, coin, context),
    )  # fmt: skip


def erythrocytes(
    world: World, tissue: Tissue, box: tuple[int, int, int, int]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Red blood cells in the bores of vessels: x [N], y [N], radius [N]."""
    s = world.architecture.scale
    if float(tissue.glass.max()) < 0:
        return (np.empty(0, np.float32),) * 3
    x, y, u = jittered(world.key, 70, 8.0 * s, _grown(box), jitter=0.8)
    p = tissue.points(x, y)
    there = (p.read(tissue.bore) > 3.0) & (p.read(tissue.bloody) > 0.5) & (u[0] < 0.9)
    there |= (u[0] > 0.9993) & (p.read(tissue.depth) < -4) & (p.read(tissue.glass) > 5)
    return x[there], y[there], ((3.5 + 0.9 * u[1]) * s)[there].astype(np.float32)


def vacuoles(world: World, tissue: Tissue, cells: Cells) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mucin vacuoles of goblet cells, between nucleus and lumen: x [N], y [N], radius [N]."""
    a = world.architecture
    goblet = np.flatnonzero((cells.kind == Kind.EPITHELIAL) & (cells.numbers[5] < a.goblets))
    x, y, u = cells.x[goblet], cells.y[goblet], cells.numbers[:, goblet]
    gx, gy = _slope(tissue, tissue.depth, x, y)
    radius = np.float32(a.scale) * (4.5 + 4.0 * u[1])
    away = cells.length[goblet] * 0.8 + radius * 0.9
    return x + gx * away, y + gy * away, radius.astype(np.float32)


def _grown(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return box[0] - REACH, box[1] - REACH, box[2] + REACH, box[3] + REACH


def _slope(tissue: Tissue, values: FloatArray, x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Unit direction in which a field rises, at points."""
    h = np.float32(STEP)
    dx = tissue.at(values, x + h, y) - tissue.at(values, x - h, y)
    dy = tissue.at(values, x, y + h) - tissue.at(values, x, y - h)
    norm = np.sqrt(dx * dx + dy * dy) + np.float32(1e-3)
    return dx / norm, dy / norm


def _clear(tissue: Tissue, p: Points) -> BoolArray:
    """Where there is tissue, and neither fat, mucin nor the bore of a vessel."""
    return (
        (p.read(tissue.glass) > 4) & (p.read(tissue.fat) < 0) & (p.read(tissue.mucin) < 0) & (p.read(tissue.bore) < -2)
    )


def _epithelium(world: World, tissue: Tissue, box: tuple[int, int, int, int]) -> _Layer:
    a, s = world.architecture, np.float32(world.architecture.scale)
    columnar = a.organ == "crypts" or a.surface > 0
    spacing = (7.6 if columnar else 9.4) * float(s) * min(a.nuclear_size, 1.25)
    x, y, u = jittered(world.key, 50, spacing, box, jitter=0.9)
    p = tissue.points(x, y)
    depth = p.read(tissue.depth)
    inside = (depth > -2 * s) & (p.read(tissue.lumen) < -3 * s) & (p.read(tissue.glass) > 3)
    inside &= (p.read(tissue.keratin) < -2) & (p.read(tissue.necrosis) < 0)
    x, y, u, depth, p = x[inside], y[inside], u[:, inside], depth[inside], p[inside]
    squamous = p.read(tissue.squamous) > 0.5
    gx, gy = _slope(tissue, tissue.depth, x, y)
    thickness = np.float32(a.thickness) * s
    if a.organ == "crypts":
        aligned = np.ones(len(x), bool)
    else:
        # A palisade along the basement membrane; above it cells lie freely.
        aligned = depth < 13 * s
        if a.surface > 0:
            aligned |= np.abs(p.read(tissue.glass) + depth - np.float32(a.surface) * s) < 6
    target = (8.5 + 3.0 * (u[0] - 0.5)) * s + u[1] * np.float32(a.stratification) * (thickness - 12 * s)
    target = np.where(squamous, (7.0 + 3.0 * u[0]) * s, target)
    move = np.where(aligned, target - depth, 0.0)
    near = np.abs(move) < 12 * s
    x, y = x + gx * np.where(near, move, 0), y + gy * np.where(near, move, 0)
    keep = near & ((u[2] < a.epithelial_density) | aligned)
    size = 5.6 * s * np.float32(a.nuclear_size) * np.exp(np.float32(a.pleomorphism) * (u[3] + u[4] + u[5] - 1.5) * 2)
    across = np.arctan2(gy, gx)
    upper = np.clip((depth / s - 12) / np.float32(max(a.keratin - 12, 20)), 0, 1)
    stretch = np.where(aligned, 1.25 + np.float32(a.stratification) + 0.6 * u[5], 1.05 + 0.4 * u[5])
    length, width = size * np.sqrt(stretch), size / np.sqrt(stretch)
    angle = np.where(aligned, across + 0.5 * (u[4] - 0.5), 2 * np.pi * u[4])
    # Towards the surface squamous cells grow wide and lie flat, and their nuclei shrink.
    flat = squamous & ~aligned
    length, width = (
        np.where(flat, length * (1 - 0.2 * upper), length),
        np.where(flat, width * (1 - 0.45 * upper), width),
    )
    angle = np.where(flat, across + np.pi / 2 + (u[4] - 0.5) * 2.2 * (1 - 0.7 * upper), angle)
    room = np.where(aligned, width * 0.86, size * (0.92 + 0.2 * u[0]))
    room = np.where(flat, size * (1.0 + 1.1 * upper), room)
    return _Layer(
        x=x[keep], y=y[keep], kind=np.where(squamous, Kind.SQUAMOUS, Kind.EPITHELIAL).astype(np.int8)[keep],
        length=length[keep], width=width[keep], angle=angle[keep].astype(np.float32), room=room[keep],
        rank=(u[2] + 1.0)[keep], numbers=u[:, keep],
    )  # fmt: skip


def _stroma(world: World, tissue: Tissue, box: tuple[int, int, int, int]) -> _Layer:
    a, s = world.architecture, np.float32(world.architecture.scale)
    x, y, u = jittered(world.key, 51, 15.0 * float(s), box)
    some = u[0] < 0.75 * a.fibroblasts
    x, y, u = x[some], y[some], u[:, some]
    p = tissue.points(x, y)
    keep = _clear(tissue, p) & (p.read(tissue.depth) < -4) & (p.read(tissue.muscle) < 0)
    density = np.float32(a.fibroblasts) * (0.75 - 0.35 * p.read(tissue.loose))
    keep &= (p.read(tissue.follicle) < 0) & (u[0] < density)
    return _spindles(tissue, x[keep], y[keep], u[:, keep], Kind.FIBROBLAST, 9.5 * s, 2.6 * s)


def _muscle(world: World, tissue: Tissue, box: tuple[int, int, int, int]) -> _Layer:
    s = np.float32(world.architecture.scale)
    x, y, u = jittered(world.key, 52, 19.0 * float(s), box)
    p = tissue.points(x, y)
    keep = _clear(tissue, p) & (p.read(tissue.muscle) > 0) & (u[0] < 0.55)
    return _spindles(tissue, x[keep], y[keep], u[:, keep], Kind.MUSCLE, 11.5 * s, 2.7 * s)


def _spindles(
    tissue: Tissue, x: FloatArray, y: FloatArray, u: FloatArray, kind: Kind, length: np.float32, width: np.float32
) -> _Layer:
    gx, gy = _slope(tissue, tissue.across, x, y)
    angle = np.arctan2(gy, gx) + np.pi / 2 + 0.6 * (u[1] - 0.5)
    semi_major = length * (0.55 + 0.8 * u[2])
    semi_minor = width * (0.75 + 0.7 * u[3] ** 2)
    return _Layer(
        x=x, y=y, kind=np.full(len(x), kind, np.int8), length=semi_major.astype(np.float32),
        width=semi_minor.astype(np.float32), angle=angle.astype(np.float32),
        room=(semi_minor * 1.6).astype(np.float32), rank=u[0], numbers=u,
    )  # fmt: skip


def _lymphoid(world: World, tissue: Tissue, box: tuple[int, int, int, int]) -> _Layer:
    a, s = world.architecture, np.float32(world.architecture.scale)
    x, y, u = jittered(world.key, 53, 10.2 * float(s), box, jitter=0.62)
    p = tissue.points(x, y)
    follicle = p.read(tissue.follicle)
    depth = p.read(tissue.depth)
    infiltrate = p.read(tissue.infiltrate)
    chance = np.where(depth < -3, 0.55 * infiltrate**2, 0.03 * infiltrate)
    chance = np.where(p.read(tissue.muscle) > 0, 0.15 * chance, chance)
    chance = np.where(follicle > 0, 0.93, np.maximum(chance, 0.5 * np.exp(np.minimum(follicle, 0) / 9)))
    keep = u[0] < chance
    x, y, u, follicle, p = x[keep], y[keep], u[:, keep], follicle[keep], p[keep]
    keep = _clear(tissue, p) & (p.read(tissue.lumen) < -4) & (p.read(tissue.keratin) < -4)
    x, y, u, follicle = x[keep], y[keep], u[:, keep], follicle[keep]
    other = (u[1] < a.plasma) & (follicle < 0)
    # Blasts among the B cells of a core are what shows in H&E that it is one: without them nothing would tell where the
    # rim of T cells ends.
    blast = (u[1] < BLASTS) & (p.read(tissue.core) > 0)[keep]
    kind = np.where(other, np.where(u[2] < 0.75, Kind.PLASMA, Kind.GRANULOCYTE), Kind.LYMPHOCYTE)
    kind = np.where(blast, Kind.CENTROBLAST, kind).astype(np.int8)
    size = np.where(blast, 6.9, np.where(other, 5.4, 5.1)) * s * (0.88 + 0.28 * u[3])
    return _Layer(
        x=x, y=y, kind=kind, length=(size * (1.02 + 0.16 * u[2])).astype(np.float32), width=size.astype(np.float32),
        angle=(2 * np.pi * u[4]).astype(np.float32), room=(size * 0.72).astype(np.float32),
        rank=u[3] + np.where(blast, 1.0, 0.5).astype(np.float32), numbers=u,
    )  # fmt: skip


def _macrophages(world: World, tissue: Tissue, box: tuple[int, int, int, int]) -> _Layer:
    """Round cells with the nucleus and the cytoplasm of epithelium, lying singly or in loose groups in the stroma."""
    a, s = world.architecture, np.float32(world.architecture.scale)
    x, y, u = jittered(world.key, 56, 17.0 * float(s), box, jitter=0.8)
    some = u[0] < a.macrophages
    x, y, u = x[some], y[some], u[:, some]
    p = tissue.points(x, y)
    keep = _clear(tissue, p) & (p.read(tissue.depth) < -12) & (p.read(tissue.muscle) < 0)
    chance = np.float32(a.macrophages) * np.clip(2.2 * p.read(tissue.loose) - 0.4, 0, 1)
    keep &= (p.read(tissue.follicle) < -4) & (u[0] < chance)
    x, y, u = x[keep], y[keep], u[:, keep]
    size = 5.3 * s * np.float32(a.nuclear_size) * (0.85 + 0.3 * u[3])
    return _Layer(
        x=x, y=y, kind=np.full(len(x), Kind.MACROPHAGE, np.int8), length=(size * (1.1 + 0.2 * u[2])).astype(np.float32),
        width=(size * 0.92).astype(np.float32), angle=(2 * np.pi * u[4]).astype(np.float32),
        room=(size * 1.15).astype(np.float32), rank=u[3] + 0.7, numbers=u,
    )  # fmt: skip


def _endothelium(world: World, tissue: Tissue, box: tuple[int, int, int, int]) -> _Layer:
    s = np.float32(world.architecture.scale)
    x, y, u = jittered(world.key, 54, 8.0 * float(s), box)
    p = tissue.points(x, y)
    bore = p.read(tissue.bore)
    keep = (np.abs(bore) < 5 * s) & (u[0] < 0.5) & (p.read(tissue.vessel) > 0)
    x, y, u, bore = x[keep], y[keep], u[:, keep], bore[keep]
    gx, gy = _slope(tissue, tissue.bore, x, y)
    move = -1.6 * s - bore
    length = (6.5 * s * (0.6 + 0.7 * u[2])).astype(np.float32)
    return _Layer(
        x=x + gx * move, y=y + gy * move, kind=np.full(len(x), Kind.ENDOTHELIAL, np.int8), length=length,
        width=(2.3 * s * (0.8 + 0.5 * u[3])).astype(np.float32), angle=np.arctan2(gx, -gy),
        room=(length * 0.9).astype(np.float32), rank=u[1] + 1.2, numbers=u,
    )  # fmt: skip


def _debris(world: World, tissue: Tissue, box: tuple[int, int, int, int]) -> _Layer:
    s = np.float32(world.architecture.scale)
    x, y, u = jittered(world.key, 55, 11.0 * float(s), box)
    p = tissue.points(x, y)
    inside = (p.read(tissue.depth) > 2) & (p.read(tissue.necrosis) > 0)
    loose = (p.read(tissue.lumen) > 4) & (u[1] < 0.05) & (p.read(tissue.squamous) < 0.5)
    keep = ((inside & (u[0] < 0.35)) | (loose & (u[0] < 0.3))) & (p.read(tissue.glass) > 0)
    x, y, u = x[keep], y[keep], u[:, keep]
    size = (s * (1.5 + 3.0 * u[2] ** 2)).astype(np.float32)
    return _Layer(
        x=x, y=y, kind=np.full(len(x), Kind.DEBRIS, np.int8), length=size * (1 + u[3]), width=size,
        angle=(2 * np.pi * u[4]).astype(np.float32), room=size, rank=u[0], numbers=u,
    )  # fmt: skip


def _spread(x: FloatArray, y: FloatArray, room: FloatArray, rank: FloatArray) -> BoolArray:
    """Which points stay when of any two that are too close the lower rank goes.

    Matérn's second hard-core process: a point is judged against all its neighbours, gone or not, so the decision is
    local and the same whatever box is asked for.
    """
    kept = np.ones(len(x), bool)
    if len(x) < 2:
        return kept
    pairs = cKDTree(np.stack([x, y], axis=1)).query_pairs(2.0 * float(room.max()), output_type="ndarray")
    first, second = pairs[:, 0], pairs[:, 1]
    close = (x[first] - x[second]) ** 2 + (y[first] - y[second]) ** 2 < (room[first] + room[second]) ** 2
    first, second = first[close], second[close]
    kept[np.where(rank[first] < rank[second], first, second)] = False
    return kept
