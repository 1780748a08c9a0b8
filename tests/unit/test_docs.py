"""Documentation that is not built: links of the files at the top, and commands that must exist as they are written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from staindiffuser import __version__
from staindiffuser.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_files_that_the_readme_names_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:client|training|triton_models|export|checkpoints)/[^`]*)`", readme)
    assert len(named) > 5
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_citation_is_of_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `staindiffuser …` of the documentation, in a block or inline, split into words."""
    for page in PAGES:
        text = re.sub(r"\s*\\\n\s*", " ", page.read_text(encoding="utf-8"))
        inline = re.findall(r"`(staindiffuser [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        blocks = re.findall(r"^(?:torchrun .*--no-python )?(staindiffuser .*)$", text, re.MULTILINE)
        for command in [*inline, *blocks]:
            yield page.name, shlex.split(" ".join(command.split()), comments=True)


def test_commands_in_the_documentation_exist() -> None:
    unknown = []
    staindiffuser = typer.main.get_command(app)
    for page, words in commands():
        command = staindiffuser
        for word in words[1:]:
            children = getattr(command, "commands", {})
            if word in children:
                command = children[word]
                continue
            options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            wrong_option = word.startswith("-") and word not in options | {"--help"}
            wrong_verb = children and not word.startswith("-") and not getattr(command, "invoke_without_command", False)
            if wrong_option or wrong_verb:
                unknown.append(f"{page}: {' '.join(words)}: {word}")
    assert unknown == []
