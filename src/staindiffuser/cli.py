"""The ``staindiffuser`` command, composed from each package's ``cli.py``.

Those modules import nothing heavy when they load, so ``--help`` answers at once and without torch; what a verb needs is
imported when it runs. This is also the one place where an expected failure becomes one line and an exit code.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from staindiffuser import __version__
from staindiffuser.benchmarks.cli import app as bench_app
from staindiffuser.client.cli import check, info, send, stain
from staindiffuser.errors import EXIT_INTERRUPTED, DependencyError, StainDiffuserError, UsageError
from staindiffuser.export.cli import app as export_app
from staindiffuser.serving.cli import doctor, promote, proxy, rollback, serve
from staindiffuser.settings import default_file, in_force, read_settings
from staindiffuser.training.check.cli import app as data_app
from staindiffuser.training.cli import app as train_app
from staindiffuser.training.distill.cli import distill
from staindiffuser.training.evaluation.cli import evaluate
from staindiffuser.training.prepare.cli import app as prepare_app
from staindiffuser.training.simulate.cli import app as simulate_app
from staindiffuser.viewer.cli import qupath, report, view

__all__ = ["app", "main"]

_EXTRAS = {
    "torch": "train",
    "safetensors": "train",
    "mlflow": "mlflow",
    "wandb": "wandb",
    "SimpleITK": "train",
    "pytriton": "serve",
    "onnx": "export",
    "onnxruntime": "export",
    "openvino": "openvino",
    "starlette": "view",
    "uvicorn": "view",
    "pyarrow": "parquet",
    "ray": "ray",
}
"""Which extra brings an optional package; all others come with ``client``."""

app = typer.Typer(
    name="staindiffuser",
    help="Virtual immunohistochemistry from H&E. Research use only.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "STAINDIFFUSER"},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"staindiffuser {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, allow_from_autoenv=False, help="Show it."
    ),
    config: Path | None = typer.Option(
        None, metavar="FILE", help="TOML with settings. (default: config.toml in the user's configuration folder)"
    ),
) -> None:
    context.obj = config or default_file()
    if config is not None or context.obj.is_file():
        context.default_map = read_settings(context.obj, context.command)


@app.command("config", rich_help_panel="Use")
def _config(
    context: typer.Context,
    command: Annotated[
        str | None, typer.Argument(help="Show all options of this command, such as stain or bench.slide.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per setting.")] = False,
) -> None:
    """Show which settings are in force, and whether each comes from the environment or from the settings file.

    Example: staindiffuser config stain
    """
    root = context.find_root()
    known = list(in_force(root, root.command))
    if command is not None and command not in {of for of, *_ in known}:
        raise UsageError(f"{command}: no such command; there are {', '.join(sorted({of for of, *_ in known}))}")
    if not as_json:
        typer.echo(f"# {root.obj}{'' if root.obj.is_file() else ' (there is no such file)'}")
    for of, option, value, source in known:
        if of == command or (command is None and source != "default"):
            shown = json.dumps(value, default=str, ensure_ascii=False)
            line = {"command": of, "option": option, "value": value, "from": source}
            typer.echo(
                json.dumps(line, default=str, ensure_ascii=False) if as_json else f"{of}.{option} = {shown}  # {source}"
            )


app.command(rich_help_panel="Use")(stain)
app.command(rich_help_panel="Use")(view)
app.command(rich_help_panel="Use")(report)
app.command(rich_help_panel="Use")(qupath)
app.command(rich_help_panel="Use")(info)
app.command(rich_help_panel="Use")(check)
app.command(rich_help_panel="Use")(send)
app.command(rich_help_panel="Use")(serve)
app.command(rich_help_panel="Use")(proxy)
app.command(rich_help_panel="Use")(promote)
app.command(rich_help_panel="Use")(rollback)
app.command(rich_help_panel="Use")(doctor)
app.add_typer(bench_app, name="bench", help="Measure speed.", rich_help_panel="Use")
app.add_typer(prepare_app, name="prepare", help="Slides and public data sets → paired tiles.", rich_help_panel="Make")
app.add_typer(data_app, name="data", help="Check paired tiles.", rich_help_panel="Make")
app.add_typer(simulate_app, name="simulate", help="Make simulated tissue.", rich_help_panel="Make")
app.add_typer(train_app, name="train", rich_help_panel="Make")
app.command(rich_help_panel="Make")(distill)
app.command(rich_help_panel="Make")(evaluate)
app.add_typer(export_app, name="export", help="Checkpoint → graphs → engines.", rich_help_panel="Make")


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def main() -> None:
    """Run the command line; exits with the code that the README documents."""
    if sys.getfilesystemencoding() != "utf-8" and not all(map(_is_text, sys.argv)):
        # A batch job's locale (LC_ALL=C) cannot read what a terminal wrote: take the command as UTF-8, from the beginning.
        os.execv(sys.executable, [os.fsencode(a) for a in (sys.executable, "-X", "utf8", *sys.orig_argv[1:])])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale that lacks σ or µ is no reason to lose a result
            stream.reconfigure(errors="replace")
    try:
        app()
    except StainDiffuserError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name in ("", "staindiffuser"):
            raise
        extra = _EXTRAS.get(name, "client")
        _fail(f"{name} is not installed: pip install 'staindiffuser[{extra}]'", DependencyError.exit_code)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(code)
