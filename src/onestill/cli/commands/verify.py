"""`onestill verify`: what a picture was drawn from, and who vouches for it."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Annotated, Any

import typer

from onestill.cli.console import note, print_json
from onestill.cli.options import Json


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The picture, a PNG, JPEG or WebP file.")],
    as_json: Json = False,
) -> None:
    """Print what a picture was drawn from, and whether its C2PA signature is valid.

    Exits with 1 if the picture has a C2PA manifest that is not valid, else with 0.
    """
    from onestill.serve.provenance import read_provenance

    found = read_provenance(file)
    if as_json:
        print_json(found)
    else:
        show(found)
    if (found.get("manifest") or {}).get("state") == "Invalid":
        raise typer.Exit(1)


def show(found: dict[str, Any]) -> None:
    """Print it for people."""
    print(f"{found['file']}: {found['format']}, {found['width']}x{found['height']}")
    print(found["parameters"] or "It carries no parameters.")
    manifest = found.get("manifest")
    if "manifest" not in found:
        if util.find_spec("c2pa") is None:
            note("to check its signature: pip install 'onestill[c2pa]'")
    elif manifest is None:
        print("It is not signed.")
    elif manifest["state"] == "Invalid":
        broken = [problem for problem in manifest["problems"] if problem != "signingCredential.untrusted"]
        print(f"Its signature does not hold: {', '.join(broken)}.")
    else:
        known = "" if manifest["state"] == "Trusted" else ", which is on no list of trusted ones here"
        print(f"Signed by {manifest['signer']} of {manifest['authority']}{known}; made with {manifest['generator']}.")
