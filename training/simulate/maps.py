"""From tissue and cells to amounts of stain per pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from staindiffuser.imaging.arrays import FloatArray
from staindiffuser.training.simulate.cellmap import draw_cells, draw_discs
from staindiffuser.training.simulate.cells import Cells, Kind, erythrocytes, vacuoles
from staindiffuser.training.simulate.noise import field, fine_texture, streaks
from staindiffuser.training.simulate.tissue import Tissue, upsample
from staindiffuser.training.simulate.world import Vector, World

__all__ = ["Layers", "Maps"]

Layers = list[tuple[FloatArray, Vector]]
"""Amounts [H, W] with the colour vector each is of."""

# By Kind: how dark a nucleus is, and how clear its inside against its rim.
_DARKNESS = np.array([0.78, 0.70, 1.12, 1.05, 0.9, 1.0, 0.82, 1.15, 1.3, 0.0, 0.76, 0.74], np.float32)
_CLEARNESS = np.array([0.75, 0.85, 0.15, 0.45, 0.4, 0.25, 0.5, 0.1, 0.0, 0.0, 0.75, 0.8], np.float32)
_NOTHING = np.zeros((1, 1), np.float32)


def _soft(distance: FloatArray, width: float = 1.0) -> FloatArray:
    """Share of a pixel that lies inside, from its distance to the edge."""
    share = distance * np.float32(1.0 / width)
    share += np.float32(0.5)
    np.clip(share, 0, 1, out=share)
    return share


class Maps:
    """Full-resolution maps of one box [H, W], shared by the H&E and the IHCs. Values are shares from 0 to 1.

    A structure that is absent from the box is kept as a single 0, which broadcasts: most of them are, mostly.
    """

    def __init__(self, world: World, tissue: Tissue, cells: Cells, box: tuple[int, int, int, int]) -> None:
        self.world, self.tissue, self.cells, self.box = world, tissue, cells, box
        self.grain = self._texture(0.75, 1)
        self.mottle = self._texture(2.2, 2)
        self.cloud = self._texture(9.0, 3)
        drawn = draw_cells(cells, box)
        self.cell, self.edge = drawn.cell, drawn.edge + np.float32(0.45) * self.mottle
        self._regions()
        self._per_cell()
        self._white_space()

    def _texture(self, sigma: float, salt: int) -> FloatArray:
        x0, y0, x1, y1 = self.box
        x = int(self.world.phase(100 + salt) * 512) + x0
        y = int(self.world.phase(200 + salt) * 512) + y0
        return fine_texture(sigma, salt, x, y, y1 - y0, x1 - x0)

    def _up(self, values: FloatArray) -> FloatArray:
        return upsample(self.tissue, values, self.box)

    def _area(self, values: FloatArray, width: float, rough: FloatArray = _NOTHING) -> FloatArray:
        """Where a distance field is inside, or a single 0 if it is nowhere."""
        if float(values.max()) < -2.0 * width - 6.0:
            return _NOTHING
        return _soft(self._up(values) + rough, width)

    def _regions(self) -> None:
        t, mottle = self.tissue, self.mottle
        self.depth = self._up(t.depth)
        self.lumen_depth = self._up(t.lumen) + 0.8 * mottle
        self.lumen = _soft(self.lumen_depth, 2.0)
        self.glass = 1 - _soft(self._up(t.glass) + 1.2 * mottle, 2.0)
        self.loose = self._up(t.loose)
        along, across = self._up(t.along), self._up(t.across)
        fineness = np.float32(self.world.architecture.fineness)
        coarse = streaks(along, across * fineness)
        fine = streaks(along * np.float32(1.7), across * (np.float32(2.1) * fineness) + np.float32(77))
        self.fibre = np.float32(0.86) * coarse + np.float32(0.5) * fine
        self.muscle = self._area(t.muscle, 6.0)
        is_squamous = float(t.squamous.max()) > 0
        self.squamous = np.ones((1, 1), np.float32) if is_squamous else _NOTHING
        self.keratin_depth = self._up(t.keratin) if is_squamous else np.full((1, 1), -99, np.float32)
        self.keratin = _soft(self.keratin_depth + 2 * mottle, 8.0) if is_squamous else _NOTHING
        # Keratin lies in sheets along the surface.
        self.lamella = streaks(along, 0.45 * self.keratin_depth + 3.0 * self.cloud) if is_squamous else _NOTHING
        self.follicle = self._area(t.follicle, 8.0)
        self.core = self._area(t.core, 5.0) * self.follicle
        self.bore = self._area(t.bore, 1.5, 0.5 * mottle)
        self.wall = self._area(t.vessel, 2.0) * (1 - self.bore)
        self.bloody = self._up(t.bloody)
        self.fat = self._area(t.fat, 4.0)
        self.fat_hole = _NOTHING
        if self.fat.size > 1:
            self.fat_hole = self.fat * _soft(self._up(t.fat_cell) - 1.6 + 0.5 * mottle, 1.5)
        self.mucin = self._area(t.mucin, 6.0)
        self.fold = self._area(t.fold, 3.0)
        self.necrosis = self._area(t.necrosis, 6.0)
        self.epithelium = _soft(self.depth + 0.5 * mottle, 1.5) * (1 - self.lumen) * (1 - self.glass)
        self.living = self.epithelium * (1 - self.keratin) * (1 - self.necrosis)
        x, y, radius = erythrocytes(self.world, t, self.box)
        self.red = _soft(draw_discs(x, y, radius, self.box), 1.4) if len(x) else _NOTHING

    def _of_cell(self, values: npt.NDArray[Any], outside: float) -> FloatArray:
        """A number of each cell, at the pixels nearest to it."""
        table = np.append(np.asarray(values, np.float32), np.float32(outside))
        picked: FloatArray = table[self.cell]
        return picked

    def _per_cell(self) -> None:
        cells, n, a = self.cells, self.cells.numbers, self.world.architecture
        self.kind = np.append(cells.kind, np.int8(-1))[self.cell]
        self.nucleus = _soft(-self.edge, 1.6)
        self.dark = self._of_cell(_DARKNESS[cells.kind] * (0.78 + 0.44 * n[1]), 0.0)
        clear = self._of_cell(_CLEARNESS[cells.kind] * (0.35 + 0.9 * n[2]), 0.0)
        rim = np.clip(1.0 - np.abs(self.edge + np.float32(1.0)) * np.float32(0.6), 0, 1)
        inside = 1 + clear * (np.float32(0.75) * rim - np.float32(0.4))
        inside *= 1 + np.float32(0.2) * self.grain + np.float32(0.22) * self.mottle
        self.chromatin = np.clip(self.nucleus * self.dark * inside, 0, 2.2)
        # Borders between epithelial cells: where the nearest cell changes.
        changed = np.zeros(self.cell.shape, bool)
        changed[:, 1:] = self.cell[:, 1:] != self.cell[:, :-1]
        changed[1:] |= self.cell[1:] != self.cell[:-1]
        self.border = (changed & (self.edge > 0.8)).astype(np.float32)
        near = _soft(5.0 - self.edge, 5.0)
        self.tone = np.float32(0.5) + (self._of_cell(n[3], 0.5) - np.float32(0.5)) * near
        self.vacuole = _NOTHING
        if a.goblets > 0.0:
            x, y, radius = vacuoles(self.world, self.tissue, cells)
            if len(x):
                drops = _soft(draw_discs(x, y, radius, self.box) + np.float32(0.8) * self.mottle, 1.8)
                self.vacuole = drops * self.living * (1 - self.nucleus)
        halo = (cells.kind == Kind.SQUAMOUS) & (n[5] < 0.12)
        self.halo = _NOTHING
        if halo.any():
            self.halo = self._of_cell(halo, 0.0) * _soft(self.edge - 0.3) * _soft(4.5 - self.edge, 1.5)

    def _white_space(self) -> None:
        """Where there is no tissue to stain: gaps between fibres, lumens, fat, glass."""
        stroma = (1 - self.epithelium) * (1 - self.muscle) * (1 - self.follicle) * (1 - self.wall)
        hole = _soft(np.float32(2.6) * self.loose - np.float32(2.6) - self.fibre, 0.7) * stroma
        webby = np.float32(self.world.architecture.webby)
        if webby > 0:
            bubbles = _soft(self._texture(3.4, 4) - np.float32(2.2) + np.float32(2.2) * webby * self.loose, 0.4)
            np.maximum(hole, bubbles * stroma, out=hole)
        if self.muscle.size > 1:
            np.maximum(hole, _soft(0.5 * self.loose - 2.1 - self.fibre, 0.5) * self.muscle, out=hole)
        if self.keratin.size > 1:
            flaking = np.float32(self.world.architecture.flaking * self.world.architecture.scale)
            shreds = _soft(self.lamella - 1.5 + self.keratin_depth / flaking, 0.5) * _soft(self.keratin_depth - 8, 8)
            np.maximum(hole, self.keratin * shreds, out=hole)
        for other in (self.lumen, self.bore, self.fat_hole):
            np.maximum(hole, other, out=hole)
        # A cell that lies in a gap is there, but bare glass has none.
        around = np.maximum(self.nucleus, (self.kind == Kind.MACROPHAGE) * _soft(6.5 - self.edge, 2.0))
        hole *= 1 - around * (self.kind != Kind.DEBRIS)
        np.maximum(hole, self.glass, out=hole)
        self.solid = 1 - hole
        self.stroma = stroma * self.solid

    def he(self) -> Layers:
        """Hematoxylin, eosin, blood and ink of the H&E."""
        st = self.world.staining
        thick = (1 + np.float32(st.uneven * 0.5) * self.cloud) * (1 + 0.85 * self.fold * self.solid)
        upper = _NOTHING
        if self.squamous.max() > 0:
            keratin = np.float32(self.world.architecture.scale * max(self.world.architecture.keratin, 40))
            upper = np.clip(self.depth / keratin, 0, 1)
        hematoxylin, eosin = self._cytoplasm(upper)
        bare = 1 - self.nucleus
        eosin *= 1 - np.float32(0.55) * self.nucleus
        hematoxylin *= bare
        near = _soft(3.6 - self.edge, 1.5) * bare
        granules = near * (self.kind == Kind.GRANULOCYTE)
        eosin += granules * (np.float32(0.8 * st.eosin_muscle) + np.float32(0.4 * st.eosin_muscle) * self.grain)
        plasma = near * (self.kind == Kind.PLASMA)
        hematoxylin += plasma * np.float32(0.3 * st.nuclei)
        eosin += plasma * np.float32(0.4 * st.eosin_stroma)
        hematoxylin += self.chromatin * np.float32(st.nuclei) * (1 - self.glass)
        if Kind.MACROPHAGE in self.cells.kind:
            body = (
                _soft(6.5 - self.edge, 2.0)
                * bare
                * (self.kind == Kind.MACROPHAGE)
                * (1 - self.epithelium)
                * (1 - self.glass)
            )
            foam = 0.75 + 0.3 * self.tone + 0.12 * self.mottle + 0.1 * self.grain
            eosin += body * (np.float32(st.eosin_epithelium) * foam - eosin)
            hematoxylin += body * (np.float32(st.basophilia + st.background) * foam - hematoxylin)
        layers: Layers = [(hematoxylin * thick, st.hematoxylin), (eosin * thick, st.eosin)]
        if self.red.size > 1:
            layers.append((self.red * (1 - self.glass) * np.float32(0.8 * st.eosin_muscle + 0.08), st.blood))
        if self.world.scanner.pen:
            layers.append((self._pen(), self.world.scanner.pen_ink))
        if self.world.scanner.dye:
            layers.append((self._dye(), (0.86, 0.38, 0.34)))
        return layers

    def _cytoplasm(self, upper: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Hematoxylin and eosin of everything but nuclei."""
        st, solid = self.world.staining, self.solid
        rest = (1 - self.epithelium) * solid
        a = self.world.architecture
        grains = np.float32(a.granular) * (0.08 * self.mottle + 0.1 * self.grain)
        fibre = np.clip(0.85 + np.float32(0.26 * a.fibrous) * self.fibre + grains, 0.12, 1.6)
        eosin = self.stroma * fibre * (1 - 0.75 * self.mucin) * np.float32(st.eosin_stroma)
        hematoxylin = solid * np.float32(st.background) * (1 + 0.3 * self.mottle)
        if self.muscle.size > 1:
            eosin += (
                self.muscle
                * solid
                * (np.float32(st.eosin_muscle) * (0.92 + np.float32(0.12 * a.fibrous) * self.fibre + grains))
            )
        if self.follicle.size > 1:
            # Between the cells a germinal centre is less pink than the rim around it, and bluer.
            pink, blue = self.follicle - np.float32(0.6) * self.core, self.follicle + np.float32(0.9) * self.core
            eosin += pink * rest * (np.float32(0.5 * st.eosin_stroma) * (1 + 0.35 * self.mottle))
            hematoxylin += blue * rest * (np.float32(0.1 * st.nuclei) * (1 + 0.5 * self.mottle))
        if self.wall.size > 1:
            eosin += self.wall * solid * np.float32(0.9 * st.eosin_muscle)
        if self.bore.size > 1:
            eosin += self.bore * self.bloody * (1 - self.red) * np.float32(0.2 * st.eosin_stroma)
        if self.mucin.size > 1:
            strands = np.clip(0.7 + 0.9 * self.fibre, 0.15, 3)
            hematoxylin += (
                self.mucin * (1 - self.glass) * (1 - self.epithelium) * strands * np.float32(0.12 * st.nuclei)
            )
        texture = (
            0.72
            + 0.36 * self.tone
            + 0.09 * self.mottle
            + 0.07 * self.grain
            + np.float32(0.45 * st.border) * self.border
        )
        brush = 1 + np.float32(st.brush) * _soft(self.lumen_depth + 3.5, 3.0)
        living = self.living * solid
        empty = (1 - 0.82 * self.vacuole) * (1 - 0.6 * self.halo)
        eosin += living * texture * brush * empty * (np.float32(st.eosin_epithelium) * (1 + 0.5 * upper))
        hematoxylin += (
            living
            * empty
            * (np.float32(st.basophilia) * (1 + 0.16 * self.mottle + 0.08 * self.grain))
            * (1 - 0.6 * upper)
        )
        if self.keratin.size > 1:
            horn = self.epithelium * self.keratin * solid
            eosin += horn * (np.float32(1.5 * st.eosin_stroma) * (1 + 0.25 * self.lamella))
            granular = np.clip(1 - np.abs(self.keratin_depth) / 10.0, 0, 1)
            hematoxylin += horn * (np.float32(st.nuclei) * (0.12 + 0.25 * granular + 0.06 * self.lamella))
        if self.necrosis.size > 1:
            dead = self.epithelium * self.necrosis * (1 - self.keratin) * solid
            eosin += dead * (np.float32(st.eosin_stroma) * (1 + 0.3 * self.mottle + 0.2 * self.grain))
        return hematoxylin, eosin

    def _grid_noise(self, salt: int, scale: float) -> FloatArray:
        x0, y0, x1, y1 = self.box
        x = np.arange(x0, x1, dtype=np.float32)[None, :] + np.zeros((y1 - y0, 1), np.float32)
        y = np.arange(y0, y1, dtype=np.float32)[:, None] + np.zeros((1, x1 - x0), np.float32)
        return field(self.world.phase(salt), scale, x, y)

    def _pen(self) -> FloatArray:
        """Felt pen on the cover slip: broad strokes, uneven inside."""
        stroke = np.clip(1.5 - 14 * np.abs(self._grid_noise(90, 700.0)), 0, 1)
        ink: FloatArray = stroke * np.clip(0.75 + 0.2 * self._grid_noise(91, 60.0) + 0.06 * self.mottle, 0.1, 1.4)
        return ink * np.float32(0.9)

    def _dye(self) -> FloatArray:
        """Marking dye on the cut edge of the tissue, in flakes."""
        edge = np.clip(1 - np.abs(self._up(self.tissue.glass) - 2.0) / 7.0, 0, 1)
        flakes: FloatArray = edge * np.clip(self.mottle + 0.6 * self.cloud - 0.3, 0, 1.5) * (1 - 0.7 * self.glass)
        return flakes * np.float32(0.8)

    def ihc(self, stain: str, t_cell: npt.NDArray[np.bool_]) -> Layers:
        """Counterstain and DAB of one IHC."""
        st = self.world.staining
        fold = 1 + 0.6 * self.fold * self.solid
        counter = self.chromatin * np.float32(st.counter_nuclei) * (1 - self.glass)
        body = (
            self.solid * (1 + 0.25 * self.fibre * (1 - self.epithelium)) * (1 - 0.6 * self.mucin) * (1 - self.nucleus)
        )
        counter += body * (1 + self.living) * np.float32(st.counter_background)
        if stain == "cd3":
            brown = self._membranes(t_cell) * np.float32(st.dab_cd3)
        else:
            brown = self._keratins() * np.float32(st.dab_ck818)
        brown *= np.clip(1 + np.float32(st.uneven) * self.cloud, 0.55, 1.5)
        brown += np.float32(st.dab_background) * self.solid
        return [(counter * fold, st.counterstain), (brown * fold, st.dab)]

    def _membranes(self, t_cell: npt.NDArray[np.bool_]) -> FloatArray:
        """CD3: a ring on the membrane, a thin veil over the nucleus, stronger on one side."""
        strength = np.where(t_cell, 0.75 + 0.5 * self.cells.numbers[2], 0.0)
        off = (self.edge - np.float32(1.0)) ** 2
        ring = np.clip(1 - off * np.float32(0.14), 0, 1) ** 2 * (1 + 0.22 * self.mottle)
        brown: FloatArray = self._of_cell(strength, 0.0) * np.maximum(ring, 0.3 * self.nucleus) * (1 - self.glass)
        return brown

    def _keratins(self) -> FloatArray:
        """CK8/18: cytoplasm of living epithelium, stronger at cell borders and in some cells, absent from mucin."""
        strength = 0.75 + 0.45 * self.tone + 0.1 * self.mottle + 0.12 * self.border
        brown: FloatArray = self.living * self.solid * strength * (1 - 0.72 * self.nucleus) * (1 - 0.9 * self.vacuole)
        foreign = (self.kind != Kind.EPITHELIAL) & (self.kind != Kind.SQUAMOUS) & (self.edge < 2.0)
        brown *= (1 - foreign) * (1 - 0.6 * self.halo)
        return brown
