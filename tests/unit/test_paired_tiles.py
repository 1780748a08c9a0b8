"""The paired-tiles contract: what is read, what is refused and with which words, what is written."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from staindiffuser.errors import UsageError
from staindiffuser.imaging.image_files import read_image
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.paired_tiles import PairedTiles
from staindiffuser.training.tiles.stain_names import is_stain_name, stain_label
from staindiffuser.training.tiles.writing import PairedTilesWriter

HEADER = ["he", "cd3", "cd3_mask", "slide", "split", "mpp"]
Rows = list[dict[str, str]]


def save(path: Path, shape: tuple[int, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, 200 if len(shape) == 3 else 255, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        save(tmp_path / f"he/{i}.png", (32, 48, 3))
        save(tmp_path / f"cd3/{i}.png", (32, 48, 3))
        save(tmp_path / f"m/{i}.png", (32, 48))
    write(tmp_path, rows())
    return tmp_path


def rows() -> Rows:
    splits = ["train", "val", "test"]
    values = [[f"he/{i}.png", f"cd3/{i}.png", f"m/{i}.png", f"slide {i}", splits[i], "0.5"] for i in range(3)]
    return [dict(zip(HEADER, row, strict=True)) for row in values]


def write(folder: Path, table: Rows, header: list[str] | None = None) -> None:
    with (folder / "tiles.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, header or list(table[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)


def test_load(folder: Path) -> None:
    tiles = PairedTiles.load(folder, check="pixels")
    assert tiles.stains == ("cd3",)
    assert [tile.row for tile in tiles.tiles] == [2, 3, 4]
    assert [tile.slide for tile in tiles.split("val")] == ["slide 1"]
    assert tiles.tiles[0].masks["cd3"] == folder / "m/0.png"
    assert tiles.tiles[0].mpp == 0.5
    assert tiles.tiles[0].size == (48, 32)


def test_a_tile_may_have_a_mask_without_an_image(folder: Path) -> None:
    table = rows()
    table[1]["cd3"] = ""
    write(folder, table)
    tiles = PairedTiles.load(folder, check="pixels")
    assert tiles.tiles[1].stains["cd3"] is None
    assert tiles.tiles[1].masks["cd3"] == folder / "m/1.png"
    assert len(tiles.split("val")) == 1
    assert tiles.scored("val") == ()
    assert tiles.scored("train") == tiles.split("train")
    with pytest.raises(DataError, match="row 3: cd3 is empty"):
        tiles.tiles[1].image("cd3")


def test_masks_may_be_empty_or_absent(folder: Path) -> None:
    table = rows()
    table[1]["cd3_mask"] = ""
    write(folder, table)
    assert PairedTiles.load(folder).tiles[1].masks["cd3"] is None
    write(folder, table, [name for name in HEADER if name != "cd3_mask"])
    assert all(tile.masks["cd3"] is None for tile in PairedTiles.load(folder).tiles)


def changed(row: int, **fields: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        table = rows()
        table[row] |= fields
        write(folder, table)

    return change


def without(column: str) -> Callable[[Path], None]:
    return lambda folder: write(folder, rows(), [name for name in HEADER if name != column])


def renamed(column: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "tiles.csv").read_text()
        (folder / "tiles.csv").write_text(text.replace(column, name, 1))

    return change


def text(content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "tiles.csv").write_text(content)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("he"), ["row 1", "'he'", "missing"]),
        (without("mpp"), ["row 1", "'mpp'", "missing"]),
        (without("cd3"), ["row 1", "cd3_mask", "mask without a stain"]),
        (renamed(",cd3,cd3_mask", ",CD3,CD3_mask"), ["row 1", "'CD3'", "[a-z]"]),
        (renamed("cd3_mask", "cd3"), ["row 1", "'cd3'", "twice"]),
        (changed(0, he="he/9.png"), ["row 2", "he", "does not exist"]),
        (changed(1, cd3="", cd3_mask=""), ["row 3", "no image and no mask of any stain"]),
        (changed(1, cd3="/etc/passwd"), ["row 3", "cd3", "relative"]),
        (changed(1, cd3="../x.png"), ["row 3", "cd3", "stay in"]),
        (changed(2, split="dev"), ["row 4", "split", "'dev'", "train, val, test"]),
        (changed(2, slide=" "), ["row 4", "slide"]),
        (changed(2, slide="slide 1"), ["row 4", "'slide 1'", "'test'", "'val'", "row 3"]),
        *((changed(0, mpp=value), ["row 2", "mpp", "positive"]) for value in ("", "x", "0", "-0.5", "nan", "inf")),
        (text(""), ["empty"]),
        (text(",".join(HEADER) + "\n"), ["no rows"]),
        (text("he,slide,split,mpp\n"), ["row 1", "no stain column"]),
        (text(",".join(HEADER) + "\na,b\n"), ["row 2", "2 fields"]),
    ],
)
def test_what_is_refused(folder: Path, change: Callable[[Path], None], words: list[str]) -> None:
    change(folder)
    with pytest.raises(DataError) as caught:
        PairedTiles.load(folder)
    message = str(caught.value)
    assert "tiles.csv" in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_pixel_sizes_that_disagree(folder: Path) -> None:
    assert PairedTiles.load(folder, mpp=0.505).tiles[0].mpp == 0.5
    with pytest.raises(DataError, match=r"tiles\.csv, row 2: mpp is 0\.5, but 0\.25 is needed"):
        PairedTiles.load(folder, mpp=0.25)
    changed(2, mpp="0.25")(folder)
    with pytest.raises(DataError, match=r"tiles\.csv, row 4: mpp is 0\.25 here and 0\.5 in row 2"):
        PairedTiles.load(folder)


def test_more_than_eight_bits(folder: Path) -> None:
    Image.fromarray(np.zeros((32, 48), np.uint16)).save(folder / "m/1.png")
    with pytest.raises(DataError, match=r"row 3: cd3_mask.*8 bits"):
        PairedTiles.load(folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        PairedTiles.load(tmp_path / "nowhere")


def test_not_text(folder: Path) -> None:
    (folder / "tiles.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        PairedTiles.load(folder)


@pytest.mark.parametrize(("column", "shape"), [("cd3", (32, 32, 3)), ("m", (48, 32))])
def test_different_sizes(folder: Path, column: str, shape: tuple[int, ...]) -> None:
    save(folder / column / "1.png", shape)
    with pytest.raises(DataError, match=r"row 3.*48 x 32"):
        PairedTiles.load(folder)


def test_unreadable_and_truncated(folder: Path) -> None:
    whole = (folder / "cd3/2.png").read_bytes()
    (folder / "cd3/2.png").write_bytes(whole[: len(whole) // 2])
    PairedTiles.load(folder)
    with pytest.raises(DataError, match=r"row 4.*cd3.*cannot be read"):
        PairedTiles.load(folder, check="pixels")
    (folder / "cd3/2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"row 4.*cd3.*cannot be read"):
        PairedTiles.load(folder)


def test_write_and_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    he, cd3 = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    with PairedTilesWriter(tmp_path / "t", ["cd3"]) as writer:
        writer.add("a", he=he, stains={"cd3": cd3}, masks={"cd3": cd3[..., 0]}, slide="s", split="train", mpp=0.5)
        assert not (tmp_path / "t/tiles.csv").exists(), "nothing incomplete stands under the final name"
    tiles = PairedTiles.load(tmp_path / "t")
    np.testing.assert_array_equal(read_image(tiles.tiles[0].image("cd3")), cd3)
    mask = tiles.tiles[0].masks["cd3"]
    assert mask is not None
    np.testing.assert_array_equal(read_image(mask, mode="L"), cd3[..., 0])
    assert not list((tmp_path / "t").rglob("*tmp*"))


def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    he = np.zeros((16, 16, 3), np.uint8)

    def add(writer: PairedTilesWriter, name: str) -> None:
        writer.add(name, he=he, stains={"cd3": he}, slide="s", split="train", mpp=0.5)

    def interrupted() -> None:
        with PairedTilesWriter(tmp_path, ["cd3"], masks=False) as writer:
            add(writer, "a")
            add(writer, "b")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert not (tmp_path / "tiles.csv").exists()
    (tmp_path / "cd3/b.png").unlink()
    with PairedTilesWriter(tmp_path, ["cd3"], masks=False, resume=True) as writer:
        assert writer.has("a")
        assert not writer.has("b")
        add(writer, "b")
    assert [tile.he.stem for tile in PairedTiles.load(tmp_path).tiles] == ["a", "b"]


def one_row(folder: Path) -> Path:
    he = np.zeros((16, 16, 3), np.uint8)
    with PairedTilesWriter(folder, ["cd3"], masks=False) as writer:
        writer.add("a", he=he, stains={"cd3": he}, slide="s", split="train", mpp=0.5)
    return folder / "tiles.csv"


def test_rows_that_a_spreadsheet_has_saved_are_kept(tmp_path: Path) -> None:
    path = one_row(tmp_path)
    path.write_text(path.read_text().replace("train", "val"), encoding="utf-8-sig", newline="\r\n")
    with PairedTilesWriter(tmp_path, ["cd3"], masks=False, resume=True) as writer:
        assert writer.has("a")
    assert PairedTiles.load(tmp_path).tiles[0].split == "val"


@pytest.mark.parametrize("content", ["cd3,he,slide,split,mpp\ncd3/a.png,he/a.png,s,train,0.5\n", b"\xff\xfe\n\n"])
def test_rows_that_cannot_be_kept_are_not_lost(tmp_path: Path, content: str | bytes) -> None:
    path = one_row(tmp_path)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"tiles\.csv"):
        PairedTilesWriter(tmp_path, ["cd3"], masks=False, resume=True)
    assert path.read_bytes() == before
    path.unlink()
    PairedTilesWriter(tmp_path, ["cd3"], masks=False).close()  # who was refused keeps nobody out


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with PairedTilesWriter(tmp_path, ["cd3"], resume=True), pytest.raises(UsageError, match="another run"):
        PairedTilesWriter(tmp_path, ["cd3"], resume=True)
    PairedTilesWriter(tmp_path, ["cd3"], resume=True).close()


def test_writer_refuses(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="CD3"):
        PairedTilesWriter(tmp_path, ["CD3"])
    with pytest.raises(UsageError, match="once"):
        PairedTilesWriter(tmp_path, ["cd3", "cd3"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        PairedTilesWriter(tmp_path / "file" / "t", ["cd3"])


def test_labels() -> None:
    assert stain_label("ck818") == "CK8/18"
    assert stain_label("cd3") == "CD3"
    assert stain_label("abc_1") == "ABC 1"
    assert is_stain_name("cd3")
    assert not any(is_stain_name(name) for name in ("CD3", "3cd", "", "cd-3", "cd3_mask", "slide", "mpp"))


def textured(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def test_rows_with_the_same_path_are_refused(folder: Path) -> None:
    table = [*rows(), rows()[0]]
    write(folder, table)
    with pytest.raises(DataError, match=r"row 5: he is .*0\.png, as in row 2: delete one of the rows"):
        PairedTiles.load(folder)


def test_a_copy_in_another_split_is_refused_whatever_its_name(folder: Path) -> None:
    for number in range(3):
        textured(number).save(folder / f"he/{number}.png")
    PairedTiles.load(folder, check="pixels")
    textured(0).save(folder / "he/2.png")
    for check in ("headers", "pixels"):
        with pytest.raises(
            DataError, match=r"row 4: .*2\.png \(slide 'slide 2', split 'test'\) is the same image as .*row 2: .*0\.png"
        ):
            PairedTiles.load(folder, check=check)
    textured(0).save(folder / "he/2.png", compress_level=0)
    PairedTiles.load(folder)
    with pytest.raises(DataError, match="same image"):
        PairedTiles.load(folder, check="pixels")
    table = rows()
    table[2]["split"] = "train"
    write(folder, table)
    PairedTiles.load(folder, check="pixels")  # within one split a copy leaks nothing


def test_tiles_of_bare_glass_may_be_equal(folder: Path) -> None:
    assert len({(folder / f"he/{number}.png").read_bytes() for number in range(3)}) == 1
    assert len(PairedTiles.load(folder, check="pixels").tiles) == 3


def with_patients(folder: Path, patients: list[str]) -> None:
    write(folder, [row | {"patient": patient} for row, patient in zip(rows(), patients, strict=True)])


def test_a_patient_is_in_one_split(folder: Path) -> None:
    with_patients(folder, ["a", "b", ""])
    assert [tile.patient for tile in PairedTiles.load(folder).tiles] == ["a", "b", None]
    with_patients(folder, ["a", "b", "a"])
    with pytest.raises(DataError, match=r"row 4: patient 'a' is in split 'test' here and in 'train' in row 2"):
        PairedTiles.load(folder)


def test_a_slide_is_of_one_patient(folder: Path) -> None:
    write(folder, [row | {"patient": str(number), "slide": "s", "split": "train"} for number, row in enumerate(rows())])
    with pytest.raises(DataError, match=r"row 3: slide 's' is of patient '1' here and of '0' in row 2"):
        PairedTiles.load(folder)
