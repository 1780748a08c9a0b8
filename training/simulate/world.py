"""One simulated slide's character: its tissue, its stains, its scanner, all drawn from (seed, number)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from staindiffuser.imaging.optical_density import DAB
from staindiffuser.training.simulate.config import SimulatorConfig
from staindiffuser.training.simulate.randomness import stream

__all__ = ["Architecture", "Scanner", "Staining", "World"]

Vector = tuple[float, float, float]
Organ = Literal["crypts", "nests", "squamous", "skin", "stroma", "node"]
_ORGANS: tuple[Organ, ...] = ("crypts", "nests", "squamous", "skin", "stroma", "node")
_ORGAN_WEIGHTS = (0.24, 0.26, 0.16, 0.10, 0.14, 0.10)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How the tissue is built. Lengths are pixels, before ``scale``."""

    organ: Organ
    scale: float
    """Size of everything: slides state their pixel size with errors, and species and fixation differ."""
    coverage: float
    """Level of the noise above which there is tissue; lower is more tissue."""
    ragged: float
    """How frayed the tissue's edge is, pixels."""
    spacing: float
    """Between crypts, or diameter of nests."""
    thickness: float
    """Of glandular epithelium."""
    stratification: float
    """Spread of nuclei above the basement membrane, as a share of the thickness (dense epithelium)."""
    goblets: float
    """Share of epithelial cells with a mucin vacuole."""
    lumens: float
    """Level of the noise above which a nest has a lumen; higher is fewer."""
    surface: float
    """Thickness of a surface epithelium along the tissue's edge, 0 without."""
    epithelial_density: float
    epithelial_level: float
    """Level of the noise above which there is epithelium."""
    nuclear_size: float
    """Epithelial nuclei, against 12 px."""
    pleomorphism: float
    """Spread of their size."""
    looseness: float
    """Of the stroma, 0 (dense) to 1 (white gaps, few fibres)."""
    waviness: float
    """Of the fibres, pixels."""
    fineness: float
    """Of the fibres: 1 is 3 px wide, more is finer."""
    fibrous: float
    """Contrast of the fibres in stroma and muscle: near 0 they are glassy, as epithelium can be."""
    webby: float
    """How much of the loose stroma is a web of bubbles rather than fibres, 0 to 1."""
    granular: float
    """Contrast of grains in stroma and epithelium alike."""
    fibroblasts: float
    """Density of spindle cells, 0 to 1."""
    muscle_level: float
    fat_level: float
    mucin_level: float
    keratin: float
    """Depth at which squamous epithelium keratinises."""
    flaking: float
    """Depth over which keratin falls to flakes, pixels."""
    infiltrate: float
    """Density of single lymphocytes in the stroma, 0 to 1."""
    plasma: float
    """Share of plasma cells and granulocytes among them."""
    macrophages: float
    """Density of macrophages in the stroma, 0 to 1."""
    follicles: float
    """share of lattice cells that hold a lymphoid aggregate."""
    vessels: float
    """share of lattice cells that hold a vessel."""
    folds: float
    """Level of the noise above which the tissue is folded; high is never."""
    debris: float
    """Level of the noise above which lumens and nests are necrotic."""


@dataclass(frozen=True, kw_only=True)
class Staining:
    """Colour vectors (of length 1) and strengths (optical density)."""

    hematoxylin: Vector
    eosin: Vector
    blood: Vector
    nuclei: float
    """Hematoxylin in nuclei of the H&E."""
    eosin_stroma: float
    eosin_epithelium: float
    eosin_muscle: float
    basophilia: float
    """Hematoxylin in epithelial cytoplasm of the H&E."""
    background: float
    """Hematoxylin over all tissue."""
    uneven: float
    """Relative spread of the staining over the slide."""
    border: float
    """Eosin at the borders of epithelial cells, relative: below 0 they are gaps."""
    brush: float
    """Eosin at the lumen's edge, relative."""
    counterstain: Vector
    """Hematoxylin of the IHC."""
    counter_nuclei: float
    counter_background: float
    dab: Vector
    dab_cd3: float
    dab_ck818: float
    dab_background: float


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """Illumination, optics, noise and compression of one slide's scans."""

    white: Vector
    """Grey levels of glass, H&E."""
    white_ihc: Vector
    blur: float
    """Standard deviation of the point spread, pixels."""
    sharpen: float
    noise: float
    """Standard deviation, grey levels."""
    quality: int
    """Of JPEG, for the H&E; the IHC gets at least 88."""
    pen: bool
    dye: bool
    """Whether the tissue's edge carries marking dye."""
    pen_ink: Vector
    shift: tuple[float, float]
    """Of the IHC against the H&E, pixels."""
    warp: float
    """Amplitude of the IHC's distortion, pixels."""


