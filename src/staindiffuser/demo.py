"""``python -m staindiffuser.demo``, which ``make demo`` runs: stain a sample slide with the demonstration model.

On a terminal it ends by showing the result in a browser, until Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Stain a sample slide with the demonstration model, which is served meanwhile.

    Returns:
        The exit code, as documented in :mod:`staindiffuser.errors`.
    """
    parser = argparse.ArgumentParser(prog="demo", description="Stain a slide with the demonstration model.")
    parser.add_argument("--slide", type=Path, help="slide to stain, instead of a public or simulated one")
    parser.add_argument("--mpp", type=float, help="pixel size in µm, if the slide has none")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="result folder (default: %(default)s)")
    chosen = parser.parse_args(arguments)

    from staindiffuser.errors import EXIT_INTERRUPTED, StainDiffuserError

    try:
        return _demonstrate(chosen.slide, chosen.mpp, chosen.output)
    except StainDiffuserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return EXIT_INTERRUPTED


def _demonstrate(slide: Path | None, mpp: float | None, output: Path) -> int:
    from staindiffuser.client.command import run_command
    from staindiffuser.client.options import StainingOptions
    from staindiffuser.client.progress import TerminalReporter
    from staindiffuser.client.result_files import PREVIEW_FILE
    from staindiffuser.client.result_folder import ResultFolder
    from staindiffuser.client.target import Target
    from staindiffuser.errors import UsageError
    from staindiffuser.sample_slide import choose_slide

    reporter = TerminalReporter()
    try:
        options = StainingOptions(mpp=mpp, preview=True, overwrite=True)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with ResultFolder(output, overwrite=True):  # refuse an unwritable output before a slide is downloaded or simulated
        pass
    sample = choose_slide(slide, output, reporter.say)
    reporter.say(f"staining {sample.what}")
    code = run_command([sample.path], output, Target(), options)
    if code == 0 and sys.stdout.isatty() and sys.stderr.isatty() and not os.environ.get("CI"):
        return _show(output, sample.path)
    reporter.say(f"look at {output / PREVIEW_FILE}, then: staindiffuser view {output}")
    return code


def _show(output: Path, slide: Path) -> int:
    """Show the result in a browser until Ctrl-C."""
    from staindiffuser.errors import DependencyError
    from staindiffuser.viewer.server import require_openseadragon, view_results

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    try:
        require_openseadragon()
    except DependencyError as error:
        say(str(error))
        return 0
    view_results([output], slides=(slide,), host="127.0.0.1", port=None, token=None, say=say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
