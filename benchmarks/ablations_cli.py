"""``staindiffuser bench ablations``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["ablations"]


class SizeName(StrEnum):
    """Sizes of the model, each with its recipe; ``small`` is for this table."""

    debug = "debug"
    small = "small"
    demo = "demo"
    base = "base"
    large = "large"


class SplitName(StrEnum):
    """Rows that can be scored on."""

    val = "val"
    test = "test"


def ablations(
    data: Annotated[Path, typer.Option(help="Folder of paired tiles to train on.", show_default=False)],
    output: Annotated[
        Path, typer.Option(help="Gets the table, the chart and every run; the same command resumes it.")
    ] = Path("ablations"),
    test: Annotated[Path | None, typer.Option(help="Paired tiles to score on; --data if not given.")] = None,
    simulated: Annotated[
        Path | None, typer.Option(help="Paired tiles, simulated for example, that the arm mixed trains on as well.")
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Rows to score on; val to choose settings by.")] = SplitName.test,
    arms: Annotated[str, typer.Option(help="What to compare.")] = "regression,pix2pix,single,plain,separate,dual",
    sizes: Annotated[
        str,
        typer.Option(
            help="Training tiles, or all; regression, single, mixed and dual run at every number, the rest at the "
            "median one."
        ),
    ] = "64,256,1024",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, each with other weights, tiles and noise.")] = 3,
    preset: Annotated[SizeName, typer.Option(help="Size and recipe; small takes a minute a run.")] = SizeName.small,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of the preset's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step, instead of the preset's.")] = None,
    crop: Annotated[int | None, typer.Option(help="Crop size in pixels, instead of the preset's.")] = None,
    tile: Annotated[int, typer.Option(min=0, help="Side that tiles are cut to, pixels; 0 leaves them whole.")] = 128,
    test_tiles: Annotated[int, typer.Option(min=1, help="At most so many tiles to score on.")] = 128,
    sampler_steps: Annotated[int, typer.Option(help="Steps of the sampler where there is one: 1, 2 or 4.")] = 2,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate, instead of each arm's own.")] = None,
    resume: Annotated[bool, typer.Option(help="Keep the runs that are done already.")] = True,
) -> None:
    """Baselines and ablations on the same tiles with equal optimiser steps: one table, one chart.

    regression: a U-Net. pix2pix: the same U-Net with a discriminator. single: diffusion without the cell branches.
    plain: features injected without task attention. separate: one model a stain. mixed: the method, every second
    sample from --simulated. dual: the method as it is.

    Example: staindiffuser bench ablations --data tiles --test unseen --output ablations
    """
    from typing import get_args

    from staindiffuser.benchmarks.ablations import AblationStudy, ArmName, bench_ablations, chosen_preset
    from staindiffuser.errors import UsageError

    known = {name: name for name in get_args(ArmName)}
    wanted = [name.strip() for name in arms.split(",")]
    for name in wanted:
        if name not in known:
            raise UsageError(f"--arms: {name!r} is unknown; known are {', '.join(known)}")
    study = AblationStudy(
        data=data,
        output=output,
        preset=chosen_preset(preset.value, steps=steps, batch=batch, crop=crop),
        test=test,
        simulated=simulated,
        split=split.value,
        arms=tuple(known[name] for name in known if name in wanted),
        sizes=_numbers(sizes),
        seeds=seeds,
        tile=tile or None,
        test_tiles=test_tiles,
        sampler_steps=sampler_steps,
        learning_rate=learning_rate,
        resume=resume,
    )
    report = bench_ablations(study, lambda message: typer.echo(message, err=True))
    for line in report["findings"]:
        typer.echo(line)
    typer.echo(f"table: {output / 'ablations.md'}")


def _numbers(sizes: str) -> tuple[int | None, ...]:
    from staindiffuser.errors import UsageError

    try:
        numbers = {None if part.strip() == "all" else int(part) for part in sizes.split(",")}
    except ValueError:
        numbers = {0}
    if any(number is not None and number < 1 for number in numbers):
        raise UsageError(f"--sizes {sizes}: must be numbers of tiles with commas between them, or all")
    return tuple(sorted(numbers, key=lambda number: float("inf") if number is None else number))
