"""``preview.png``: the H&E and every stain side by side, the whole slide above and a detail below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from staindiffuser.client.contract import ModelContract, ServedStain
from staindiffuser.client.model_view import ModelView
from staindiffuser.client.result_files import cell_map_file, image_file
from staindiffuser.client.run_record import SYNTHETIC, gate_text
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.ome_tiff import read_region

__all__ = ["PANEL", "round_length", "write_preview"]

PANEL = 640
"""Longer side of a panel, pixels."""
DETAIL = 512
"""Side of the detail, pixels at the model's pixel size; half the longer side of a small image."""
GAP = 16
INK, PAPER = (32, 32, 32), (255, 255, 255)


def write_preview(
    folder: Path,
    path: Path,
    view: ModelView,
    overview: UInt8Array,
    stains: tuple[ServedStain, ...],
    contract: ModelContract,
) -> None:
    """Draw the preview of a finished result.

    Args:
        folder: holds the result's images.
        path: the PNG to write.
        view: the slide at the model's pixel size.
        overview: the whole slide at low resolution, uint8 [H, W, 3].
        stains: the stains in the result.
        contract: of the model; its notice is part of the image.
    """
    width, height = view.size
    factor = PANEL / max(width, height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    x, y, side_x, side_y = _choose_detail(folder, view, overview, stains)
    whole = [Image.fromarray(overview).resize(size, Image.Resampling.LANCZOS)]
    detail = [Image.fromarray(view.read(x, y, side_x, side_y))]
    for stain in stains:
        with tifffile.TiffFile(folder / image_file(stain)) as tiff:
            levels = tiff.series[0].levels
            level = next((i for i in reversed(range(len(levels))) if max(levels[i].shape[:2]) >= PANEL), 0)
            whole.append(Image.fromarray(levels[level].asarray()).resize(size, Image.Resampling.LANCZOS))
            detail.append(Image.fromarray(read_region(tiff, x, y, side_x, side_y)))
    zoom = PANEL / max(side_x, side_y)
    enlarged = (round(side_x * zoom), round(side_y * zoom))
    detail = [image.resize(enlarged, Image.Resampling.LANCZOS) for image in detail]
    titles = ["H&E (input)", *(f"{stain.label} (virtual)" for stain in stains)]
    box = tuple(round(value * factor) for value in (x, y, x + side_x, y + side_y))
    for image in whole:
        ImageDraw.Draw(image).rectangle(box, outline=(255, 255, 255), width=4)
        ImageDraw.Draw(image).rectangle(box, outline=INK, width=2)
    notice = f"{SYNTHETIC} {contract.notice}"
    sheet = _sheet(
        titles,
        [(whole, view.mpp[0] / factor), (detail, view.mpp[0] / zoom)],
        [
            notice,
            f"Model {contract.model_name} {contract.model_version[:12]}, sampler steps: {contract.steps}, gate: "
            f"{gate_text(contract.gate, stains)}",
        ],
    )
    sheet.save(path)


def round_length(longest: float) -> float:
    """The largest of 1, 2, 5 × 10ⁿ that is at most ``longest``."""
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(step * power for step in (1, 2, 5) if step * power <= longest * (1 + 1e-9)))


def _choose_detail(
    folder: Path, view: ModelView, overview: UInt8Array, stains: tuple[ServedStain, ...]
) -> tuple[int, int, int, int]:
    """x, y, width and height of the region with the most tissue and stained cells."""
    width, height = view.size
    side = min(DETAIL, -(-max(width, height) // 2))
    side_x, side_y = min(side, width), min(side, height)
    darkness = 255.0 - overview.min(axis=-1)
    weights: NDArray[np.float32] = np.asarray(
        Image.fromarray(darkness.astype(np.float32)).resize((64, 64), Image.Resampling.BOX)
    )
    weights = weights / max(1.0, float(weights.max()))
    for stain in stains:
        path = folder / cell_map_file(stain)
        if path.exists():
            with tifffile.TiffFile(path) as tiff:
                smallest = tiff.series[0].levels[-1].asarray().astype(np.float32)
            cells = np.asarray(Image.fromarray(smallest).resize((64, 64), Image.Resampling.BOX))
            # The root favours a mixture of positive and negative cells over a region that is all positive.
            weights = weights + np.sqrt(cells / 255)
    # Sums over every position of the detail.
    across, down = max(1, round(64 * side_x / width)), max(1, round(64 * side_y / height))
    total = np.pad(weights, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    sums = total[down:, across:] - total[:-down, across:] - total[down:, :-across] + total[:-down, :-across]
    row, column = np.unravel_index(int(sums.argmax()), sums.shape)
    return min(int(column) * width // 64, width - side_x), min(int(row) * height // 64, height - side_y), side_x, side_y


def _sheet(titles: list[str], rows: list[tuple[list[Image.Image], float]], footer: list[str]) -> Image.Image:
    """Lay out the panels under their titles; each row comes with its pixel size in µm, for the scale bar."""
    title_font, text_font = ImageFont.load_default(22), ImageFont.load_default(15)
    panel_width = max(image.width for images, _ in rows for image in images)
    width = GAP + len(titles) * (panel_width + GAP)
    lines = [line for text in footer for line in _wrapped(text, text_font, width - 2 * GAP)]
    height = 48 + sum(max(p.height for p in images) + GAP for images, _ in rows) + 22 * len(lines) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (panel_width + GAP), 12), _drawable(title), fill=INK, font=title_font)
    y = 48
    for images, mpp in rows:
        for column, image in enumerate(images):
            x = GAP + column * (panel_width + GAP)
            sheet.paste(image, (x, y))
            draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=(190, 190, 190))
        _scale_bar(draw, GAP, y, images[0].size, mpp)
        y += max(image.height for image in images) + GAP
    for line in lines:
        draw.text((GAP, y), line, fill=INK, font=text_font)
        y += 22
    return sheet


def _scale_bar(draw: ImageDraw.ImageDraw, x: int, y: int, size: tuple[int, int], mpp: float) -> None:
    font = ImageFont.load_default(16)
    length = round_length(size[0] * mpp / 4)
    pixels = round(length / mpp)
    label = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
    bottom, left = y + size[1] - 14, x + 14
    text_width = round(draw.textlength(label, font=font))
    draw.rectangle((left - 8, bottom - 32, left + max(pixels, text_width) + 8, bottom + 8), fill=PAPER)
    draw.rectangle((left, bottom - 5, left + pixels, bottom), fill=INK)
    draw.text((left, bottom - 28), label, fill=INK, font=font)


def _drawable(text: str) -> str:
    """Text in ASCII: Pillow's built-in font has few other characters."""
    for character, plain in {"µ": "u", "μ": "u", "–": "-", "—": "-", "×": "x", "’": "'"}.items():
        text = text.replace(character, plain)
    return text.encode("ascii", "replace").decode()


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    measure: Callable[[str], float] = font.getlength
    lines = [""]
    for word in _drawable(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if measure(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
