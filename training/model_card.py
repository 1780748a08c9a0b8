"""``MODEL_CARD.md`` of a checkpoint; ``python -m staindiffuser.training.model_card FOLDER`` writes it again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from staindiffuser.training.curves import CURVES
from staindiffuser.training.gate import gate_lines, shown

if TYPE_CHECKING:
    from staindiffuser.training.checkpoint import CheckpointConfig

__all__ = ["CARD", "license_of", "model_card"]

CARD = "MODEL_CARD.md"
_TAGS = ("histopathology", "virtual-staining", "immunohistochemistry", "diffusion", "image-to-image")


def model_card(
    config: CheckpointConfig, metrics: Mapping[str, Any], *, curves: bool = False, license_id: str | None = None
) -> str:
    """The card: what the model is, what it was trained on, how good it is, and what it must not be used for.

    It begins with the front matter that model hubs read.

    Args:
        curves: show the training curves, an image beside the card.
        license_id: SPDX identifier in lower case, such as ``apache-2.0``; whoever publishes the weights chooses it.
    """
    stains = ", ".join(f"{s.label} (`{s.name}`)" for s in config.model.stains)
    lines = [
        "---",
        *([f"license: {license_id}"] if license_id else []),
        "library_name: staindiffuser",
        "pipeline_tag: image-to-image",
        "tags:",
        *(f"- {tag}" for tag in _TAGS),
        "---",
        "",
        f"# {config.name}",
        "",
        f"**{config.notice}**",
        "",
        f"- Stains: {stains}",
        f"- Pixel size: {config.model.mpp} µm; served tile {config.tile} px with a margin of {config.margin} px",
        f"- Receptive radius: {config.receptive_radius} px in theory, {_in_effect(config)}"
        " (influence above one grey level)",
        f"- Sampler steps: {config.steps}, at σ = {list(config.sigmas[str(config.steps)])}",
        "",
        "## How it was trained",
        "",
        *_provenance(config.provenance),
        "",
        *([f"![The curves of its last training run]({CURVES})", ""] if curves else []),
    ]
    if scores := metrics.get("stains", {}):
        lines += [
            f"## Measured on {metrics.get('tiles')} tiles of the split `{metrics.get('split')}` "
            f"(sampler steps: {metrics.get('steps')}), none of which it was trained on",
            "",
            "| | " + " | ".join(scores) + " |",
            "|---" * (len(scores) + 1) + "|",
        ]
        for name in next(iter(scores.values())):
            values = (stain.get(name) for stain in scores.values())
            lines.append(f"| {name} | " + " | ".join(shown(v) for v in values) + " |")
        lines.append("")
        for stain, about in metrics.get("added stains", {}).items():
            lines += [
                f"`{stain}` was added later, and measured then: {about['tiles']} tiles of the split "
                f"`{about['split']}`, sampler steps: {about['steps']}.",
                "",
            ]
    if "cells" in metrics:
        lines += _cell_lines(metrics["cells"])
    if "calibration" in metrics:
        lines += _calibration_lines(metrics["calibration"])
    if "thresholds" in metrics:
        lines += _threshold_lines(metrics["thresholds"])
    if "gate" in metrics:
        lines += gate_lines(metrics["gate"])
    return "\n".join(lines)


def license_of(card: Path) -> str | None:
    """The licence that a card's front matter names; None without one, or without a card."""
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return next((line.removeprefix("license:").strip() for line in lines if line.startswith("license:")), None)


