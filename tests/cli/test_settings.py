"""Settings: the command line wins over the environment, which wins over the file; what is wrong is named."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from staindiffuser.cli import app
from staindiffuser.errors import UsageError


def in_force(*arguments: str) -> dict[str, tuple[object, str]]:
    """What `config` says: per setting its value and where it is from."""
    result = CliRunner().invoke(app, [*arguments, "config", "stain", "--json"], catch_exceptions=False)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {line["option"]: (line["value"], line["from"]) for line in lines}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(
        '[stain]\nserver = ["a:1", "b:2"]\nparquet = true\nbatch = 2\ntls-ca = "ca.pem"\n[bench.slide]\nside = 512\n',
        encoding="utf-8",
    )
    return path


def test_the_file_wins_over_defaults_and_loses_to_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAINDIFFUSER_STAIN_BATCH", "7")
    found = in_force("--config", str(file))
    assert found["server"] == (["a:1", "b:2"], "file")
    assert found["parquet"] == (True, "file")
    assert found["tls-ca"] == ("ca.pem", "file")
    assert found["batch"] == (7, "STAINDIFFUSER_STAIN_BATCH")
    assert found["seed"] == (0, "default")


def test_the_command_line_wins(file: Path, tmp_path: Path) -> None:
    file.write_text('[stain]\nicc = "nonsense"\n', encoding="utf-8")
    with pytest.raises(UsageError, match="icc must be"):
        CliRunner().invoke(app, ["--config", str(file), "stain", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(Exception, match="no slide"):
        CliRunner().invoke(
            app, ["--config", str(file), "stain", str(tmp_path), "--icc", "srgb"], catch_exceptions=False
        )


def test_the_file_may_be_named_by_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAINDIFFUSER_CONFIG", str(file))
    assert in_force()["batch"] == (2, "file")


def test_the_users_own_file_is_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAINDIFFUSER_CONFIG")
    monkeypatch.setattr("staindiffuser.cli.default_file", lambda: file)
    assert in_force()["batch"] == (2, "file")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[stian]\n", "stian: no such command"),
        ("stain = 3\n", "stain: must be a table"),
        ("[stain]\nbatsch = 3\n", "stain.batsch: no such option of `staindiffuser stain`"),
        ('[stain]\nbatch = "many"\n', "stain.batch: Input should be a valid integer"),
        ('[stain]\nparquet = "yes"\n', "stain.parquet: must be true or false, not 'yes'"),
        ('[stain]\nserver = "a:1"\n', "stain.server: must be a list"),
        ("[stain]\nbatch = [1]\n", "stain.batch: must not be a list"),
        ("[stain]\nbatch = true\n", "stain.batch: True is not a value"),
        ("[bench.slide]\nsides = 3\n", "bench.slide.sides: no such option of `staindiffuser bench slide`"),
        ("[stain\n", "are not TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=problem) as error:
        in_force("--config", str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.toml cannot be read"):
        in_force("--config", str(tmp_path / "no.toml"))
