"""JPEG tiles: decoded once, with the pixels of the reference decoder, or refused."""

from typing import Any

import imagecodecs
import numpy as np
import pytest

from staindiffuser.imaging.slides.codestreams import DamagedCodestreamError, decode_intact_jpeg


def tissue() -> np.ndarray:
    y, x = np.mgrid[:95, :131]
    waves = [150 + 60 * np.sin(x / 7), 110 + 50 * np.cos(y / 5), 160 + 40 * np.sin((x + y) / 9)]
    grain = np.random.default_rng(0).normal(0, 6, (95, 131, 3))
    return np.clip(np.stack(waves, axis=-1) + grain, 0, 255).astype(np.uint8)


def jpeg(colours: str, subsampling: str = "444") -> bytes:
    options: dict[str, Any] = {"colorspace": "RGB", "outcolorspace": colours, "subsampling": subsampling}
    return bytes(imagecodecs.jpeg8_encode(tissue(), level=85, **options))


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_pixels_are_those_of_the_reference_decoder(subsampling: str) -> None:
    data = jpeg("YCBCR", subsampling)
    np.testing.assert_array_equal(decode_intact_jpeg(data), imagecodecs.jpeg8_decode(data, outcolorspace="RGB"))


def unmarked(data: bytes) -> bytes:
    """Without JFIF's segment, as Aperio's tiles: nothing says what the components are."""
    assert data[2:4] == b"\xff\xe0"
    return data[:2] + data[20:]


def test_rgb_that_nothing_marks_is_not_converted() -> None:
    """libjpeg would take components 1, 2, 3 for YCbCr; a YCbCr stream stands for one of those."""
    data = unmarked(jpeg("YCBCR"))
    raw = imagecodecs.jpeg8_decode(data, colorspace="RGB", outcolorspace="RGB")
    np.testing.assert_array_equal(decode_intact_jpeg(data, rgb=True), raw)
    assert np.abs(raw.astype(int) - tissue()).mean() > 20, "the components themselves, not colours"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_damage_is_found_while_decoding(share: float) -> None:
    data = jpeg("YCBCR")
    at = int(len(data) * share)
    for damaged in (data[:at], data[:at] + bytes(len(data) - at), data[:at] + b"\xff\xd9"):
        with pytest.raises(DamagedCodestreamError):
            decode_intact_jpeg(damaged)


def test_other_colours_are_refused() -> None:
    grey = bytes(imagecodecs.jpeg8_encode(tissue()[..., 0].copy()))
    with pytest.raises(DamagedCodestreamError, match="Gray"):
        decode_intact_jpeg(grey)
