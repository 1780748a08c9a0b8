"""The tissue's map: where glass, epithelium, lumen, stroma, muscle, fat, follicles and vessels lie.

Computed on a grid of one point per 4 px and interpolated: structures are larger than that. A field "in pixels" is a
signed distance, positive inside, good near its zero. Every field is a function of the world's coordinates alone, so
neighbouring squares agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from staindiffuser.imaging.arrays import FloatArray
from staindiffuser.training.simulate.noise import field, fractal
from staindiffuser.training.simulate.randomness import jittered
from staindiffuser.training.simulate.world import World

__all__ = ["STEP", "Points", "Tissue", "build_tissue", "upsample"]

STEP = 4
"""Pixels per grid point."""
FAR = np.float32(1e3)
FLOOR = np.float32(-40.0)
"""Distance from objects that are farther than this, pixels. A deeper floor would make the cubic interpolation ring."""


@dataclass(frozen=True)
class Points:
    """Coordinates on a map's grid, prepared for interpolation."""

    base: npt.NDArray[np.int32]
    u: FloatArray
    v: FloatArray
    stride: int

    def read(self, values: FloatArray) -> FloatArray:
        """Bilinear values of a field at these coordinates, float32 [N]."""
        flat = values.ravel()
        top = flat[self.base]
        top += (flat[self.base + 1] - top) * self.u
        below = self.base + self.stride
        bottom = flat[below]
        bottom += (flat[below + 1] - bottom) * self.u
        bottom -= top
        bottom *= self.v
        top += bottom
        return top

    def __getitem__(self, chosen: npt.NDArray[np.bool_]) -> Points:
        """A subset of the points."""
        return Points(base=self.base[chosen], u=self.u[chosen], v=self.v[chosen], stride=self.stride)


