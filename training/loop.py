"""The training run: data in, checkpoint out. One loop for every preset; the same command resumes it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import Dataset

from staindiffuser import __version__
from staindiffuser.errors import UsageError
from staindiffuser.files import write_json
from staindiffuser.training.callbacks import EachStep, KeepCurves, Snapshots, Speed, TimedLoader
from staindiffuser.training.checkpoint import NOTICE, Checkpoint, CheckpointConfig
from staindiffuser.training.config import Preset, TrainConfig
from staindiffuser.training.curves import curves_image
from staindiffuser.training.data.dataset import CropDataset, GlobalSampler, load_tile, measure_stains
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.errors import DataError
from staindiffuser.training.evaluation.evaluate import check_data, evaluate_tiles
from staindiffuser.training.model.network import DualDiffusion, Task
from staindiffuser.training.module import TASKS, TeacherModule
from staindiffuser.training.receptive import default_margin, effective_radius, theoretical_radius
from staindiffuser.training.resuming import begun_with, check_snapshot
from staindiffuser.training.tiles.mixed_tiles import MixedTiles, open_tiles
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles, spread

__all__ = [
    "RunOptions",
    "StrategyName",
    "check_run",
    "check_writable",
    "fit",
    "fit_teacher",
    "load_tiles",
    "measured",
    "train",
    "validation_rows",
]

VALIDATION_STEPS = 2
StrategyName = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is asked of a run besides its preset."""

    output: Path
    """Run folder: logs, snapshots, and the finished ``checkpoint/``."""
    name: str = "model"
    """Name written into the checkpoint."""
    trained_on: str = "the data named in its card"
    """What the notice on every output says that the model was trained on."""
    resume: bool | Path = True
    """Go on from the run folder's last snapshot if there is one, or else from this snapshot: of another run perhaps,
    with another recipe, but of the same model."""
    start: Path | None = None
    """Begin with the weights, sizes and constants of this checkpoint instead of random weights."""
    strategy: StrategyName = "ddp"
    """With several processes: each holds the whole model (``ddp``) or a share of it (``fsdp``)."""
    log_every: int = 20
    """Steps between two lines of the curves."""
    progress: bool = True
    dry_run: bool = False
    """Check everything, train nothing."""


