"""The gate on made-up tables: which k ships, and what is said when none may."""

from __future__ import annotations

import json
import math

import pytest

from staindiffuser.training.gate import GateRow, Role, gate_lines, gate_record, judge


def row(role: Role, steps: int, **stains: tuple[float, float]) -> GateRow:
    """A row; per stain its DAB-Dice and its radial power."""
    scores = {name: {"dab_dice": dice, "radial_power": power} for name, (dice, power) in stains.items()}
    sigmas = None if role == "teacher" else tuple(80.0 / 4**i for i in range(steps))
    return GateRow(role=role, steps=steps, sigmas=sigmas, stains=scores)


def table(teacher: tuple[float, float], **students: tuple[float, float]) -> list[GateRow]:
    return [row("teacher", 18, cd3=teacher), *(row("student", int(k[1:]), cd3=v) for k, v in students.items())]


@pytest.mark.parametrize(
    ("rows", "steps"),
    [
        (table((0.90, 1.0), k1=(0.895, 1.0), k2=(0.90, 1.0), k4=(0.90, 1.0)), 1),
        (table((0.90, 1.0), k1=(0.89, 1.0), k2=(0.90, 1.0), k4=(0.90, 1.0)), 1),  # exactly 0.01 is within
        (table((0.90, 1.0), k1=(0.889, 1.0), k2=(0.90, 1.0), k4=(0.90, 1.0)), 2),  # Dice too low
        (table((0.90, 1.0), k1=(0.90, 0.79), k2=(0.90, 0.8), k4=(0.90, 1.0)), 2),  # a blurred mean
        (table((0.90, 1.0), k1=(0.90, 1.3), k2=(0.90, 1.21), k4=(0.90, 1.2)), 4),  # noise
        (table((0.80, 1.0), k1=(0.85, 1.0), k2=(0.87, 1.0), k4=(0.86, 1.0)), 2),  # students beat the teacher
        (table((0.90, 9.0), k1=(0.90, 1.0)), 1),  # the teacher's power is not asked for
        (table((0.90, 1.0), k4=(0.9, 1.0), k2=(0.9, 1.0)), 2),  # whatever the order
    ],
)
def test_the_fewest_steps_that_pass_ship(rows: list[GateRow], steps: int) -> None:
    verdict = judge(rows)
    assert verdict.passed
    assert verdict.steps == steps
    assert verdict.failures[steps] == ()
    assert verdict.line() == f"gate passed: {steps} step{'s' if steps > 1 else ''}"


def test_every_stain_must_pass() -> None:
    rows = [
        row("teacher", 18, cd3=(0.7, 1.0), ck818=(0.9, 1.0)),
        row("student", 1, cd3=(0.7, 1.0), ck818=(0.8, 1.0)),
        row("student", 2, cd3=(0.6, 1.0), ck818=(0.9, 1.0)),
        row("student", 4, cd3=(0.695, 1.1), ck818=(0.895, 0.9)),
    ]
    verdict = judge(rows)
    assert (verdict.steps, verdict.passed) == (4, True)
    assert verdict.failures[1] == ("ck818 Dice 0.800, best 0.900",)
    assert verdict.failures[2] == ("cd3 Dice 0.600, best 0.700",)


def test_undistilled_rows_neither_ship_nor_set_the_mark() -> None:
    rows = [*table((0.80, 1.0), k1=(0.80, 1.0)), row("undistilled", 2, cd3=(0.99, 1.0))]
    assert judge(rows).steps == 1
    assert judge(rows).passed
    slow = table((0.9, 1.0), k1=(0.7, 0.5), k2=(0.8, 0.9), k4=(0.9, 1.0))
    assert (judge(slow).steps, judge(slow).passed) == (4, True)
    assert (judge(slow, at_most=2).steps, judge(slow, at_most=2).passed) == (2, False)
    assert "More than 2 steps were not to ship." in "".join(
        gate_lines(gate_record(slow, judge(slow, at_most=2), split="val", tiles=1, at_most=2))
    )


def test_where_none_passes_the_nearest_miss_ships_and_it_is_said() -> None:
    rows = [
        row("teacher", 18, cd3=(0.9, 1.0), ck818=(0.9, 1.0)),
        row("student", 1, cd3=(0.5, 0.2), ck818=(0.7, 1.0)),
        row("student", 2, cd3=(0.8, 0.5), ck818=(0.9, 1.0)),
        row("student", 4, cd3=(0.85, 1.0), ck818=(0.8, 1.0)),
    ]
    verdict = judge(rows)
    assert (verdict.steps, verdict.passed) == (4, False)
    assert verdict.line() == (
        "gate not passed, 4 steps, which misses it by least: "
        "k = 1: cd3 Dice 0.500, best 0.900, cd3 radial power 0.20, ck818 Dice 0.700, best 0.900; "
        "k = 2: cd3 Dice 0.800, best 0.900, cd3 radial power 0.50; "
        "k = 4: cd3 Dice 0.850, best 0.900, ck818 Dice 0.800, best 0.900"
    )


def test_a_score_that_is_not_a_number_does_not_pass() -> None:
    assert judge(table((0.9, 1.0), k1=(0.9, math.nan), k2=(0.9, 1.0))).steps == 2
    assert not judge(table((0.9, 1.0), k1=(math.nan, 1.0))).passed


def test_a_table_without_a_student_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one row of the student"):
        judge(table((0.9, 1.0)))


def test_record_and_card_hold_the_whole_table() -> None:
    rows = [*table((0.90, 1.3), k1=(0.70, 0.5), k2=(0.80, 1.0)), row("undistilled", 1, cd3=(0.6, 0.1))]
    record = gate_record(rows, judge(rows), split="val", tiles=12, seed=0)
    assert json.loads(json.dumps(record))["rows"][1]["stains"]["cd3"]["dab_dice"] == 0.7
    assert record["passed"] is False
    assert record["failures"]["2"] == ["cd3 Dice 0.800, best 0.900"]
    text = "\n".join(gate_lines(record))
    assert "**Gate not passed, 2 steps, which misses it by least" in text
    assert "12 tiles of the split `val`" in text
    assert "| teacher, 18 steps | Heun | 0.900 | 1.300 |" in text
    assert "| student, 2 steps | 80, 20 | 0.800 | 1.000 |" in text
    assert "| undistilled, 1 step | 80 | 0.600 | 0.100 |" in text