def _cell_lines(cells: Mapping[str, Any]) -> list[str]:
    """The scores per cell that ``evaluate --record`` wrote, and which stains tell no more than the H&E does."""
    stains: Mapping[str, Any] = cells["stains"]
    lines = [
        f"## Per cell, measured on {cells['data']}",
        "",
        f"{cells['tiles']} tiles of the split `{cells['split']}`, sampler steps: {cells['steps']}. Nuclei are found in "
        "the H&E; intervals are from a bootstrap over slides.",
        "",
        "| | " + " | ".join(stains) + " |",
        "|---" * (len(stains) + 1) + "|",
    ]
    for name in next(iter(stains.values()))["metrics"]:
        row = []
        for stain in stains.values():
            low, high = stain["intervals_95"].get(name, (None, None))
            interval = f" ({shown(low)} to {shown(high)})" if low is not None else ""
            row.append(shown(stain["metrics"][name]) + interval)
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    weak = [name for name, stain in stains.items() if not stain["better_than_hematoxylin"]]
    if weak:
        lines += ["", f"**Not shown to tell more than the H&E's hematoxylin does: {', '.join(weak)}.**"]
    return [*lines, ""]


def _calibration_lines(found: Mapping[str, Any]) -> list[str]:
    """The temperatures that ``evaluate --calibrate`` fitted, and what they changed on the tiles they were fitted on."""
    stains: Mapping[str, Any] = found["stains"]
    columns = ("temperature", "error_before", "error_after")
    rows = [
        f"| {name} | {' | '.join(shown(one[column]) for column in columns)} | {one['cells']} |"
        for name, one in stains.items()
    ]
    return [
        "## Calibration of the cell maps",
        "",
        f"Fitted on {found['tiles']} tiles of the split `{found['split']}`; errors on the same tiles.",
        "",
        "| stain | temperature | calibration error at 1 | with it | cells |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def _threshold_lines(found: Mapping[str, Any]) -> list[str]:
    """The thresholds that ``evaluate --thresholds`` chose, and what they changed on the tiles they were chosen on."""
    stains: Mapping[str, Any] = found["stains"]
    columns = ("threshold", "f1_at_half", "candidate", "f1_at_candidate", "best", "f1_at_best")
    rows = []
    for name, one in stains.items():
        low, high = one["gain_95"] or (None, None)
        rows.append(f"| {name} | {' | '.join(shown(one[c]) for c in columns)} | {shown(low)} to {shown(high)} |")
    return [
        "## Thresholds of the cell maps",
        "",
        f"Chosen on {found['tiles']} tiles of the split `{found['split']}` for the F1 of positive cells; F1 on the "
        "same tiles. The candidate is the threshold nearest to one half whose F1 is within 0.01 of the best; one half "
        "stays unless the candidate's gain is above zero in a bootstrap over slides (95 %).",
        "",
        "| stain | threshold | F1 at one half | candidate | F1 there | best | F1 there | gain, 95 % |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _in_effect(config: CheckpointConfig) -> str:
    if config.effective_radius == config.receptive_radius:  # see training.receptive
        return "in effect more than could be seen in the images that it was measured on"
    return f"{config.effective_radius} px in effect"


def _provenance(provenance: Mapping[str, Any], depth: int = 0) -> list[str]:
    """Bullets: a group of plain values is one line, a group of groups (an earlier run) a list of its own."""
    lines = []
    for key, value in provenance.items():
        bullet = f"{'  ' * depth}- {key}:"
        if not isinstance(value, Mapping):
            lines.append(f"{bullet} {value}")
        elif any(isinstance(part, Mapping) for part in value.values()):
            lines += [bullet, *_provenance(value, depth + 1)]
        else:
            lines.append(f"{bullet} " + ", ".join(f"{name} {part}" for name, part in value.items()))
    return lines


def main() -> None:
    """Command line: write the card of a checkpoint folder again, without touching its other files."""
    from staindiffuser.training.checkpoint import Checkpoint

    parser = argparse.ArgumentParser(description="Write a checkpoint's MODEL_CARD.md again.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder")
    parser.add_argument("--license", help="SPDX identifier in lower case, such as apache-2.0")
    asked = parser.parse_args()
    loaded = Checkpoint.load(asked.checkpoint)
    card = model_card(loaded.config, loaded.metrics, curves=bool(loaded.curves), license_id=asked.license)
    (asked.checkpoint / CARD).write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
