"""What keeps a large GPU busy during training, and what several of them need; shown on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from staindiffuser.training import loop
from staindiffuser.training import train as training
from staindiffuser.training.config import PRESETS, Preset
from staindiffuser.training.data.dataset import CropBatch
from staindiffuser.training.errors import DivergedError
from staindiffuser.training.learner import Loss
from staindiffuser.training.loop import Fitted
from staindiffuser.training.model.layers import MPConv, normalize_weight_, unit_variance
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.options import RunOptions
from staindiffuser.training.processes import Processes
from staindiffuser.training.teacher import Teacher
from staindiffuser.training.train import how_it_was_trained, train


def preset(steps: int, **changes: Any) -> Preset:
    recipe = dataclasses.replace(
        PRESETS["debug"].train, steps=steps, crop=32, warmup=2, cooldown=0.0, validate_every=100, validation_tiles=2
    )
    return dataclasses.replace(PRESETS["debug"], train=dataclasses.replace(recipe, **changes))


def diverge(monkeypatch: pytest.MonkeyPatch, at: int, part: int = 0) -> list[torch.Tensor]:
    """Make one part of one step diverge; returns its H&E, when it has been met."""
    forward, calls, met = Teacher.forward, [0], list[torch.Tensor]()

    def poisoned(self: Teacher, batch: CropBatch, step: int) -> Loss:
        loss = forward(self, batch, step)
        calls[0] = calls[0] + 1 if step == at else 0
        if step == at and calls[0] == part + 1:
            met.append(batch.he)
            return dataclasses.replace(loss, value=loss.value * float("nan"))
        return loss

    monkeypatch.setattr(Teacher, "forward", poisoned)
    return met


def looking_every(monkeypatch: pytest.MonkeyPatch, steps: int) -> list[int]:
    """Look for a bad loss as rarely as on a GPU; returns when it was looked for."""
    looked: list[int] = []
    due = loop._FiniteLosses.due

    def rarely(self: Any, done: int) -> bool:
        self._every = steps
        looked.extend([done] * due(self, done))
        return due(self, done)

    monkeypatch.setattr(loop._FiniteLosses, "due", rarely)
    return looked


@pytest.mark.parametrize("parts", [1, 2])
def test_the_batch_is_named_long_after_its_loss(
    tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    looked = looking_every(monkeypatch, 5)
    met = diverge(monkeypatch, at=6, part=parts - 1)
    options = RunOptions(output=tmp_path, log_every=5, progress="none")
    with pytest.raises(DivergedError, match="the loss is not finite at step 6") as error:
        train(preset(20, gradient_accumulation=parts), tiles_folder, options)
    assert looked == [5, 10]
    assert "diverged-batch.pt" in str(error.value)
    saved = torch.load(tmp_path / "diverged-batch.pt")
    assert saved["step"] == 6
    assert torch.equal(saved["batch"]["he"], met[0])


def test_weights_that_diverged_are_never_saved(
    tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking_every(monkeypatch, 1000)
    diverge(monkeypatch, at=3)
    options = RunOptions(output=tmp_path, log_every=1000, progress="none")
    with pytest.raises(DivergedError, match="step 3"):
        train(preset(20, checkpoint_steps=5), tiles_folder, options)
    assert not list((tmp_path / "snapshots").glob("*.ckpt"))


def test_weights_of_one_shape_are_normalised_together_to_the_same_bits() -> None:
    torch.manual_seed(0)
    network = DualDiffusion(dataclasses.replace(PRESETS["debug"].model, stains=())).to(
        memory_format=torch.channels_last  # type: ignore[call-overload]
    )
    layers = nn.ModuleList([*(MPConv(5, 7, 3) for _ in range(4)), MPConv(5, 7, 0), MPConv(5, 7, 1)])
    every = [m for part in (network, layers) for m in part.modules() if isinstance(m, MPConv)]
    assert len({tuple(m.weight.shape) for m in every}) < len(every)
    expected = [unit_variance(m.weight.detach()) for m in every]
    strides = [m.weight.stride() for m in every]
    normalize_weight_(network, layers)
    for layer, wanted, stride in zip(every, expected, strides, strict=True):
        assert torch.equal(layer.weight, wanted)
        assert layer.weight.stride() == stride


@pytest.mark.parametrize("name", ["forward_sync_buffers", "broadcast_buffers"])
def test_buffers_are_not_sent_under_either_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Torch 2.11 knows no ``forward_sync_buffers``; 2.12 warns of ``broadcast_buffers``."""
    given: dict[str, Any] = {}

    class New(nn.Module):
        def __init__(self, module: nn.Module, device_ids: Any = None, forward_sync_buffers: Any = None) -> None:
            super().__init__()
            given.update(forward_sync_buffers=forward_sync_buffers)

    class Old(nn.Module):
        def __init__(self, module: nn.Module, device_ids: Any = None, broadcast_buffers: Any = None) -> None:
            super().__init__()
            given.update(broadcast_buffers=broadcast_buffers)

    chosen = New if name == "forward_sync_buffers" else Old
    monkeypatch.setattr(f"{Processes.__module__}.DistributedDataParallel", chosen)
    Processes(rank=0, world=2, device=torch.device("cpu")).distribute(nn.Linear(1, 1))
    assert given == {name: False}


def test_the_card_names_the_gpu_that_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    class Data:
        def provenance(self, changes: Any) -> dict[str, Any]:
            return {}

    fitted = Fitted(network=None, step=1, best=None, first=True, seconds=1.0, speed={}, data_changes=[])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    recipe = PRESETS["debug"].train
    assert how_it_was_trained(recipe, Data(), fitted)["hardware"] == "NVIDIA H100"  # type: ignore[arg-type]


def test_what_is_measured_after_a_run_is_measured_where_it_ran(
    tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network must not have been moved to the CPU before receptive fields and scores are measured."""
    order: list[str] = []
    measured, cpu = training.measured, nn.Module.cpu

    def measure(*arguments: Any) -> Any:
        order.append("measured")
        return measured(*arguments)

    def to_cpu(self: nn.Module) -> nn.Module:
        order.append("cpu")
        return cpu(self)

    monkeypatch.setattr(training, "measured", measure)
    monkeypatch.setattr(DualDiffusion, "cpu", to_cpu)
    train(preset(1), tiles_folder, RunOptions(output=tmp_path, progress="none"))
    assert order == ["measured", "cpu"]
