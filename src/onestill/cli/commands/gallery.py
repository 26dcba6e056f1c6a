"""`onestill gallery`: what visitors show on `onestill serve --gallery`, for the one who answers for it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from onestill.cli.console import note, print_json, stdout_console
from onestill.cli.database import open_ledger
from onestill.cli.options import Database, Json
from onestill.errors import OnestillError

if TYPE_CHECKING:
    from onestill.serve.gallery.store import Gallery

app = typer.Typer(help="Pictures that visitors of your server show.", no_args_is_help=True)
MOST = 1000


@app.command("list")
def list_all(database: Database = None, as_json: Json = False) -> None:
    """List the newest pictures."""
    entries = shown(database).page(MOST)
    if as_json:
        names = ("id", "prompt", "seed", "num_inference_steps", "width", "height")
        print_json({"pictures": [{name: getattr(entry, name) for name in names} for entry in entries]})
        return
    if not entries:
        note("nothing is shown")
    for entry in entries:
        day = datetime.fromtimestamp(entry.made_ms / 1000, UTC).date()
        prompt = "(prompt not stored)" if entry.prompt is None else entry.prompt.replace("\n", " ")
        stdout_console().print(f"{entry.id}  {day}  {prompt}", markup=False, highlight=False, soft_wrap=True)


@app.command("remove")
def remove(
    picture_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The ids of the pictures, as listed.")],
    database: Database = None,
) -> None:
    """Delete pictures for good."""
    gallery = shown(database)
    missing = [name for name in picture_ids if not gallery.remove(name)]
    if missing:
        raise OnestillError(f"There is no picture '{missing[0]}'; see 'onestill gallery list'.")


def shown(database: str | None) -> Gallery:
    """The gallery in a database."""
    ledger = open_ledger(database)  # first: it names the extra that is missing
    from onestill.serve.gallery.store import Gallery

    return Gallery(ledger)
