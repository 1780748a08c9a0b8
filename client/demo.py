"""``python -m staindiffuser.client.demo``: what ``make demo`` runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Stain a sample slide with the demonstration model, served for as long as that takes.

    Returns:
        DESIGN's exit code.
    """
    parser = argparse.ArgumentParser(prog="demo", description="Stain a slide with the demonstration model.")
    parser.add_argument("--slide", type=Path, help="instead of a public or simulated one")
    parser.add_argument("--mpp", type=float, help="µm per pixel, where the slide does not say")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)")
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
    from staindiffuser.client.command import Server, run_command
    from staindiffuser.client.options import StainingOptions
    from staindiffuser.client.output import ResultFolder
    from staindiffuser.client.progress import TerminalReporter
    from staindiffuser.client.result import PREVIEW_FILE
    from staindiffuser.client.sample import choose_slide
    from staindiffuser.errors import UsageError

    reporter = TerminalReporter()
    try:
        options = StainingOptions(mpp=mpp, preview=True, overwrite=True)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with ResultFolder(output, overwrite=True):  # refuses an output that cannot be written, before anything is made
        pass
    sample = choose_slide(slide, output, reporter.say)
    reporter.say(f"staining {sample.what}")
    code = run_command([sample.path], output, Server(), options)
    reporter.say(f"look at {output / PREVIEW_FILE}, then open {output} in QuPath or another slide viewer")
    return code


if __name__ == "__main__":
    sys.exit(main())
