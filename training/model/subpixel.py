"""Convolutions whose output is pixel-shuffled, kept free of a grid.

Each pixel of a cell of 2 × 2 comes from a filter of its own. Where the four answer differently to what does not change
within a cell, the image has a faint grid with a period of two pixels, however smooth the features are. They answer
alike if together they reproduce every affine function (the Strang–Fix conditions of order two), which is linear in
their weights: weights are projected onto the nearest that fulfil it. Detail within a cell is left to them, and nothing
is added to what a tile costs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from staindiffuser.training.model.layers import MPConv

__all__ = ["phase_errors", "without_grid_"]

PHASES = 4
"""Pixels of a cell, in the order of :func:`torch.nn.functional.pixel_shuffle`: row by row."""


def _conditions(side: int) -> Tensor:
    """What the four filters of a colour and an input channel must be orthogonal to, float64 [9, 4 · side²].

    With S the sum of a filter's taps and M their first moment (in cells, from the cell's centre), a feature a + b x
    gives a S + b M at the pixel, which must be a S + b (S o + c) for the pixel's offset o of ± 1/4, whatever a and b.
    So S, M_y − S o_y and M_x − S o_x must not depend on the pixel.
    """
    taps = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    offsets = torch.tensor([-0.25, 0.25], dtype=torch.float64)
    y, x = (grid.flatten() for grid in torch.meshgrid(taps, taps, indexing="ij"))
    off_y, off_x = (grid.flatten() for grid in torch.meshgrid(offsets, offsets, indexing="ij"))
    alike = torch.stack([torch.ones(PHASES, side * side).double(), y - off_y[:, None], x - off_x[:, None]])
    rows = []
    for values in alike:  # of one pixel less that of the first
        for phase in range(1, PHASES):
            row = torch.zeros(PHASES, side * side, dtype=torch.float64)
            row[phase], row[0] = values[phase], -values[0]
            rows.append(row.flatten())
    return torch.stack(rows)


@cache
def _projection(side: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The conditions and their pseudoinverse, copied once: a copy at every step would make a GPU wait."""
    conditions = _conditions(side)
    return conditions.to(device, dtype), torch.linalg.pinv(conditions).to(device, dtype)


def phase_errors(weight: Tensor) -> Tensor:
    """By how much the filters of plain weights [4 C, cin, k, k] miss the conditions: [C, cin, 9]."""
    grouped = torch.unflatten(weight, 0, (-1, PHASES)).transpose(1, 2).flatten(2, 4)
    conditions, _ = _projection(weight.shape[-1], grouped.device, grouped.dtype)
    return torch.einsum("cif,nf->cin", grouped, conditions)


@torch.no_grad()
def without_grid_(layer: MPConv) -> None:
    """Project a convolution that is pixel-shuffled by 2, in place: the plain weights that it stands for become the
    nearest (in the sum of squares) without a grid; its direction and gain follow.

    Args:
        layer: has 4 C outputs, a gain and an odd kernel. Where its weights are split over processes (FSDP2), every
            process must call this.
    """
    if isinstance(layer.weight, DTensor):
        _without_grid_in_parts(layer)
        return
    assert layer.gain is not None
    plain = layer.plain_weight()
    side = layer.kernel
    _, inverse = _projection(side, plain.device, plain.dtype)
    change = torch.einsum("cin,fn->cif", phase_errors(plain), inverse)
    projected = plain - torch.unflatten(change, 2, (PHASES, side, side)).transpose(1, 2).flatten(0, 1)
    norm = torch.linalg.vector_norm(projected.flatten(1), dim=1)
    signed = torch.where(layer.gain < 0, -norm, norm)
    unit = projected * (projected[0].numel() ** 0.5 / signed).view(-1, 1, 1, 1)
    layer.weight.copy_(torch.where(norm.view(-1, 1, 1, 1) > 0, unit, layer.weight))  # no gain yet: no direction
    layer.gain.copy_(signed / layer.scale)
    # What the normalisation adds to each norm would make the weights shrink with every projection.
    now = torch.linalg.vector_norm(layer.plain_weight().flatten(1), dim=1)
    layer.gain.mul_(torch.where(now > 0, norm / now, 1.0))
    if layer.bias is not None:
        layer.bias.copy_(torch.unflatten(layer.bias, 0, (-1, PHASES)).mean(dim=1).repeat_interleave(PHASES))


def _without_grid_in_parts(layer: MPConv) -> None:
    parts: dict[str, DTensor] = {}
    for name, parameter in layer.named_parameters():
        assert isinstance(parameter.data, DTensor)
        parts[name] = parameter.data
    cout, cin, side, _ = layer.weight.shape
    with torch.device("meta"):  # draws nothing
        whole = MPConv(cin, cout, side, bias=layer.bias is not None, gain=1.0)
    whole.scale = layer.scale
    whole.load_state_dict({name: part.full_tensor() for name, part in parts.items()}, assign=True)
    without_grid_(whole)
    for name, part in parts.items():
        tensor = whole.get_parameter(name).detach()
        part.copy_(distribute_tensor(tensor, part.device_mesh, part.placements))