@dataclass(frozen=True)
class Tissue:
    """Fields on the grid, float32 [h, w]; distances in pixels, positive inside."""

    x0: int
    y0: int
    """World coordinates of the first grid point."""
    glass: FloatArray
    """Distance into the tissue from the glass."""
    depth: FloatArray
    """Distance into the epithelium from its basement membrane."""
    lumen: FloatArray
    squamous: FloatArray
    """1 where epithelium is squamous, else 0."""
    keratin: FloatArray
    follicle: FloatArray
    """Distance into a lymphoid aggregate."""
    core: FloatArray
    """Distance into its core, where the B cells are."""
    vessel: FloatArray
    """Distance into a vessel's wall from outside."""
    bore: FloatArray
    """Distance into its lumen."""
    bloody: FloatArray
    """1 where the nearest vessel is full of blood, else 0."""
    muscle: FloatArray
    fat: FloatArray
    """Above 0 in fat tissue."""
    fat_cell: FloatArray
    """Distance from the nearest fat cell's membrane."""
    mucin: FloatArray
    """Above 0 in pools of mucin."""
    along: FloatArray
    across: FloatArray
    """Coordinates along and across the fibres, pixels."""
    loose: FloatArray
    """Looseness of the stroma, 0 to 1."""
    infiltrate: FloatArray
    """Density of single lymphocytes, 0 to 1."""
    fold: FloatArray
    necrosis: FloatArray

    def points(self, x: FloatArray, y: FloatArray) -> Points:
        """World coordinates [N] as points on the grid, at which fields are read."""
        u = (x - np.float32(self.x0)) * np.float32(1 / STEP)
        v = (y - np.float32(self.y0)) * np.float32(1 / STEP)
        h, w = self.glass.shape
        iu = np.clip(u.astype(np.int32), 0, w - 2)
        iv = np.clip(v.astype(np.int32), 0, h - 2)
        return Points(base=iv * w + iu, u=u - iu, v=v - iv, stride=w)

    def at(self, values: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
        """Bilinear values of a field of this map at world coordinates [N]."""
        return self.points(x, y).read(values)


@lru_cache(maxsize=64)
def _weights(points: int, first: float, samples: int, spacing: float) -> FloatArray:
    """Catmull–Rom interpolation from grid points to samples, as a matrix [samples, points].

    ``first`` is where the first sample lies and ``spacing`` how far apart they are, in grid points.
    """
    position = np.arange(samples) * spacing + first
    base = np.floor(position).astype(int)
    t = position - base
    taps = (
        -0.5 * t**3 + t**2 - 0.5 * t,
        1.5 * t**3 - 2.5 * t**2 + 1,
        -1.5 * t**3 + 2 * t**2 + 0.5 * t,
        0.5 * t**3 - 0.5 * t**2,
    )
    matrix = np.zeros((samples, points), np.float32)
    for offset, tap in enumerate(taps):
        matrix[np.arange(samples), np.clip(base + offset - 1, 0, points - 1)] += tap.astype(np.float32)
    return matrix


def upsample(tissue: Tissue, values: FloatArray, box: tuple[int, int, int, int]) -> FloatArray:
    """Cubic interpolation of a field to every pixel of a box (x0, y0, x1, y1): float32 [y1 - y0, x1 - x0]."""
    x0, y0, x1, y1 = box
    # Only the grid points that the box needs, with two to spare on each side.
    left, top = (x0 - tissue.x0) // STEP - 2, (y0 - tissue.y0) // STEP - 2
    right, bottom = -(-(x1 - tissue.x0) // STEP) + 3, -(-(y1 - tissue.y0) // STEP) + 3
    part = values[top:bottom, left:right]
    # Pixel x covers [x, x + 1): its centre lies at x + 0.5.
    rows = _weights(part.shape[0], (y0 + 0.5 - tissue.y0) / STEP - top, y1 - y0, 1 / STEP)
    columns = _weights(part.shape[1], (x0 + 0.5 - tissue.x0) / STEP - left, x1 - x0, 1 / STEP)
    result: FloatArray = (rows @ part) @ columns.T
    return result


def _distance(values: FloatArray, scale: float, step: float) -> FloatArray:
    """A noise field as a signed distance in pixels: divided by its slope (kept away from 0)."""
    dy, dx = np.gradient(values, step)
    typical = 2.0 / scale
    result: FloatArray = (values / np.sqrt(dx * dx + dy * dy + (0.5 * typical) ** 2)).astype(np.float32)
    return result


class _Plane:
    """The grid of one map, and a four times coarser one for fields that change slowly.

    Coordinates are unscaled pixels: a world's ``scale`` shrinks or grows the tissue as a whole.
    """

    def __init__(self, world: World, x0: int, y0: int, x1: int, y1: int) -> None:
        margin = 3
        s = np.float32(world.architecture.scale)
        self.world = world
        self.gx = np.arange(x0 // STEP - margin, x1 // STEP + margin + 1, dtype=np.float32) * STEP
        self.gy = np.arange(y0 // STEP - margin, y1 // STEP + margin + 1, dtype=np.float32) * STEP
        self.x, self.y = (np.ascontiguousarray(g) / s for g in np.meshgrid(self.gx, self.gy))
        self.axis_x, self.axis_y = self.gx / s, self.gy / s
        wide = 4 * STEP
        cx, cy = (np.arange(g[0] // wide - 2, g[-1] // wide + 4, dtype=np.float32) * wide for g in (self.gx, self.gy))
        self._wide_x, self._wide_y = (np.ascontiguousarray(g) / s for g in np.meshgrid(cx, cy))
        self._rows = _weights(len(cy), float((self.gy[0] - cy[0]) / wide), len(self.gy), 0.25)
        self._columns = _weights(len(cx), float((self.gx[0] - cx[0]) / wide), len(self.gx), 0.25)
        self.step = STEP / world.architecture.scale

    def noise(self, salt: int, scale: float) -> FloatArray:
        """A field of mean 0 and deviation 1 on the grid."""
        number = self.world.phase(salt)
        if scale < 110:
            return field(number, scale, self.x, self.y)
        return self._rows @ field(number, scale, self._wide_x, self._wide_y) @ self._columns.T

    def fractal(self, salt: int, scale: float, roughness: float = 0.5) -> FloatArray:
        """Two octaves of it."""
        number = self.world.phase(salt)
        if scale < 330:
            return fractal(number, scale, self.x, self.y, roughness=roughness)
        values = fractal(number, scale, self._wide_x, self._wide_y, roughness=roughness)
        return self._rows @ values @ self._columns.T

    def distance(self, values: FloatArray, scale: float) -> FloatArray:
        """A field as a signed distance to its zero, pixels."""
        return _distance(values, scale, self.step)


def build_tissue(world: World, x0: int, y0: int, x1: int, y1: int) -> Tissue:
    """The map of a box of world pixels, whose corners must be multiples of 4."""
    a = world.architecture
    p = _Plane(world, x0, y0, x1, y1)
    s = np.float32(a.scale)
    X, Y = p.x, p.y
    # Warp the plane a little, so that nothing is an exact ellipse.
    warped_x, warped_y = X + 7.0 * p.noise(1, 80.0), Y + 7.0 * p.noise(2, 80.0)
    fray = a.ragged * (p.noise(4, 24.0) + 0.5 * p.noise(44, 10.0))
    glass = p.distance(p.fractal(3, 900.0, 0.35) - np.float32(a.coverage), 900.0) + fray
    if world.extent is not None:
        centre_x, centre_y = world.extent[0] / 2 / a.scale, world.extent[1] / 2 / a.scale
        radius = np.sqrt(((X - centre_x) / centre_x) ** 2 + ((Y - centre_y) / centre_y) ** 2)
        shorter = min(centre_x, centre_y)
        glass = np.minimum(glass, (0.9 - radius) * shorter + 0.05 * shorter * p.noise(45, 400.0) + fray)

    depth, lumen, squamous, keratin = _epithelium(p, warped_x, warped_y, glass)
    follicle, core = _aggregates(p, warped_x, warped_y)
    vessel, bore, bloody = _vessels(p, warped_x, warped_y)
    outside = np.minimum(-depth - 4.0, glass - 10.0)
    vessel, bore = np.minimum(vessel, outside), np.minimum(bore, outside - 4.0)
    follicle = np.minimum(follicle, -depth - 2.0)
    muscle = p.distance(p.noise(6, 420.0) - np.float32(a.muscle_level), 420.0)
    muscle = np.minimum(np.minimum(muscle, -depth - 14.0), -follicle)
    fat = p.distance(p.noise(7, 420.0) - np.float32(a.fat_level), 420.0)
    fat = np.minimum(np.minimum(fat, -depth - 10.0), -vessel - 2.0)
    mucin = p.distance(p.fractal(8, 260.0) - np.float32(a.mucin_level), 260.0)
    mucin = np.minimum(np.minimum(mucin, -depth), np.minimum(-muscle, -vessel - 3))
    near = np.exp(np.minimum(depth, 0.0) / 38.0)
    swirl = 60.0 * p.noise(11, 700.0) + np.float32(a.waviness) * p.noise(12, 80.0) + 3.5 * p.noise(13, 22.0)
    angle = 2.0 * np.pi * world.phase(14)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    distances = {
        "glass": glass, "depth": depth, "lumen": lumen, "keratin": keratin, "follicle": follicle, "core": core,
        "vessel": vessel, "bore": bore, "muscle": muscle, "fat": fat, "mucin": mucin,
        "fat_cell": _fat_cells(p) if float(fat.max()) > -12 else np.zeros_like(X),
        "fold": p.distance(p.noise(16, 500.0) * p.noise(17, 700.0) - np.float32(a.folds), 300.0),
        "necrosis": p.distance(p.noise(18, 200.0) - np.float32(a.debris), 200.0),
    }  # fmt: skip
    plain = {
        "squamous": squamous,
        "bloody": bloody,
        "along": X * cos + Y * sin + 30.0 * p.noise(15, 400.0),
        "across": Y * cos - X * sin + swirl,
        "loose": np.clip(a.looseness + 0.28 * p.noise(9, 180.0), 0.0, 1.0),
        "infiltrate": np.clip(a.infiltrate * (0.35 + 0.75 * near + 0.55 * p.noise(10, 130.0)), 0.0, 1.0),
    }
    fields = {name: values * s for name, values in distances.items()} | plain
    return Tissue(
        x0=int(p.gx[0]), y0=int(p.gy[0]), **{name: v.astype(np.float32, copy=False) for name, v in fields.items()}
    )


def _epithelium(
    p: _Plane, bx: FloatArray, by: FloatArray, glass: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Depth, lumen, squamous and keratin."""
    world, a = p.world, p.world.architecture
    depth, lumen, keratin = (np.full(bx.shape, -FAR, np.float32) for _ in range(3))
    squamous = np.full(bx.shape, float(a.organ in ("squamous", "skin")), np.float32)
    level = np.float32(a.epithelial_level)
    if a.organ in ("squamous", "skin"):
        scale = 560.0 if a.organ == "squamous" else 420.0
        depth = p.distance(p.fractal(20, scale, 0.45) - level, scale) + 5.0 * p.noise(21, 60.0)
        keratin = depth - np.float32(a.keratin) + 16.0 * p.noise(22, 70.0)
        if a.organ == "skin":
            # Beyond the keratin lies the outside.
            lumen = depth - np.float32(a.keratin + 46.0) + 14.0 * p.noise(23, 40.0)
    elif a.organ == "crypts":
        depth, lumen = _crypts(p, bx, by)
    elif a.organ == "nests":
        sheet = fractal(world.phase(24), a.spacing, bx, by, roughness=0.5) - level
        sheet = np.minimum(sheet, p.fractal(5, 520.0, 0.4) + 0.9)
        depth = p.distance(sheet, a.spacing)
        lumen = np.minimum(p.distance(p.noise(25, 75.0) - np.float32(a.lumens), 75.0), depth - 14.0)
    else:
        # Small ducts and strands, far apart.
        depth = p.distance(field(world.phase(26), 150.0, bx, by) - level, 150.0)
        lumen = depth - 26.0
    if a.surface > 0:
        present = p.distance(p.noise(27, 700.0) + 0.3, 700.0)
        surface = np.minimum(np.float32(a.surface) - glass, np.minimum(glass + 60.0, present))
        depth = np.maximum(depth, surface)
    return depth, lumen, squamous, keratin


def _view(p: _Plane, x: float, y: float, reach: float) -> tuple[slice, slice]:
    """The part of the grid within reach of a point, the warp of the plane included."""
    reach += 32.0
    columns = slice(*np.searchsorted(p.axis_x, (x - reach, x + reach)).tolist())
    rows = slice(*np.searchsorted(p.axis_y, (y - reach, y + reach)).tolist())
    return rows, columns


def _ellipse(
    bx: FloatArray, by: FloatArray, x: float, y: float, radius: float, stretch: float, angle: float
) -> FloatArray:
    """Distance into an ellipse, across its minor axis."""
    dx, dy = bx - np.float32(x), by - np.float32(y)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along, across = (dx * c + dy * s) / np.float32(stretch), dy * c - dx * s
    return np.float32(radius) - np.sqrt(along * along + across * across)


def _box(p: _Plane) -> tuple[float, float, float, float]:
    return float(p.axis_x[0]) - 40, float(p.axis_y[0]) - 40, float(p.axis_x[-1]) + 40, float(p.axis_y[-1]) + 40


def _crypts(p: _Plane, bx: FloatArray, by: FloatArray) -> tuple[FloatArray, FloatArray]:
    world, a = p.world, p.world.architecture
    x, y, u = jittered(world.key, 30, a.spacing, _box(p), jitter=0.45)
    there = (fractal(world.phase(5), 520.0, x, y, roughness=0.4) > a.epithelial_level) & (u[0] < 0.93)
    depth, lumen = (np.full(bx.shape, FLOOR, np.float32) for _ in range(2))
    slant = 2 * np.pi * world.phase(31)
    for i in np.flatnonzero(there):
        radius = a.spacing * (0.34 + 0.14 * float(u[1, i]))
        stretch = 1.0 + 1.1 * float(u[2, i]) ** 3
        view = _view(p, x[i], y[i], radius * stretch + 32.0)
        d = _ellipse(bx[view], by[view], x[i], y[i], radius, stretch, slant + 1.2 * (float(u[3, i]) - 0.5))
        if d.size == 0:
            continue
        thickness = min(a.thickness * (0.85 + 0.3 * float(u[4, i])), radius - 2.5)
        np.maximum(depth[view], d, out=depth[view])
        np.maximum(lumen[view], d - np.float32(thickness), out=lumen[view])
    # The lumen's edge is not as smooth as the basement membrane.
    return depth, lumen + 3.0 * p.noise(32, 26.0)


def _discs(
    p: _Plane, salt: int, spacing: float, share: float, bx: FloatArray, by: FloatArray, radius: tuple[float, float]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Distance into the nearest of scattered discs, its radius, and a uniform number of it."""
    x, y, u = jittered(p.world.key, salt, spacing, _box(p), jitter=0.7)
    distance = np.full(bx.shape, FLOOR, np.float32)
    size, number = (np.zeros(bx.shape, np.float32) for _ in range(2))
    for i in np.flatnonzero(u[0] < share):
        r = radius[0] + (radius[1] - radius[0]) * float(u[1, i]) ** 2
        stretch = 1.0 + 0.9 * float(u[2, i]) ** 2
        view = _view(p, x[i], y[i], r * stretch + 24.0)
        d = _ellipse(bx[view], by[view], x[i], y[i], r, stretch, 2 * np.pi * float(u[3, i]))
        if d.size == 0:
            continue
        nearer = d > distance[view]
        np.copyto(distance[view], d, where=nearer)
        np.copyto(size[view], np.float32(r), where=nearer)
        np.copyto(number[view], u[4, i], where=nearer)
    return distance, size, number


def _aggregates(p: _Plane, bx: FloatArray, by: FloatArray) -> tuple[FloatArray, FloatArray]:
    distance, size, number = _discs(p, 40, 330.0, p.world.architecture.follicles, bx, by, (40.0, 180.0))
    distance = distance + 7.0 * p.noise(41, 50.0)
    # Only aggregates of some size have a core of B cells; the rim of T cells is an eighth to a third of the radius.
    return distance, np.where(size > 55.0, distance - size * (0.12 + 0.22 * number), FLOOR)


def _vessels(p: _Plane, bx: FloatArray, by: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    distance, size, number = _discs(p, 42, 130.0, p.world.architecture.vessels, bx, by, (5.5, 40.0))
    distance = distance + np.clip(0.12 * size, 0.5, 3.0) * p.noise(46, 30.0)
    return distance, distance - np.clip(0.2 * size, 2.5, 9.0), (number < 0.6).astype(np.float32)


def _fat_cells(p: _Plane) -> FloatArray:
    """Half the difference of the distances to the two nearest centres: 0 on the membranes."""
    x, y, _ = jittered(p.world.key, 43, 88.0, _box(p), jitter=0.6)
    first = np.full(p.x.shape, FAR, np.float32)
    second = first.copy()
    for cx, cy in zip(x.tolist(), y.tolist(), strict=True):
        view = _view(p, cx, cy, 150.0)
        d = np.hypot(p.x[view] - np.float32(cx), p.y[view] - np.float32(cy))
        second[view] = np.minimum(second[view], np.maximum(first[view], d))
        first[view] = np.minimum(first[view], d)
    return (second - first) / 2
