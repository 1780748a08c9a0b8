"""The training run: data in, checkpoint out. One loop for every preset; the same command resumes it."""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from staindiffuser import __version__
from staindiffuser.errors import UsageError
from staindiffuser.files import write_json
from staindiffuser.training.checkpoint import NOTICE, Checkpoint, CheckpointConfig
from staindiffuser.training.config import Preset
from staindiffuser.training.data.dataset import CropDataset, GlobalSampler, load_tile, measure_stains
from staindiffuser.training.data.pairs import PairedTile, PairedTiles
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.errors import DataError
from staindiffuser.training.evaluate import check_data, evaluate_tiles
from staindiffuser.training.module import TeacherModule
from staindiffuser.training.receptive import default_margin, effective_radius, theoretical_radius

__all__ = ["RunOptions", "train"]

VALIDATION_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is asked of a run besides its preset."""

    output: Path
    """Run folder: logs, snapshots, and the finished ``checkpoint/``."""
    name: str = "model"
    """Name written into the checkpoint."""
    trained_on: str = "the data named in its card"
    """What the notice on every output says that the model was trained on."""
    resume: bool = True
    """Go on from the run folder's last snapshot if there is one."""
    progress: bool = True
    dry_run: bool = False
    """Check everything, train nothing."""


class Watch(L.Callback):
    """Validation (pictures, DAB-Dice) and the loop's own speed: tiles per second and the share of time without data."""

    def __init__(self, rows: tuple[PairedTile, ...], every: int, tile_pixels: int) -> None:
        self.rows, self.every, self.tile_pixels = rows, every, tile_pixels
        self.waited = self.worked = 0.0
        self.samples = 0
        self._mark = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        now = time.perf_counter()
        self.waited += now - self._mark
        self._mark = now

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        now = time.perf_counter()
        self.worked += now - self._mark
        self.samples += batch["he"].shape[0]
        if trainer.global_step % self.every == 0 and trainer.is_global_zero and isinstance(module, TeacherModule):
            self.validate(trainer, module)
        self._mark = time.perf_counter()

    def speed(self) -> dict[str, float]:
        """Crops per second, the same in tiles of 256², and the share of the time spent waiting for data."""
        total = max(self.waited + self.worked, 1e-9)
        crops = self.samples / total
        return {
            "crops_per_second": round(crops, 2),
            "tiles_256_per_second": round(crops * self.tile_pixels / 256**2, 3),
            "data_wait_share": round(self.waited / total, 4),
        }

    def validate(self, trainer: L.Trainer, module: TeacherModule) -> None:
        pictures: list[Any] = []

        def keep(row: PairedTile, data: dict[str, Any], result: dict[str, Any]) -> None:
            if len(pictures) < 4:
                panels = [data["he"]]
                for stain in module.net.config.stains:
                    cells = np.repeat(result[f"CELLS_{stain.name.upper()}"], 3, axis=2)
                    panels += [data[stain.name], result[f"STAIN_{stain.name.upper()}"], cells]
                pictures.append(np.concatenate(panels, axis=1))

        scores = evaluate_tiles(module.ema, self.rows, sigmas=START_SIGMAS[VALIDATION_STEPS], seen=keep)
        values = {f"val/{m}/{s}": v for s, score in scores.items() for m, v in score.metrics().items()}
        values |= {f"speed/{name}": value for name, value in self.speed().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                sheet = np.concatenate(pictures, axis=0)
                logger.experiment.add_image("val/he_real_virtual_cells", sheet, trainer.global_step, dataformats="HWC")


def train(preset: Preset, data: Path, options: RunOptions) -> Path:
    """Train a teacher on the paired tiles in ``data``.

    Returns:
        the finished checkpoint folder.

    Raises:
        DataError: data that cannot be used; before any training starts.
        UsageError: the output cannot be written, or a finished run stands there.
    """
    tiles = PairedTiles.load(data, check="pixels" if options.dry_run else "headers")
    rows = _checked_rows(tiles, preset)
    model = preset.model if preset.model.stains else dataclasses.replace(preset.model, stains=measure_stains(tiles))
    check_data(tiles, model)
    config = preset.train
    folder = options.output / "checkpoint"
    if options.dry_run:
        return folder
    last = options.output / "snapshots" / "last.ckpt"
    if not options.resume and last.exists():
        raise UsageError(f"{options.output} holds a run already: choose another --output, or resume it")
    try:
        (options.output / "snapshots").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{options.output} cannot be written: {error.strerror}; choose another --output") from error

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its notes on what it does not find
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training", module="lightning")  # the EMA
    L.seed_everything(config.seed, verbose=False)
    module = TeacherModule(model, config)
    watch = Watch(rows[: config.validation_tiles], config.validate_every, config.crop**2)
    module.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on a CPU
    trainer = L.Trainer(
        max_steps=config.steps,
        precision="bf16-mixed" if config.bf16 else "32-true",
        accelerator="auto",
        default_root_dir=options.output,
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        log_every_n_steps=20,
        logger=[
            TensorBoardLogger(options.output, name="tensorboard", version=""),
            CSVLogger(options.output, name="csv", version=""),
        ],
        callbacks=[
            watch,
            ModelCheckpoint(
                options.output / "snapshots",
                save_last=True,
                save_on_exception=True,
                train_time_interval=timedelta(minutes=config.checkpoint_minutes),
            ),
            *([TQDMProgressBar(refresh_rate=5)] if options.progress else []),
        ],
    )
    start = time.perf_counter()
    try:
        # weights_only: the snapshot is this run's own and holds the optimiser's and the loop's state besides tensors.
        trainer.fit(
            module,
            _loader(tiles, config, trainer),
            ckpt_path=last if last.exists() else None,
            weights_only=False,
        )
    except SystemExit:  # what Lightning makes of Ctrl-C and SIGTERM, after it saved a snapshot
        raise KeyboardInterrupt from None
    trainer.save_checkpoint(last)
    seconds = time.perf_counter() - start
    if trainer.is_global_zero:
        provenance = {
            "recipe": dataclasses.asdict(config),
            "data": {"folder": data.name, "training tiles": len(tiles.split("train")), "validation tiles": len(rows)},
            "seconds of the last sitting": round(seconds, 1),
            "speed": watch.speed(),
            "hardware": torch.cuda.get_device_name() if module.device.type == "cuda" else f"CPU, {platform.machine()}",
            "versions": {"staindiffuser": __version__, "torch": str(torch.__version__), "lightning": L.__version__},
        }
        _finish(module, rows[: config.validation_tiles], options, provenance).save(folder)
        write_json(options.output / "speed.json", watch.speed())
    return folder


def _checked_rows(tiles: PairedTiles, preset: Preset) -> tuple[PairedTile, ...]:
    path = tiles.folder / "tiles.csv"
    if not tiles.split("train"):
        raise DataError(f"{path}: no rows with split 'train'")
    rows = tiles.split("val")
    if not rows:
        raise DataError(f"{path}: no rows with split 'val'; a run needs some to judge itself by")
    height, width = load_tile(rows[0], tiles.stains)["he"].shape[:2]
    if min(height, width) < preset.train.crop:
        raise DataError(
            f"{path}: tiles are {width} × {height}, smaller than the crop of {preset.train.crop}: use --crop"
        )
    return rows


def _loader(tiles: PairedTiles, config: Any, trainer: L.Trainer) -> DataLoader[Any]:
    sampler = GlobalSampler(
        lambda: trainer.global_step * config.batch,
        config.steps * config.batch,
        config.batch,
        rank=lambda: trainer.global_rank,
        world=lambda: trainer.world_size,
    )
    return DataLoader(
        CropDataset(tiles, crop=config.crop, seed=config.seed),
        batch_size=config.batch // trainer.world_size,
        sampler=sampler,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _finish(
    module: TeacherModule, rows: tuple[PairedTile, ...], options: RunOptions, provenance: dict[str, Any]
) -> Checkpoint:
    """The EMA weights with what must be measured on them: the radius of influence, and the validation scores."""
    network = module.ema.cpu().eval()
    sigmas = START_SIGMAS[VALIDATION_STEPS]
    data = [load_tile(row, tuple(s.name for s in network.config.stains)) for row in rows[:8]]
    radius = effective_radius(network, np.stack([d["he"] for d in data]), sigmas=sigmas)
    scores = evaluate_tiles(network, rows, sigmas=sigmas)
    tile = CheckpointConfig.tile
    config = CheckpointConfig(
        name=options.name,
        model=network.config,
        notice=NOTICE.format(trained_on=options.trained_on),
        margin=default_margin(radius, tile),
        receptive_radius=theoretical_radius(network.config),
        effective_radius=radius,
        provenance=provenance,
    )
    stains = {name: score.metrics() for name, score in scores.items()}
    metrics = {"split": "val", "steps": VALIDATION_STEPS, "tiles": len(rows), "stains": stains}
    return Checkpoint(config=config, network=network, metrics=metrics)
