"""The page's files. They are read once and served from memory, so no path is ever made from a request."""

from __future__ import annotations

import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

from onestill.serve.errors import ApiError

__all__ = ["Site"]

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}


class Site:
    """The files in the folder `static` beside this module."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, str, str]] = {}
        for file in resources.files(__package__).joinpath("static").iterdir():
            suffix = "." + file.name.rpartition(".")[2]
            if suffix in TYPES:
                data = file.read_bytes()
                self._files[file.name] = (data, TYPES[suffix], _tag(data))

    def response(self, name: str, request: Request) -> Response:
        """A file, or 304 where the browser has it already. Raises ApiError (404) where there is no such file."""
        if name not in self._files:
            raise ApiError(404, "There is nothing here.", "not_found")
        data, kind, tag = self._files[name]
        root_path = request.scope.get("root_path", "")
        if root_path and name.endswith(".html"):  # scripts find the server from their own address
            data = data.replace(b'="/web/', f'="{root_path}/web/'.encode())
            tag = _tag(data)
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)


def _tag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:16]}"'
