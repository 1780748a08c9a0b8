"""A trained network in a larger model: with a backbone beside its encoder, with more stains.

What both have keeps computing what it did, to rounding (cf. Net2Net: Chen et al. 2016, arXiv 1511.05641): where a layer
gains inputs, their weights begin at zero, and its filters' norm, which is all that a normalised layer looks at, stays.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from staindiffuser.training.config import ModelConfig
from staindiffuser.training.model.branch import Branch
from staindiffuser.training.model.encoder import HEEncoder
from staindiffuser.training.model.layers import MPConv
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.model.pretrained import lite0_weights

__all__ = ["can_widen", "widened"]


def can_widen(start: ModelConfig, model: ModelConfig) -> bool:
    """Whether a network of ``start`` can begin one of ``model``.

    The encoder's own pyramid and the noise levels must be the same. Stains may be added, and a backbone; branches whose
    sizes differ begin anew.
    """
    shared = replace(start, image=model.image, cells=model.cells, stains=model.stains, backbone=model.backbone)
    return shared == model and start.backbone in ("none", model.backbone)


def widened(start: DualDiffusion, model: ModelConfig) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state of a network of ``model`` that begins with the weights of ``start``; see :func:`can_widen`.

    Returns:
        the state, and what begins anew, such as ``images of cd20``.
    """
    old, network = start.config, DualDiffusion(model)
    fresh: list[str] = []
    _copy_encoder(start.encoder, network.encoder)
    if old.backbone != model.backbone:
        fresh.append("the backbone, with its published weights")
        assert network.encoder.backbone is not None
        network.encoder.backbone.load_state_dict(lite0_weights())
    for task in ("images", "cells"):
        same = (old.image == model.image) if task == "images" else (old.cells == model.cells)
        branches, known = getattr(network, task), getattr(start, task)
        for stain, branch in branches.items():
            if same and stain in known:
                _copy_branch(known[stain], branch, old, model)
            else:
                fresh.append(f"{task} of {stain}")
    return network.state_dict(), tuple(fresh)


def _copy_encoder(start: HEEncoder, encoder: HEEncoder) -> None:
    encoder.load_state_dict({**encoder.state_dict(), **start.state_dict()})


def _copy_branch(start: Branch, branch: Branch, old: ModelConfig, new: ModelConfig) -> None:
    """All that does not read the features is copied as it is; of what does, the new inputs begin at zero."""
    widths = tuple(zip(old.features, new.features, strict=True))
    own = {
        name: tensor for name, tensor in start.state_dict().items() if not name.startswith(("attention.", "inject."))
    }
    branch.load_state_dict({**branch.state_dict(), **own})
    for level, width in enumerate(widths):
        inputs = [width, widths[level - 1]] if level else [width]
        _copy_layer(_layer(start.attention.mix[level]), _layer(branch.attention.mix[level]), inputs)
        _copy_layer(_layer(start.attention.gate[level]), _layer(branch.attention.gate[level]), [width])
        _copy_layer(_layer(start.inject[level]), _layer(branch.inject[level]), [width])


def _layer(module: torch.nn.Module) -> MPConv:
    assert isinstance(module, MPConv)
    return module


@torch.no_grad()
def _copy_layer(start: MPConv, layer: MPConv, inputs: list[tuple[int, int]]) -> None:
    """Copy a convolution into a wider one.

    Args:
        inputs: the numbers of channels, before and now, of the parts that the input is made of, in order.
    """
    rows = start.weight.shape[0]
    layer.weight[:rows] = 0
    here = there = 0
    for before, now in inputs:
        layer.weight[:rows, here : here + before] = start.weight[:, there : there + before]
        here, there = here + now, there + before
    for name in ("bias", "gain"):
        values = getattr(start, name)
        if values is not None:
            getattr(layer, name)[:rows] = values
