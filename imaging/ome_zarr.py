"""OME-Zarr out (NGFF 0.5, Zarr 3): the levels of a finished OME-TIFF as a folder of sharded arrays.

The pixels are those of the OME-TIFF as it decodes, stored without further loss. Chunks of mere glass are not stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tifffile
import zarr
from zarr.codecs import BloscCodec

from staindiffuser.imaging.ome_tiff import SIDE, read_region
from staindiffuser.imaging.ome_xml import Channel, ImageInfo

__all__ = ["write_ome_zarr"]

SHARD = 8 * SIDE
"""Side of a file, pixels: a slide becomes hundreds of files and not a hundred thousand."""
_RGB = (Channel("red", "#ff0000"), Channel("green", "#00ff00"), Channel("blue", "#0000ff"))


def write_ome_zarr(image: Path, folder: Path, info: ImageInfo, *, glass: int) -> None:
    """Convert an image, a shard at a time.

    Args:
        image: OME-TIFF that :mod:`staindiffuser.imaging.ome_tiff` wrote.
        folder: to make; must not exist.
        info: what the image says of itself.
        glass: value of glass.
    """
    with tifffile.TiffFile(image) as tiff:
        root = zarr.open_group(folder, mode="w-", zarr_format=3)
        levels = tiff.series[0].levels
        sizes = [(level.keyframe.imagewidth, level.keyframe.imagelength) for level in levels]
        samples = levels[0].keyframe.samplesperpixel * len(levels[0].pages)
        root.attrs.update(_metadata(info, sizes, samples))
        for level, (width, height) in enumerate(sizes):
            array: Any = root.create_array(
                str(level),
                shape=(samples, height, width),
                dtype="uint8",
                chunks=(samples, SIDE, SIDE),
                shards=(samples, SHARD, SHARD),
                compressors=BloscCodec(cname="zstd", clevel=3, shuffle="noshuffle"),
                fill_value=glass,
                dimension_names=("c", "y", "x"),
            )
            for y in range(0, height, SHARD):
                for x in range(0, width, SHARD):
                    part = min(SHARD, width - x), min(SHARD, height - y)
                    pixels = read_region(tiff, x, y, *part, level=level)
                    array[:, y : y + part[1], x : x + part[0]] = pixels.transpose(2, 0, 1)


def _metadata(info: ImageInfo, sizes: list[tuple[int, int]], samples: int) -> dict[str, Any]:
    space = {"type": "space", "unit": "micrometer"}
    datasets = []
    for level, (width, height) in enumerate(sizes):
        scale = [1.0, info.mpp[1] * sizes[0][1] / height, info.mpp[0] * sizes[0][0] / width]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    channels = _RGB if samples == 3 and len(info.channels) == 1 else info.channels
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    multiscale = {
        "name": info.name,
        "axes": [{"name": "c", "type": "channel"}, {"name": "y", **space}, {"name": "x", **space}],
        "datasets": datasets,
        "type": "mean of 2 × 2 pixels",
    }
    omero = {
        "channels": [
            {
                "label": channel.name,
                "color": (channel.colour or "#ffffff").removeprefix("#").upper(),
                "window": window,
                "active": True,
            }
            for channel in channels
        ],
        "rdefs": {"model": "color"},
    }
    about = {"description": info.description, "creator": info.creator, **info.about}
    return {"ome": {"version": "0.5", "multiscales": [multiscale], "omero": omero}, "staindiffuser": about}