@dataclass(frozen=True)
class World:
    """Everything that a simulated slide draws once."""

    seed: int
    number: int
    key: int
    """64-bit key of everything that belongs to a position."""
    config: SimulatorConfig
    architecture: Architecture
    staining: Staining
    scanner: Scanner
    extent: tuple[int, int] | None = None
    """Width and height of the slide, pixels: the tissue then lies at its centre. None is an endless plane."""

    @classmethod
    def draw(cls, seed: int, number: int, config: SimulatorConfig, *, extent: tuple[int, int] | None = None) -> World:
        """The world ``number`` of ``seed``: the same everywhere."""
        rng = stream(seed, number)
        key = int(rng.integers(0, 2**63, dtype=np.int64))
        return cls(
            seed=seed,
            number=number,
            key=key,
            config=config,
            architecture=_architecture(stream(seed, number, 1), config),
            staining=_staining(stream(seed, number, 2)),
            scanner=_scanner(stream(seed, number, 3), config),
            extent=extent,
        )

    @property
    def name(self) -> str:
        """Of the slide."""
        return f"sim-{self.seed}-{self.number:05d}"

    def phase(self, salt: int) -> float:
        """A uniform number that names one field of this world."""
        mixed = (self.key ^ (salt * 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        return (mixed >> 33) / 2.0**31


def _architecture(rng: np.random.Generator, config: SimulatorConfig) -> Architecture:
    organ = _ORGANS[int(rng.choice(len(_ORGANS), p=_ORGAN_WEIGHTS))]
    squamous = organ in ("squamous", "skin")
    dense = rng.random() < 0.4
    mucinous = rng.random() < 0.5
    level = {"crypts": -0.6, "nests": rng.uniform(-0.4, 0.5), "squamous": rng.uniform(-0.45, 0.3)}
    level |= {"skin": rng.uniform(0.1, 0.7), "stroma": rng.uniform(0.9, 1.5), "node": rng.uniform(1.0, 1.8)}
    follicles = {"crypts": 0.45, "nests": 0.45, "squamous": 0.45, "skin": 0.15, "stroma": 0.35, "node": 1.0}
    return Architecture(
        organ=organ,
        scale=float(np.clip(np.exp(rng.normal(-0.08, 0.18)), 0.62, 1.35)),
        coverage=float(rng.uniform(-1.9, -0.6)),
        ragged=float(rng.uniform(2, 14)),
        spacing=float(rng.uniform(105, 190) if organ == "crypts" else rng.uniform(90, 330)),
        thickness=float(rng.uniform(30, 58)),
        stratification=float(rng.uniform(0.3, 0.75) if dense else rng.uniform(0.05, 0.25)),
        goblets=float(rng.uniform(0.2, 0.7) if mucinous and not squamous else rng.uniform(0, 0.08)),
        lumens=float(rng.uniform(0.7, 2.0)),
        surface=float(rng.uniform(26, 46) if organ in ("crypts", "nests") and rng.random() < 0.6 else 0.0),
        epithelial_density=float(rng.uniform(0.72, 1.0)),
        epithelial_level=float(level[organ]),
        nuclear_size=float(np.clip(rng.normal(1.08, 0.15), 0.8, 1.5)),
        pleomorphism=float(rng.uniform(0.06, 0.26)),
        looseness=float(rng.beta(1.4, 1.6)),
        waviness=float(rng.uniform(4, 26)),
        fineness=float(rng.uniform(0.7, 1.7)),
        fibrous=float(rng.uniform(0.2, 1.25)),
        webby=float(max(0.0, rng.uniform(-0.8, 1.0))),
        granular=float(rng.uniform(0.3, 1.6)),
        fibroblasts=float(rng.uniform(0.25, 1.0)),
        muscle_level=float(rng.uniform(0.7, 2.0)),
        fat_level=float(rng.uniform(1.0, 2.4)),
        mucin_level=float(rng.uniform(1.2, 2.6)),
        keratin=float(rng.uniform(70, 220)),
        flaking=float(rng.uniform(15, 80)),
        infiltrate=float(rng.beta(1.3, 2.0)),
        plasma=float(rng.uniform(0.05, 0.5)),
        macrophages=float(rng.uniform(0.1, 0.8) if rng.random() < 0.6 else 0.0),
        follicles=float(follicles[organ] * rng.uniform(0.5, 1.1)),
        vessels=float(rng.uniform(0.15, 0.6)),
        folds=float(rng.uniform(1.9, 3.5) if config.damage and rng.random() < 0.35 else 9.0),
        debris=float(rng.uniform(1.2, 2.5)),
    )


def _unit(v: npt.NDArray[np.float64]) -> Vector:
    v = np.maximum(v, 0.02)
    v = v / np.linalg.norm(v)
    return (float(v[0]), float(v[1]), float(v[2]))


def _mixed(rng: np.random.Generator, corners: list[Vector], spread: float) -> npt.NDArray[np.float64]:
    weights = rng.dirichlet(np.full(len(corners), 0.6))
    return np.asarray(weights @ np.array(corners) + rng.normal(0, spread, 3))


def _staining(rng: np.random.Generator) -> Staining:
    # Corners: what Macenko's method finds in slides of several laboratories, and Ruifrok's vectors.
    hematoxylin = _mixed(
        rng,
        [(0.80, 0.53, 0.29), (0.40, 0.77, 0.50), (0.65, 0.66, 0.38), (0.52, 0.76, 0.40), (0.65, 0.704, 0.286)],
        0.02,
    )
    eosin = _mixed(rng, [(0.10, 0.92, 0.38), (0.05, 0.81, 0.58), (0.38, 0.77, 0.51), (0.22, 0.80, 0.56)], 0.02)
    if rng.random() < 0.3:
        # Poorly told apart: overstained, hardly differentiated, or faded, with nuclei more red than blue.
        hematoxylin += rng.uniform(0.2, 0.55) * (eosin - hematoxylin)
    strength = float(np.exp(rng.normal(-1.15, 0.5)))
    nuclei = float(np.clip(np.exp(rng.normal(-0.45, 0.35)), 0.3, 1.3))
    weak = 0.6 if rng.random() < 0.1 else 1.0
    # Eosin of epithelium, stroma and muscle vary apart: colour alone must not tell epithelium.
    return Staining(
        hematoxylin=_unit(hematoxylin),
        eosin=_unit(eosin),
        blood=_unit(eosin * np.array([0.35, 1.0, 1.05]) + rng.normal(0, 0.02, 3)),
        nuclei=nuclei,
        eosin_stroma=float(np.clip(strength * np.exp(rng.normal(0, 0.3)), 0.08, 0.75)),
        eosin_epithelium=float(np.clip(strength * np.exp(rng.normal(-0.2, 0.35)), 0.06, 0.6)),
        eosin_muscle=float(np.clip(strength * rng.uniform(0.8, 1.5), 0.1, 0.8)),
        basophilia=float(nuclei * rng.uniform(0.02, 0.3)),
        background=float(nuclei * rng.uniform(0.01, 0.16)),
        uneven=float(rng.uniform(0.05, 0.2)),
        border=float(rng.uniform(-0.55, 0.45)),
        brush=float(rng.uniform(0.0, 0.9)),
        counterstain=_unit(np.array([0.66, 0.69, 0.27]) + rng.normal(0, 0.015, 3)),
        counter_nuclei=float(rng.uniform(0.28, 0.5)),
        counter_background=float(rng.uniform(0.02, 0.06)),
        dab=_unit(np.array(DAB) + rng.normal(0, 0.015, 3)),
        dab_cd3=float(rng.uniform(0.65, 1.05)) * weak,
        dab_ck818=float(rng.uniform(0.5, 0.9)) * weak,
        dab_background=float(rng.uniform(0.005, 0.03)),
    )


def _scanner(rng: np.random.Generator, config: SimulatorConfig) -> Scanner:
    base = rng.uniform(236, 251)
    inks: list[Vector] = [(0.04, 0.9, 0.75), (0.9, 0.55, 0.1), (0.85, 0.25, 0.55), (0.75, 0.75, 0.7)]
    ink = inks[int(rng.integers(len(inks)))]
    misaligned = rng.random() < config.misaligned_share
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 3.0)
    damage = config.damage
    tint = rng.normal(0, 1.5, 3)
    white = np.clip(base + tint, 230, 253)
    base_ihc = np.clip(244 + rng.normal(0, 1.5) + rng.normal(0, 0.7, 3), 238, 250)
    return Scanner(
        white=(float(white[0]), float(white[1]), float(white[2])),
        white_ihc=(float(base_ihc[0]), float(base_ihc[1]), float(base_ihc[2])),
        blur=float(rng.uniform(0.42, 1.2)) if damage else 0.6,
        sharpen=float(rng.uniform(0.3, 1.4) if rng.random() < 0.5 else 0.0) if damage else 0.0,
        noise=float(rng.uniform(0.6, 3.0)) if damage else 0.0,
        quality=int(rng.integers(68, 96)),
        pen=bool(rng.random() < config.pen_share),
        dye=bool(rng.random() < config.pen_share),
        pen_ink=_unit(np.array(ink)),
        shift=(float(np.cos(angle) * length), float(np.sin(angle) * length)) if misaligned else (0.0, 0.0),
        warp=float(rng.uniform(0.5, 2.0)) if misaligned else 0.0,
    )
