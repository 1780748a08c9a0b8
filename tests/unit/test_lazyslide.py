"""A running server as a virtual-stain model of LazySlide."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytest
import tifffile

from staindiffuser.client import LazySlideModel, StainClient
from staindiffuser.client.errors import UnknownStainError
from staindiffuser.client.testing import FakeStainer, FakeTriton

torch = pytest.importorskip("torch", reason="LazySlide's tensors are torch's, which is not installed")


@runtime_checkable
class VirtualStainModelProtocol(Protocol):
    """What LazySlide 0.13 asks of a virtual-stain model (lazyslide_models.base), with what its bases ask."""

    model: Any
    name: str
    stains: tuple[str, ...]
    output_mpp: float | None
    output_range: tuple[float, float] | None

    def get_transform(self) -> Any: ...
    def to(self, device: Any) -> Any: ...
    def try_compile(self, **compile_kws: Any) -> Any: ...
    def predict(self, image: Any) -> Any: ...


def test_it_is_what_lazyslide_asks_for() -> None:
    model: Any = LazySlideModel(FakeStainer())
    assert isinstance(model, VirtualStainModelProtocol)
    assert model.stains == ("CD3", "CK8/18")
    assert model.to("cpu") is model
    assert model.get_transform() is None
    assert model.tiling == {"tile_px": 256, "stride_px": 192, "mpp": 0.5}
    assert LazySlideModel(FakeStainer(), ["ck818"]).stains == ("CK8/18",)
    with pytest.raises(UnknownStainError):
        LazySlideModel(FakeStainer(), ["cd99"])


def test_batches_larger_than_what_suits_the_server_are_stained_in_order() -> None:
    def painted(tensor: str, tiles: Any, origins: Any) -> Any:
        return tiles if tensor == "STAIN_CD3" else 255 - tiles

    stainer = FakeStainer(painted)
    tiles = torch.randint(0, 256, (19, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stained = LazySlideModel(stainer).predict(tiles)
    assert stainer.batches == [4, 4, 4, 4, 3]
    assert (stained.dtype, tuple(stained.shape)) == (torch.float32, (19, 6, 256, 256))
    expected = tiles.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(stained[:, :3], expected)
    torch.testing.assert_close(stained[:, 3:], 1 - expected)


@pytest.mark.parametrize("shape", [(1, 224, 224, 3), (1, 3, 256, 256)])
def test_other_tiles_are_refused_with_what_to_do(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tile_tissues\(wsi, \*\*model.tiling\)"):
        LazySlideModel(FakeStainer()).predict(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.filterwarnings("default")  # LazySlide's and spatialdata's own
def test_lazyslide_stains_a_slide_by_a_server(tmp_path: Path) -> None:
    lazyslide = pytest.importorskip("lazyslide", reason="LazySlide is not installed: it asks for pandas below 3")
    y, x = np.mgrid[:1500, :1800]
    he = np.stack([190 + 30 * np.sin(x / 90), 110 + 30 * np.cos(y / 70), 170 + 0 * x], axis=-1).astype(np.uint8)
    he[:200], he[-200:], he[:, :200], he[:, -200:] = 244, 244, 244, 244
    with tifffile.TiffWriter(tmp_path / "he.tif") as tiff:
        for step in (1, 4):
            tiff.write(
                he[::step, ::step], photometric="rgb", tile=(256, 256), compression="adobe_deflate",
                resolution=(20000 / step, 20000 / step), resolutionunit="CENTIMETER", subfiletype=int(step > 1),
            )  # fmt: skip
    from wsidata import open_wsi

    wsi = open_wsi(tmp_path / "he.tif", store=str(tmp_path / "he.zarr"))
    lazyslide.pp.find_tissues(wsi)
    with FakeTriton() as server, StainClient(server.url) as client:
        model = LazySlideModel(client)
        lazyslide.pp.tile_tissues(wsi, **model.tiling)
        lazyslide.tl.virtual_stain(wsi, model, device="cpu", pbar=False)
        assert server.requests > 1
    assert set(wsi.images) >= {"staindiffuser_prediction_CD3", "staindiffuser_prediction_CK8_18"}
    stained = np.asarray(wsi.images["staindiffuser_prediction_CD3"])
    assert stained.shape == (3, 1500, 1800)
    inside = np.s_[:, 500:1000, 500:1300]
    np.testing.assert_allclose(stained[inside], he.transpose(2, 0, 1)[inside] / 255, atol=1e-5)
