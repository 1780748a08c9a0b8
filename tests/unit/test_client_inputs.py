"""Files, folders, patterns and lists become slides with a result folder each."""

from pathlib import Path

import pytest

from staindiffuser.client.inputs import SlideInput, default_output, find_inputs
from staindiffuser.errors import InputError, UsageError


def test_default_folders() -> None:
    assert default_output(Path("/data/CMU-1.svs")) == Path("CMU-1-stained")
    assert default_output(Path("a.b.ome.tif")) == Path("a.b-stained")
    assert default_output(Path("noext")) == Path("noext-stained")


def test_files() -> None:
    one, two = Path("x/a.svs"), Path("y/b.png")
    assert find_inputs([one], Path("o")) == [SlideInput(path=one, output=Path("o"), named=True)]
    assert [slide.output for slide in find_inputs([one, two], Path("o"))] == [Path("o/a-stained"), Path("o/b-stained")]
    assert find_inputs([one, two], None)[1].output == Path("b-stained")
    assert find_inputs([one, two, one], None) == find_inputs([one, two], None), "a slide that is named twice is one"
    with pytest.raises(UsageError, match=r"a\.svs and .*a\.tif would share the result folder a-stained"):
        find_inputs([one, Path("y/a.tif")], None)


def test_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.svs", "a.ndpi", "notes.txt", ".hidden.svs", "c.ome.TIFF"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "d.svs").mkdir()
    found = find_inputs([tmp_path], Path("out"))
    assert [slide.path.name for slide in found] == ["a.ndpi", "b.svs", "c.ome.TIFF"]
    assert [slide.output for slide in found] == [Path(f"out/{name}-stained") for name in "abc"]
    assert [slide.path.name for slide in find_inputs([tmp_path / "*.[sn]*"], None)] == ["a.ndpi", "b.svs", "d.svs"]
    with pytest.raises(InputError, match="no file matches"):
        find_inputs([tmp_path / "*.scn"], None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no slides"):
        find_inputs([tmp_path / "empty"], None)
    one = find_inputs([tmp_path / "a*.ndpi"], Path("out"))
    assert one[0].output == Path("out/a-stained"), "a pattern's result has a folder of its own, however many match"


def test_lists(tmp_path: Path) -> None:
    path = tmp_path / "night.csv"
    path.write_text("\ufeffSlide, mpp ,output\na.svs,0.25,first\nsub/b.tif,,\n/abs/c.png, 0.5,\n", encoding="utf-8")
    assert find_inputs([path], Path("out")) == [
        SlideInput(path=tmp_path / "a.svs", output=Path("out/first"), named=True, mpp=0.25),
        SlideInput(path=tmp_path / "sub/b.tif", output=Path("out/b-stained")),
        SlideInput(path=Path("/abs/c.png"), output=Path("out/c-stained"), mpp=0.5),
    ]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("name\na.svs\n", UsageError, "must have the column slide"),
        ("slide,colour\na.svs,red\n", UsageError, "colour"),
        ("slide,mpp\na.svs,0.5\nb.svs,half\n", UsageError, "line 3: mpp is not a number: 'half'"),
        ("slide,mpp\na.svs,0\n", UsageError, r"line 2: mpp must be from 0\.01"),
        ("slide,mpp\n,0.5\n", UsageError, "line 2: slide is empty"),
        ("slide\n", InputError, "lists no slides"),
        ("", UsageError, "must have the column slide"),
        ("slide,output\na.svs,same\nb.svs,same\n", UsageError, "would share the result folder same"),
    ],
)
def test_malformed_lists_name_the_line(tmp_path: Path, text: str, error: type[Exception], words: str) -> None:
    path = tmp_path / "night.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(error, match=words):
        find_inputs([path], None)
