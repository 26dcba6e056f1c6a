"""Where a picture came from: its parameters, and a C2PA manifest signed by the server's operator. Needs `[c2pa]`.

The manifest says that a model made the picture and who signed it; any change of the file's pixels or metadata breaks
the signature. Anyone can edit the parameters alone.
"""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL.Image

from onestill import __version__
from onestill.errors import ImageError, OnestillError, require

__all__ = ["Stamp", "read_provenance"]

MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
# A name that IPTC defines; nothing is downloaded from there.
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
EXIF_DESCRIPTION = 0x010E


class Stamp:
    """Signs files. Safe to use from any thread.

    Args:
        certificates: a PEM file, the signer's certificate first; it needs an extended key usage that C2PA allows, such
            as emailProtection, and an authority that is not itself.
        key: its private key, PKCS#8 PEM, ECDSA on P-256.

    Raises:
        OnestillError: they cannot be read, or C2PA does not accept them.
    """

    def __init__(self, certificates: Path, key: Path) -> None:
        self._c2pa: Any = require("c2pa", "c2pa")
        try:
            chain, secret = certificates.read_bytes(), key.read_bytes()
        except OSError as error:
            raise OnestillError(f"'{error.filename}' cannot be read ({error.strerror}); give a PEM file.") from error
        try:
            info = self._c2pa.C2paSignerInfo(b"es256", chain, secret, None)
            self._signer = self._c2pa.Signer.from_info(info)
            # A thumbnail would be as large as so small a picture.
            self._context = self._c2pa.Context(
                self._c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}})
            )
            file = io.BytesIO()
            PIL.Image.new("RGB", (8, 8)).save(file, "PNG")
            self(file.getvalue(), "PNG")
        except self._c2pa.C2paError as error:
            raise OnestillError(
                f"C2PA does not accept '{certificates}' with '{key}' ({error}); see docs/serve.md."
            ) from error

    def __call__(self, data: bytes, kind: str) -> bytes:
        """A PNG, JPEG or WEBP with a signed manifest in it."""
        manifest = {
            "claim_generator_info": [{"name": "onestill", "version": __version__}],
            "title": "picture",
            "assertions": [
                {
                    "label": "c2pa.actions",
                    "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": MADE_BY_A_MODEL}]},
                }
            ],
        }
        signed = io.BytesIO()
        with self._c2pa.Builder(json.dumps(manifest), self._context) as builder:
            builder.sign(self._signer, MIME[kind], io.BytesIO(data), signed)
        return signed.getvalue()


def read_provenance(path: Path) -> dict[str, Any]:
    """The parameters and the manifest in a picture's file.

    Returns:
        `file`, `format`, `width`, `height`; `parameters`, the text they were written as, or None; and `manifest`: None
        where there is none, else `state` ("Trusted", "Valid" but by an authority that is not on a list, "Invalid"),
        `signer`, `authority`, `generator`, and `problems`, the codes of what does not hold. Without the extra `[c2pa]`
        there is no `manifest`.

    Raises:
        ImageError: it is no PNG, JPEG or WebP.
    """
    try:
        with PIL.Image.open(path, formats=tuple(MIME)) as picture:
            text = getattr(picture, "text", {}).get("parameters") or _described(picture)
            found: dict[str, Any] = {
                "file": str(path),
                "format": picture.format,
                "width": picture.width,
                "height": picture.height,
                "parameters": str(text) if text else None,
            }
    except FileNotFoundError as error:
        raise ImageError(f"There is no picture '{path}'; check the path.") from error
    except Exception as error:  # Pillow raises anything on damaged bytes
        raise ImageError(f"'{path}' cannot be read as a picture; give a PNG, JPEG or WebP file.") from error
    try:
        c2pa: Any = require("c2pa", "c2pa")
    except ImportError:
        return found
    return found | {"manifest": _manifest(c2pa, path, MIME[str(found["format"])])}


def _described(picture: PIL.Image.Image) -> str | None:
    text = picture.getexif().get(EXIF_DESCRIPTION)
    # Pillow decodes as Latin-1. A text that is no UTF-8 is from another program, and stays as Pillow read it.
    with suppress(UnicodeError):
        return text.encode("latin-1").decode() if isinstance(text, str) else None
    return text


def _manifest(c2pa: Any, path: Path, mime: str) -> dict[str, Any] | None:
    try:
        # From memory: c2pa still reads a file object after its reader is gone, which crashes Python where it is closed.
        with c2pa.Reader(mime, io.BytesIO(path.read_bytes())) as reader:
            report = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return None
    except c2pa.C2paError as error:
        return {"state": "Invalid", "signer": None, "authority": None, "generator": None, "problems": [str(error)]}
    manifest = report["manifests"][report["active_manifest"]]
    signature = manifest.get("signature_info") or {}
    generators = manifest.get("claim_generator_info") or [{}]
    return {
        "state": report.get("validation_state", "Invalid"),
        "signer": signature.get("common_name"),
        "authority": signature.get("issuer"),
        "generator": " ".join(str(generators[0].get(part, "")) for part in ("name", "version")).strip(),
        "problems": [problem["code"] for problem in report.get("validation_status", [])],
    }
