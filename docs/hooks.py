"""Hook of mkdocs.yml: the reference of the command line, written by Typer from the commands themselves."""

from __future__ import annotations

import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "reference/command-line.md"
COMMAND = [sys.executable, "-m", "typer", "staindiffuser.cli", "utils", "docs", "--name", "staindiffuser"]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the page."""
    docs = subprocess.run(COMMAND, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    files.append(File.generated(config, PAGE, content=docs))
    return files
