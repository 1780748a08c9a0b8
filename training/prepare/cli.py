"""``staindiffuser prepare``: what paired tiles are made from."""

import typer

from staindiffuser.training.prepare.cli_import import EPILOG as IMPORT_EPILOG
from staindiffuser.training.prepare.cli_import import import_
from staindiffuser.training.prepare.cli_mif import EPILOG as MIF_EPILOG
from staindiffuser.training.prepare.cli_mif import mif
from staindiffuser.training.prepare.cli_pairs import EPILOG as PAIRS_EPILOG
from staindiffuser.training.prepare.cli_pairs import pairs

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def _group() -> None:
    """Slides and public data sets → paired tiles."""


app.command("import", epilog=IMPORT_EPILOG)(import_)
app.command(epilog=PAIRS_EPILOG)(pairs)
app.command(epilog=MIF_EPILOG)(mif)
