"""`onestill keys`: make, list and revoke the keys that `onestill serve` asks for."""

from __future__ import annotations

from typing import Annotated

import typer

from onestill.cli.console import note, print_json, stdout_console
from onestill.cli.database import open_ledger
from onestill.cli.options import Database, Json, KeysFile, parse_daily
from onestill.errors import OnestillError

app = typer.Typer(help="Keys for those who may draw on your server.", no_args_is_help=True)


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is, for your own records.")],
    daily: Annotated[
        str | None, typer.Option("--limit", metavar="N/day", help="Pictures a day for this key. (default: any number)")
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires",
            metavar="30d|DATE",
            help="Refuse it after this span (h, d, w), or after this day in UTC, such as 2027-01-31. (default: never)",
        ),
    ] = None,
    database: Database = None,
    keys: KeysFile = None,
) -> None:
    """Make a key and print it, this once: only its hash is stored."""
    from onestill.serve.access.keys import hash_of, new_key, read_expiry, read_keys

    pictures, until = parse_daily(daily), read_expiry(expires)
    if not name.strip() or not name.isprintable() or len(name) > 200:
        raise OnestillError("The name must be 1 to 200 printable letters.")
    if keys is None:
        print(open_ledger(database).add_key(name.strip(), pictures, until)[1])
        return
    if pictures is not None:
        raise OnestillError("A file of keys has no counts; use --database for a key with a --limit.")
    if keys.exists():
        read_keys(keys)
    if name.strip().startswith("expires="):
        raise OnestillError("In a file of keys no name begins with 'expires='; give another.")
    key_id, key = new_key()
    expiry = f" expires={until}" if until else ""
    with keys.open("a", encoding="utf-8") as file:
        file.write(f"{key_id} {hash_of(key)}{expiry} {name.strip()}\n")
    keys.chmod(0o600)
    print(key)


@app.command("list")
def list_all(database: Database = None, as_json: Json = False) -> None:
    """List the keys of a database, with the pictures each drew today."""
    from onestill.serve.access.keys import has_passed

    rows = open_ledger(database).list_keys()
    if as_json:
        print_json({"keys": rows})
        return
    if not rows:
        note("there are no keys yet; make one with 'onestill keys new NAME'")
        return
    console = stdout_console()
    for row in rows:
        limit = "any number" if row["daily"] is None else f"{row['daily']} a day"
        state = f"revoked {row['revoked']}" if row["revoked"] else f"made {row['made']}"
        if row["expires"]:
            state += f", {'expired' if has_passed(row['expires']) else 'expires'} {row['expires']}"
        console.print(f"{row['id']}  {limit}, {row['today']} today, {state}  {row['name']}", markup=False)


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id as listed, or the key itself.")],
    database: Database = None,
) -> None:
    """Refuse a key from now on. Servers that run notice within seconds."""
    short = key_id.split("-")[1] if key_id.startswith("os-") and key_id.count("-") >= 2 else key_id
    if not open_ledger(database).revoke_key(short):
        raise OnestillError(f"There is no valid key '{short}'; see 'onestill keys list'.")
    print(short)
