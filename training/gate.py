"""Which number of steps ships (docs/explanation/mathematics.md, "Gate"): a table of scores, and the judgement on it.

The smallest k whose DAB-Dice is within 0.01 of the best of k = 1, 2, 4 and the teacher, and whose radial power is
within 20 % of the real IHC's. The teacher has 18 steps, or one if it was fine-tuned to one itself. With several
stains, k passes only if every stain does. If no k passes, the one that comes closest in Dice and power together ships,
marked as not passed, with the reasons. (Not the one of the best Dice: that may be the blurred mean that the gate is
there to stop.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["DICE_WITHIN", "POWER_WITHIN", "GateRow", "Verdict", "gate_lines", "judge"]

DICE_WITHIN = 0.01
POWER_WITHIN = 0.2

Role = Literal["teacher", "student", "undistilled"]


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """A sampler's scores."""

    role: Role
    """``student``: a candidate; ``teacher``: as it samples itself, which sets the mark with it; ``undistilled``: the
    teacher's weights with few steps, for comparison only."""
    steps: int
    sigmas: tuple[float, ...] | None
    """Noise levels of the few-step sampler; None for Heun."""
    stains: dict[str, dict[str, float]]
    """Per stain the metrics, ``dab_dice`` and ``radial_power`` among them."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What ships and why."""

    steps: int
    passed: bool
    failures: dict[int, tuple[str, ...]]
    """Per number of steps what it fails on; empty where it passes."""

    def line(self) -> str:
        """One line for people."""
        if self.passed:
            return f"gate passed: {_steps(self.steps)}"
        reasons = "; ".join(f"k = {k}: {', '.join(why)}" for k, why in self.failures.items())
        return f"gate not passed, {_steps(self.steps)}, which misses it by least: {reasons}"


def judge(rows: Sequence[GateRow], *, at_most: int = 4) -> Verdict:
    """The gate's verdict.

    Args:
        rows: the scores of all samplers.
        at_most: students with more steps set the mark, but do not ship.

    Raises:
        ValueError: no row is of a student that may ship.
    """
    students = sorted((row for row in rows if row.role == "student"), key=lambda row: row.steps)
    if not students:
        raise ValueError("the gate needs at least one row of the student")
    marks = [row for row in rows if row.role != "undistilled"]
    best = {stain: max(row.stains[stain]["dab_dice"] for row in marks) for stain in students[0].stains}
    misses = {row.steps: _misses(row, best) for row in students}
    failures = {k: tuple(missed) for k, missed in misses.items()}
    misses = {k: missed for k, missed in misses.items() if k <= at_most}
    if not misses:
        raise ValueError(f"the gate needs a student of at most {at_most} steps")
    passing = [k for k, missed in misses.items() if not missed]
    if passing:
        return Verdict(steps=min(passing), passed=True, failures=failures)
    return Verdict(steps=min(misses, key=lambda k: sum(misses[k].values())), passed=False, failures=failures)


def _misses(row: GateRow, best: dict[str, float]) -> dict[str, float]:
    """What a row fails on, in words, and by how much; infinite where the score is NaN."""
    missed = {}
    for stain, values in row.stains.items():
        dice, power = values["dab_dice"], values["radial_power"]
        low, off = best[stain] - DICE_WITHIN - dice, abs(power - 1) - POWER_WITHIN
        # "not (inside)" rather than "outside": a score that is not a number fails too
        if not low <= 1e-9:
            missed[f"{stain} Dice {dice:.3f}, best {best[stain]:.3f}"] = math.inf if math.isnan(low) else low
        if not off <= 1e-9:
            missed[f"{stain} radial power {power:.2f}"] = math.inf if math.isnan(off) else off
    return missed


def gate_record(rows: Sequence[GateRow], verdict: Verdict, **about: Any) -> dict[str, Any]:
    """For ``metrics.json``: the rule, the verdict and the whole table."""
    return {
        **about,
        "rule": {"dab_dice_within": DICE_WITHIN, "radial_power_within": POWER_WITHIN},
        "passed": verdict.passed,
        "steps": verdict.steps,
        "failures": {str(k): list(why) for k, why in verdict.failures.items()},
        "verdict": verdict.line(),
        "rows": [asdict(row) for row in rows],
    }


def gate_lines(gate: dict[str, Any]) -> list[str]:
    """The gate's part of a model card, from :func:`gate_record`."""
    stains = list(gate["rows"][0]["stains"])
    head = [f"{stain} {name}" for stain in stains for name in ("DAB-Dice", "radial power")]
    lines = [
        "## How many steps",
        "",
        f"**{gate['verdict'][0].upper()}{gate['verdict'][1:]}.**",
        "",
        f"Judged on {gate['tiles']} tiles of the split `{gate['split']}`: the smallest k whose DAB-Dice is, for every "
        f"stain, within {gate['rule']['dab_dice_within']} of the best row (the undistilled ones aside) and whose "
        f"radial power is within {gate['rule']['radial_power_within']:.0%} of the real stain's."
        + (f" More than {_steps(most)} were not to ship." if (most := gate.get("at_most", 4)) < 4 else ""),
        "",
        "| sampler | σ | " + " | ".join(head) + " |",
        "|---" * (len(head) + 2) + "|",
    ]
    for row in gate["rows"]:
        sigmas = ", ".join(f"{s:g}" for s in row["sigmas"]) if row["sigmas"] else "Heun"
        cells = [shown(row["stains"][s][m]) for s in stains for m in ("dab_dice", "radial_power")]
        lines.append(f"| {row['role']}, {_steps(row['steps'])} | {sigmas} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def shown(value: float | None) -> str:
    """A score as a card shows it; a dash where it is not defined."""
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _steps(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"
