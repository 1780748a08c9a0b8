"""Write the scores per cell into the checkpoint itself: its metrics, its card, and the notice on every output.

A stain whose cell map tells no more than the H&E's hematoxylin must say so wherever it is used. The notice is what
reaches graphs, server and every ``run.json``, so a weak stain is named there.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from staindiffuser.files import replacing
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.evaluation.cell_scores import GATE_MARGIN
from staindiffuser.training.evaluation.evaluate import Evaluation
from staindiffuser.training.model_card import CARD, license_of, model_card

__all__ = ["record_cells", "save_again", "with_weak_stains"]

_WEAK = " Not shown to tell more than hematoxylin: "
_WEAK_SENTENCE = re.compile(rf"{_WEAK}.*?\(measured on .*?\)\.", re.DOTALL)
"""Others may follow it: of stains that were added later."""


def record_cells(evaluation: Evaluation, folder: Path, *, data: str) -> Checkpoint:
    """Record an evaluation in the checkpoint folder that was evaluated.

    Args:
        evaluation: with its scores per cell.
        folder: the checkpoint's.
        data: what it was measured on, in a few words.

    Returns:
        the checkpoint as it now stands.

    Raises:
        CheckpointError, UsageError: the folder cannot be read or written.
    """
    cells: dict[str, Any] = {
        "data": data,
        "split": evaluation.split,
        "steps": evaluation.steps,
        "tiles": len(evaluation.rows),
        "rule": {"auroc_above_hematoxylin": GATE_MARGIN},
        "stains": evaluation.figures()["cells"],
    }
    weak = [stain for stain, score in evaluation.cells.items() if not score.passes()]
    found = Checkpoint.load(folder)
    labels = {stain.name: stain.label for stain in found.config.model.stains}
    notice = with_weak_stains(found.config.notice, [labels[stain] for stain in weak], data=data)
    recorded = dataclasses.replace(
        found,
        config=dataclasses.replace(found.config, notice=notice),
        metrics={**found.metrics, "cells": cells},
    )
    save_again(recorded, folder)
    return recorded


def save_again(checkpoint: Checkpoint, folder: Path) -> None:
    """Save a checkpoint over itself; its card keeps the licence, which only the card knows.

    Raises:
        UsageError: the folder cannot be written.
    """
    license_id = license_of(folder / CARD)
    checkpoint.save(folder)
    if license_id:  # chosen by whoever published the weights
        card = model_card(checkpoint.config, checkpoint.metrics, curves=bool(checkpoint.curves), license_id=license_id)
        with replacing(folder / CARD) as temporary:
            temporary.write_text(card, encoding="utf-8")


def with_weak_stains(notice: str, labels: list[str], *, data: str) -> str:
    """The notice with the weak stains named, in place of those that it named before."""
    notice = _WEAK_SENTENCE.sub("", notice)
    return f"{notice}{_WEAK}{', '.join(labels)} (measured on {data})." if labels else notice
