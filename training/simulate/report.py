"""Write the simulator's controls as a report: ``python -m staindiffuser.training.simulate.report --help``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.training.simulate.config import CHUNK, STAINS
from staindiffuser.training.simulate.controls import (
    FIELD,
    MEASURES,
    RealField,
    colour_forest,
    measure,
    oracle_ceiling,
    real_fields,
    simulated_fields,
    throughput,
)
from staindiffuser.training.simulate.tiles import SimulatedTile, simulate_tile
from staindiffuser.training.tiles.stain_names import stain_label

__all__ = ["CEILING_OF_COLOUR", "main"]

CEILING_OF_COLOUR = {"cd3": 0.45, "ck818": 0.65}
"""What a forest on colour patches may reach at most."""


def main(arguments: list[str] | None = None) -> int:
    """Compute all controls and write ``controls.md``, ``controls.json`` and images; 1 if a control fails."""
    parser = argparse.ArgumentParser(prog="python -m staindiffuser.training.simulate.report", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/explanation/simulator"), help="folder to write")
    parser.add_argument("--real", type=Path, default=Path("../shared/data"), help="folder of real slides and tiles")
    parser.add_argument("--fields", type=int, default=300, help="simulated fields that are measured")
    parser.add_argument("--jobs", type=int, default=2, help="threads of the random forest")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    real = real_fields(options.real)
    simulated = simulated_fields(options.fields)
    _sheet(real, simulated, options.output / "real-and-simulated.jpg")
    _triplets(options.output / "pairs.jpg")
    agreement = _agreement(real, simulated, options.output / "statistics.png")
    controls: dict[str, Any] = {
        "colour_forest_dab_dice": colour_forest(jobs=options.jobs),
        "oracle_dab_dice": oracle_ceiling(),
        "all_lymphocytes_dab_dice": oracle_ceiling(rule="lymphocytes"),
        "statistics": agreement,
        "throughput_two_processes": throughput(),
    }
    controls["passed"] = {
        "colour_forest": all(controls["colour_forest_dab_dice"][stain] <= CEILING_OF_COLOUR[stain] for stain in STAINS),
        "statistics": all(row["inside"] for row in agreement.values()),
    }
    (options.output / "controls.json").write_text(json.dumps(controls, indent=1) + "\n", encoding="utf-8")
    (options.output / "controls.md").write_text(_markdown(controls), encoding="utf-8")
    sys.stdout.write(_markdown(controls))
    return 0 if all(controls["passed"].values()) else 1


def _agreement(real: list[RealField], simulated: list[UInt8Array], chart: Path) -> dict[str, dict[str, Any]]:
    measured = [(field.source, values) for field in real if (values := measure(field.image))]
    made = [values for image in simulated if (values := measure(image))]
    _chart(measured, made, chart)
    rows = {}
    for name in MEASURES:
        truth = np.array([values[name] for _, values in measured])
        ours = np.array([values[name] for values in made])
        low, high = np.percentile(truth, [5, 95])
        rows[name] = {
            "real_5_50_95": np.percentile(truth, [5, 50, 95]).round(4).tolist(),
            "simulated_5_50_95": np.percentile(ours, [5, 50, 95]).round(4).tolist(),
            "simulated_mean": round(float(ours.mean()), 4),
            "share_inside": round(float(((ours >= low) & (ours <= high)).mean()), 4),
            "inside": bool(low <= np.median(ours) <= high and low <= ours.mean() <= high),
        }
    return rows


def _chart(real: list[tuple[str, dict[str, float]]], simulated: list[dict[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sources = list(dict.fromkeys(source for source, _ in real))
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    rng = np.random.default_rng(0)
    for axis, (name, label) in zip(axes.flat, MEASURES.items(), strict=True):
        everything = np.array([values[name] for _, values in real])
        axis.axhspan(*np.percentile(everything, [5, 95]), color="0.9", zorder=0)
        columns = [np.array([v[name] for s, v in real if s == source]) for source in sources]
        columns.append(np.array([values[name] for values in simulated]))
        for at, values in enumerate(columns):
            colour = "tab:brown" if at == len(sources) else "tab:blue"
            axis.plot(at + rng.uniform(-0.25, 0.25, len(values)), values, ".", color=colour, markersize=3, alpha=0.5)
            axis.plot([at - 0.3, at + 0.3], [np.median(values)] * 2, color="black", linewidth=1.5)
        axis.set_title(label, fontsize=10)
        axis.set_xticks(range(len(columns)), [*sources, "simulated"], rotation=25, ha="right", fontsize=8)
        axis.set_ylim(min(0.0, float(everything.min())), 1.5 * float(everything.max()))
    figure.suptitle(
        "Fields of 72 µm: real H&E by source (blue) and simulated (brown); grey is 5 to 95 % of the real", fontsize=10
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _sheet(real: list[RealField], simulated: list[UInt8Array], path: Path, *, columns: int = 5, rows: int = 6) -> None:
    rng = np.random.default_rng(3)
    ours = [simulated[i] for i in rng.choice(len(simulated), columns * rows, replace=False)]
    sources = list(dict.fromkeys(field.source for field in real))
    theirs = []
    for source in sources:
        found = [field.image for field in real if field.source == source]
        theirs += [
            found[i] for i in rng.choice(len(found), min(columns * rows // len(sources), len(found)), replace=False)
        ]
    gap, head = 24, 26
    width = columns * FIELD
    sheet = Image.new("RGB", (2 * width + gap, rows * FIELD + head), "white")
    draw = ImageDraw.Draw(sheet)
    for left, title, images in ((0, "real", theirs), (width + gap, "simulated", ours)):
        draw.text((left + 4, 6), title, fill="black")
        for i, image in enumerate(images[: columns * rows]):
            sheet.paste(Image.fromarray(image), (left + i % columns * FIELD, head + i // columns * FIELD))
    sheet.save(path, quality=88)


def _triplets(path: Path, *, count: int = 7, seed: int = 930) -> None:
    """H&E, IHCs and coarse masks of tiles that hold something of everything."""
    tiles: list[SimulatedTile] = []
    index = 0
    while len(tiles) < count:
        tile = simulate_tile(seed, 8 * index)
        index += 1
        shares = [(tile.masks[stain] >= 230).mean() for stain in STAINS]
        if min(shares) > 0.015:
            tiles.append(tile)
    head, size = 16, CHUNK * 3 // 4
    names = ["H&E", *(stain_label(s) for s in STAINS), *(f"{stain_label(s)}, coarse mask" for s in STAINS)]
    sheet = Image.new("RGB", (count * size, len(names) * (size + head)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, tile in enumerate(tiles):
        rows = [tile.he, *(tile.stains[s] for s in STAINS), *(tile.masks[s] for s in STAINS)]
        for row, image in enumerate(rows):
            small = Image.fromarray(image).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(small, (column * size, row * (size + head) + head))
    for row, name in enumerate(names):
        draw.text((4, row * (size + head) + 2), name, fill="black")
    sheet.save(path, quality=88)


def _markdown(controls: dict[str, Any]) -> str:
    forest, oracle, every = (
        controls[name] for name in ("colour_forest_dab_dice", "oracle_dab_dice", "all_lymphocytes_dab_dice")
    )
    lines = [
        "| DAB-Dice | forest on 7 x 7 colours | allowed | every lymphocyte a T cell | oracle |",
        "|---|---|---|---|---|",
        *(
            f"| {stain_label(s)} | {forest[s]:.3f} | ≤ {CEILING_OF_COLOUR[s]} | {every[s]:.3f} | {oracle[s]:.3f} |"
            for s in STAINS
        ),
        "",
        "| measure | real, 5 / 50 / 95 % | simulated, 5 / 50 / 95 % | fields inside | median and mean inside |",
        "|---|---|---|---|---|",
    ]
    for name, row in controls["statistics"].items():
        real, ours = (" / ".join(f"{v:.4g}" for v in row[k]) for k in ("real_5_50_95", "simulated_5_50_95"))
        lines.append(
            f"| {MEASURES[name]} | {real} | {ours} | {row['share_inside']:.0%} | {'yes' if row['inside'] else 'NO'} |"
        )
    speed = controls["throughput_two_processes"]
    spent = speed["processor_ms_per_tile"]
    lines += [
        "",
        f"A tile of 256 px takes {spent} ms of processor time, both IHCs and masks included; writing PNG comes on top. "
        f"That is {2000 / spent:.0f} tiles/s on two free cores. In this run two processes made "
        f"{speed['tiles_per_second']} tiles/s, the machine's load average being {speed['load']} before they began.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