class Validation(EachStep):
    """Every so many steps, images and DAB-Dice into TensorBoard and the CSV."""

    def __init__(self, rows: tuple[PairedTile, ...], every: int) -> None:
        self.rows, self.every = rows, every

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step % self.every == 0 and isinstance(module, TeacherModule):
            network = module.averaged()  # on every process: it may have to be gathered
            if trainer.is_global_zero:
                self.validate(trainer, network)

    def validate(self, trainer: L.Trainer, network: DualDiffusion) -> None:
        images: list[Any] = []

        def keep(row: PairedTile, data: dict[str, Any], result: dict[str, Any]) -> None:
            if len(images) < 4:
                panels = [data["he"]]
                for stain in network.config.stains:
                    cells = np.repeat(result[f"CELLS_{stain.name.upper()}"], 3, axis=2)
                    panels += [data[stain.name], result[f"STAIN_{stain.name.upper()}"], cells]
                images.append(np.concatenate(panels, axis=1))

        scores = evaluate_tiles(network, self.rows, sigmas=START_SIGMAS[VALIDATION_STEPS], seen=keep)
        values = {f"val/{m}/{s}": v for s, score in scores.items() for m, v in score.metrics().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                sheet = np.concatenate(images, axis=0)
                logger.experiment.add_image("val/he_real_virtual_cells", sheet, trainer.global_step, dataformats="HWC")


def train(preset: Preset, data: Path | Sequence[str], options: RunOptions, *, tasks: tuple[Task, ...] = TASKS) -> Path:
    """Train a teacher on paired tiles.

    Args:
        data: a folder, or several, each with its weight (see :func:`open_tiles`).
        tasks: the branches that are trained, of each stain.

    Returns:
        the finished checkpoint folder.

    Raises:
        CheckpointError, DataError: a start or data that cannot be used; before any training starts.
        UsageError: the output cannot be written, a finished run stands there, or the start is of another preset.
    """
    config = preset.train
    check_run(config, options, options.start)
    start = Checkpoint.load(options.start) if options.start else None
    tiles = load_tiles(data, config, options, start.config.model.stain_names if start else ())
    model = preset.model
    if not model.stains:
        model = dataclasses.replace(model, stains=start.config.model.stains if start else measure_stains(tiles))
    if start and start.config.model != model:
        raise UsageError(f"--from {options.start}: its sizes or stains are not the preset's: choose the one it is of")
    for part in tiles.parts:
        check_data(part, model)
    folder = options.output / "checkpoint"
    if options.dry_run:
        return folder
    L.seed_everything(config.seed, verbose=False)
    module = TeacherModule(model, config, tasks=tasks, start=start.network.state_dict() if start else None)
    provenance = fit_teacher(module, tiles, options)
    if start:
        provenance["begun with"] = {"name": start.config.name, **start.config.provenance}
    network = module.averaged()
    if module.trainer.is_global_zero:
        sigmas = START_SIGMAS[VALIDATION_STEPS]
        radius, metrics = measured(network, validation_rows(tiles, config), sigmas)
        about = CheckpointConfig(
            name=options.name,
            model=model,
            notice=NOTICE.format(trained_on=options.trained_on),
            margin=default_margin(radius, CheckpointConfig.tile),
            receptive_radius=theoretical_radius(model),
            effective_radius=radius,
            provenance=provenance,
        )
        curves = curves_image(options.output)
        Checkpoint(config=about, network=network.cpu(), metrics=metrics, curves=curves).save(folder)
    return folder


def fit_teacher(module: TeacherModule, tiles: PairedTiles | MixedTiles, options: RunOptions) -> dict[str, Any]:
    """Train on checked tiles with validation; returns what a checkpoint says of how it came to be."""
    config = module.config
    validation = Validation(validation_rows(tiles, config), config.validate_every)
    dataset = CropDataset(tiles, crop=config.crop, seed=config.seed)
    seconds = fit(module, dataset, config, options, callbacks=[validation])
    counts = {"training tiles": len(tiles.split("train")), "validation tiles": len(tiles.split("val"))}
    shares = {"shares": tiles.shares} if len(tiles.parts) > 1 else {}
    speed = options.output / "speed.json"
    return {
        "recipe": dataclasses.asdict(config),
        "data": {"folder": ", ".join(part.folder.name for part in tiles.parts), **shares, **counts},
        "seconds of the last sitting": round(seconds, 1),
        "speed": json.loads(speed.read_text()) if speed.is_file() else {},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "versions": {"staindiffuser": __version__, "torch": str(torch.__version__), "lightning": L.__version__},
    }


def fit(
    module: L.LightningModule,
    dataset: Dataset[Any],
    config: TrainConfig,
    options: RunOptions,
    *,
    callbacks: Sequence[L.Callback] = (),
) -> float:
    """Run any module over ``config.steps`` steps: processes, loggers, snapshots, resuming, the sampler.

    Args:
        dataset: sample number → item; asked for the numbers 0 to ``steps`` × ``batch`` in order.

    Returns:
        the seconds that this sitting took.

    Raises:
        UsageError: the output cannot be written, or a run stands there that is not to be resumed.
        KeyboardInterrupt: the run was asked to stop, and has saved a snapshot.
    """
    check_run(config, options)
    last, run = _snapshot(options), begun_with(module, config)
    first = last if last.exists() else options.resume if isinstance(options.resume, Path) else None
    if first:  # before there is a trainer, whose loggers begin new files
        check_snapshot(first, run, same_recipe=first == last)
    try:
        last.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{options.output} cannot be written: {error.strerror}; choose another --output") from error
    _quiet()
    if options.strategy != "fsdp":  # which takes no other layout than the plain one
        module.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    world, here = _processes()
    share = config.batch // (world * config.accumulate)
    loader = TimedLoader(
        dataset,
        batches=config.steps * config.accumulate,
        batch_size=share,
        sampler=GlobalSampler(
            lambda: trainer.global_step * config.batch,
            config.steps * config.batch,
            config.batch,
            rank=lambda: trainer.global_rank,
            world=lambda: trainer.world_size,
        ),
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    speed = Speed(loader, crop=config.crop, batch=share * world, every=config.validate_every)
    snapshots = Snapshots(last, minutes=config.checkpoint_minutes, steps=config.checkpoint_steps, run=run)
    trainer = L.Trainer(
        max_steps=config.steps,
        accumulate_grad_batches=config.accumulate,
        precision="bf16-mixed" if config.bf16 else "32-true",
        accelerator="auto",
        devices=here,
        num_nodes=world // here,
        strategy=_strategy(module, options, world),
        plugins=[TorchElasticEnvironment() if TorchElasticEnvironment.detect() else LightningEnvironment()],
        use_distributed_sampler=False,  # ours knows its share
        default_root_dir=options.output,
        enable_checkpointing=False,  # Snapshots does it
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        log_every_n_steps=options.log_every,
        logger=[
            TensorBoardLogger(options.output, name="tensorboard", version=""),
            CSVLogger(options.output, name="csv", version="", flush_logs_every_n_steps=1),
        ],
        callbacks=[
            KeepCurves(options.output / "csv" / "metrics.csv"),
            speed,
            *callbacks,
            *([TQDMProgressBar(refresh_rate=5)] if options.progress else []),
            snapshots,
        ],
    )
    start = time.perf_counter()
    try:
        trainer.fit(module, loader, ckpt_path=first, weights_only=False)  # see check_snapshot
    except SystemExit:  # what Lightning makes of a signal that came before Snapshots listened
        raise KeyboardInterrupt from None
    if snapshots.stopped:
        raise KeyboardInterrupt
    if trainer.is_global_zero and speed.crops:
        write_json(options.output / "speed.json", speed.summary())
    return time.perf_counter() - start


def check_run(config: TrainConfig, options: RunOptions, source: Path | None = None) -> None:
    """Refuse what cannot be run, without writing anything.

    Args:
        source: the checkpoint that the run is made from, if there is one.

    Raises:
        UsageError: the batch cannot be shared, a snapshot is missing or unwanted, or the output cannot be written.
    """
    world, _ = _processes()
    parts = world * config.accumulate
    if config.batch % parts:
        raise UsageError(
            f"batch is {config.batch}: {world} processes of {config.accumulate} parts each cannot share it; "
            f"choose a multiple of {parts}"
        )
    if options.strategy == "fsdp" and world == 1:
        raise UsageError("--strategy fsdp shares the weights over several processes: start them with torchrun")
    if isinstance(options.resume, Path) and not options.resume.is_file():
        raise UsageError(f"--resume {options.resume}: no such snapshot")
    if options.resume is False and _snapshot(options).exists():
        raise UsageError(f"{options.output} holds a run already: choose another --output, or resume it")
    check_writable(options.output, source)


def check_writable(output: Path, source: Path | None = None) -> None:
    """Refuse a run folder that cannot be written, or whose checkpoint is the one that the run is made from.

    Raises:
        UsageError: so it is.
    """
    if source is not None and (output / "checkpoint").resolve() == source.resolve():
        raise UsageError(f"--output {output} would replace {source}: choose another")
    place = output
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{output} cannot be written: {place} is no folder to write to; choose another --output")


@overload
def load_tiles(data: Path, config: TrainConfig, options: RunOptions, stains: tuple[str, ...] = ()) -> PairedTiles: ...
@overload
def load_tiles(
    data: Sequence[str], config: TrainConfig, options: RunOptions, stains: tuple[str, ...] = ()
) -> PairedTiles | MixedTiles: ...
def load_tiles(
    data: Path | Sequence[str], config: TrainConfig, options: RunOptions, stains: tuple[str, ...] = ()
) -> PairedTiles | MixedTiles:
    """Load and check paired tiles to train on: every pixel before a run begins, the headers when it goes on.

    Args:
        data: a folder, or several, each with its weight (see :func:`open_tiles`).
        stains: the stain columns that are needed; all of them if none are named.

    Raises:
        DataError: naming the file and the field.
    """
    begun = isinstance(options.resume, Path) or _snapshot(options).exists()
    check: Literal["pixels", "headers"] = "headers" if begun and not options.dry_run else "pixels"
    tiles = open_tiles([data] if isinstance(data, Path) else data, check=check)
    for part in tiles.parts:
        for stain in stains:
            if stain not in part.stains:
                path = part.folder / "tiles.csv"
                raise DataError(f"{path}, row 1: column {stain!r} is missing; there are {', '.join(part.stains)}")
    CropDataset(tiles, crop=config.crop, seed=config.seed)  # refuses sizes and weights that it cannot use
    rows = validation_rows(tiles, config)
    if not rows:
        path = tiles.folder / "tiles.csv"
        raise DataError(f"{path}: no rows with split 'val'; a run needs some to judge itself by")
    for row in rows:
        width, height = row.size
        if row.size != rows[0].size or width % 16 or height % 16:
            raise DataError(
                f"{row.file}, row {row.row}: the tile is {width} × {height}; tiles to validate by must be of one "
                "size, a multiple of 16"
            )
    if not stains:
        return tiles
    if isinstance(tiles, PairedTiles):
        return dataclasses.replace(tiles, stains=stains)
    return dataclasses.replace(tiles, parts=tuple(dataclasses.replace(part, stains=stains) for part in tiles.parts))


def validation_rows(tiles: PairedTiles | MixedTiles, config: TrainConfig) -> tuple[PairedTile, ...]:
    """As many validation tiles as asked for, spread over all of them: they stand slide by slide."""
    return spread(tiles.split("val"), config.validation_tiles)


def measured(
    network: DualDiffusion, rows: tuple[PairedTile, ...], sigmas: tuple[float, ...]
) -> tuple[int, dict[str, Any]]:
    """The radius of influence in pixels, and the validation scores, of a finished network."""
    stains = network.config.stain_names
    he = np.stack([load_tile(row, stains)["he"] for row in rows[:8]])
    scores = evaluate_tiles(network, rows, sigmas=sigmas)
    metrics = {name: score.metrics() for name, score in scores.items()}
    about = {"split": "val", "steps": len(sigmas), "tiles": len(rows), "stains": metrics}
    return effective_radius(network, he, sigmas=sigmas), about


def _snapshot(options: RunOptions) -> Path:
    return options.output / "snapshots" / "last.ckpt"


def _processes() -> tuple[int, int]:
    """How many processes torchrun has started, in all and on this machine; one where it has not."""
    if not TorchElasticEnvironment.detect():
        return 1, 1
    return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])


def _strategy(module: L.LightningModule, options: RunOptions, world: int) -> Strategy | str:
    if options.strategy == "fsdp":
        if not is_overridden("configure_model", module):
            raise UsageError(
                f"--strategy fsdp: {type(module).__name__} does not know how to share its weights; use ddp"
            )
        return ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return DDPStrategy(forward_sync_buffers=False) if world > 1 else "auto"  # the buffers are constants


def _quiet() -> None:
    """Keep Lightning from explaining what is meant so."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*in eval mode at the start of training",  # the moving average
        "Experiment logs directory",  # KeepCurves
        ".*does not have many workers",
        ".*smaller than the logging interval",
        ".*isinstance.treespec, LeafSpec",
        ".*returned a view tensor",  # of FSDP: nothing is done to it in place
    ):
        warnings.filterwarnings("ignore", message=message)
