"""`/v1/gallery`: list published pictures, publish one, delete it. The routes exist only where the gallery is on.

A visitor publishes a picture by its prompt and seed, and the server draws it again. So the gallery shows only what the
model drew, and never hands a stranger's file to others.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response

from onestill.serve.access.quota import Visitor
from onestill.serve.access.rate_limit import TokenBuckets
from onestill.serve.errors import ApiError
from onestill.serve.gallery.store import Entry, Gallery
from onestill.serve.web.bodies import json_body, validate
from onestill.serve.web.errors import REFUSALS, ErrorBody, content
from onestill.serve.web.server import File, Server

__all__ = ["gallery_router"]

MOST_LISTED = 48
ID = "[0-9a-f]{32}"
NAME = Path(json_schema_extra={"pattern": f"^{ID}$", "minLength": 32, "maxLength": 32})
LOOKING: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorBody, "description": "A key is needed, or the one that was sent is not valid."},
    403: {"model": ErrorBody, "description": "An unknown Host, or a foreign Origin."},
    429: {"model": ErrorBody, "description": "Too often; see Retry-After."},
    503: {"model": ErrorBody, "description": "The database does not answer; see Retry-After."},
}
GONE: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "There is no such picture."}}
ENTRY: dict[str, Any] = {
    "type": "object",
    "required": ["id", "created", "expires", "seed", "num_inference_steps", "width", "height", "url", "prompt", "mine"],
    "properties": {
        **{name: {"type": "integer"} for name in ("created", "expires", "seed", "num_inference_steps")},
        **{name: {"type": "integer"} for name in ("width", "height")},
        **{name: {"type": "string"} for name in ("id", "url")},
        "prompt": {"type": ["string", "null"], "description": "Null where its owner does not show it."},
        "mine": {"type": "boolean", "description": "Whether you may delete it."},
    },
}
LIST: dict[str, Any] = {
    "type": "object",
    "required": ["object", "data", "next"],
    "properties": {
        "object": {"type": "string"},
        "data": {"type": "array", "items": ENTRY},
        "next": {"type": ["string", "null"], "description": "The value of `after` for the next page."},
    },
}
PAGING = [
    {
        "name": "limit",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": 24},
    },
    {"name": "after", "in": "query", "schema": {"type": "string", "pattern": rf"^[0-9]{{1,15}}\.{ID}$"}},
]


def gallery_router(server: Server, gallery: Gallery) -> APIRouter:
    """The routes of a gallery that is on."""
    routes = _Routes(server, gallery)
    router = APIRouter(prefix="/v1/gallery", tags=["gallery"])
    add = router.add_api_route
    body = content("application/json", server.forms.shown.model_json_schema())
    entry, listing = (content("application/json", schema) for schema in (ENTRY, LIST))
    file = content("image/webp", {"type": "string", "format": "binary"})
    add(
        "",
        routes.listed,
        methods=["GET"],
        responses={**LOOKING, 200: listing, 400: REFUSALS[400]},
        openapi_extra={"parameters": PAGING},
    )
    add(
        "",
        routes.shown,
        methods=["POST"],
        status_code=201,
        responses={**REFUSALS, 201: entry},
        openapi_extra={"requestBody": {"required": True, **body}},
    )
    add("/{name}", routes.one, methods=["GET"], responses={**LOOKING, **GONE, 200: entry})
    add("/{name}/file", routes.file, methods=["GET"], responses={**LOOKING, **GONE, 200: file}, response_class=Response)
    add("/{name}", routes.taken_back, methods=["DELETE"], status_code=204, responses={**LOOKING, **GONE})
    return router


class _Routes:
    """The handlers. OpenAPI's operation ids are made from their names."""

    def __init__(self, server: Server, gallery: Gallery) -> None:
        self._server, self._access, self._gallery = server, server.access, gallery
        rules = gallery.rules
        self._looks = TokenBuckets(rules.looks_a_second, 6 * rules.looks_a_second)
        self._saves = TokenBuckets(rules.saves_a_minute / 60, rules.saves_a_minute)

    async def listed(self, request: Request) -> Response:
        """List the pictures, newest first."""
        viewer = await self._viewer(request)
        limit, before = _paging(request)
        entries = await self._access.in_pool(self._gallery.page, limit + 1, before)
        last = entries[limit - 1] if len(entries) > limit else None
        following = None if last is None else f"{last.made_ms}.{last.id}"
        data = [_entry_json(request, entry, viewer) for entry in entries[:limit]]
        return _json({"object": "list", "data": data, "next": following})

    async def shown(self, request: Request) -> Response:
        """Publish a picture: it is drawn once more, and counts as one. `consent` must be true."""
        server, gallery = self._server, self._gallery
        visitor, owner = await self._owner(request)
        form = validate(server, server.forms.shown, await json_body(request))
        if not form.consent:
            raise ApiError(
                400, "Set 'consent' to true; everyone here will see the picture.", "no_consent", param="consent"
            )
        # A proxy sends the request again where its server died; the id makes that the same picture.
        request_id = request.headers["x-request-id"]
        name = self._access.keyed_hash(f"gallery {owner} {request_id}")
        known = await self._access.in_pool(gallery.find, name)
        if known is not None:
            return _json(_entry_json(request, known, owner), 201)
        await self._access.in_pool(gallery.check_room, owner, visitor.address)
        drawing = await server.draw(visitor, form, request_id=request_id)

        async def check_room(files: Sequence[File]) -> None:
            await self._access.in_pool(gallery.check_room, owner, visitor.address, len(files[0].data))

        (file,) = await drawing.files(await drawing.pictures(request), check_room)
        add = partial(
            gallery.add,
            name=name,
            owner=owner,
            address=visitor.address,
            prompt=form.prompt if form.show_prompt else None,
            seed=file.picture.seed,
            num_inference_steps=drawing.job.num_inference_steps,
            width=drawing.job.width,
            height=drawing.job.height,
        )
        entry = await self._access.in_pool(add, file.data)
        server.count_picture("gallery", file.picture.timings)
        return _json(_entry_json(request, entry, owner), 201)

    async def one(self, request: Request, name: str = NAME) -> Response:
        """The entry of one picture."""
        viewer = await self._viewer(request)
        return _json(_entry_json(request, await self._found(name), viewer))

    async def file(self, request: Request, name: str = NAME) -> Response:
        """The file of one picture, a WebP."""
        await self._viewer(request)
        entry = await self._found(name)
        tag = f'"{entry.id}"'
        # Browsers ask again each time, so a deleted picture is gone at once; an unchanged file is not sent again.
        headers = {"etag": tag, "cache-control": "private, no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        found = await self._access.in_pool(self._gallery.file, entry.id)
        if found is None:
            raise _no_such()
        return Response(found, media_type="image/webp", headers=headers)

    async def taken_back(self, request: Request, name: str = NAME) -> Response:
        """Delete one of your own pictures for good."""
        _, owner = await self._owner(request)
        entry = await self._found(name)
        if not hmac.compare_digest(entry.owner, owner):
            raise ApiError(403, "This picture is someone else's.", "not_yours")
        await self._access.in_pool(self._gallery.remove, entry.id)
        return Response(status_code=204)

    async def _viewer(self, request: Request) -> str:
        """The keyed hash of who looks; "" for a visitor who can own nothing."""
        visitor = await self._access.identify(request)
        _take(self._looks, visitor)
        return self._access.keyed_hash(visitor.owner) if visitor.owner else ""

    async def _owner(self, request: Request) -> tuple[Visitor, str]:
        visitor = await self._access.identify(request)
        if not visitor.owner:
            raise ApiError(401, "A picture needs an owner; open the page first, or send a key.", "no_owner")
        _take(self._saves, visitor)
        return visitor, self._access.keyed_hash(visitor.owner)

    async def _found(self, name: str) -> Entry:
        known = re.fullmatch(ID, name, re.ASCII) is not None
        entry = await self._access.in_pool(self._gallery.find, name) if known else None
        if entry is None:
            raise _no_such()
        return entry


def _take(buckets: TokenBuckets, visitor: Visitor) -> None:
    if not buckets.take(visitor.source):
        raise ApiError(429, "Too many requests; wait a moment.", "rate_limit", retry_after_s=6)


def _paging(request: Request) -> tuple[int, tuple[int, str] | None]:
    limit, after = request.query_params.get("limit", "24"), request.query_params.get("after")
    if not re.fullmatch(r"[0-9]{1,2}", limit, re.ASCII) or not 1 <= int(limit) <= MOST_LISTED:
        raise ApiError(400, f"'limit' is wrong: give 1 to {MOST_LISTED}.", "invalid_value", param="limit")
    if after is None:
        return int(limit), None
    found = re.fullmatch(rf"([0-9]{{1,15}})\.({ID})", after, re.ASCII)
    if found is None:
        raise ApiError(400, "'after' is wrong: give the 'next' of an earlier list.", "invalid_value", param="after")
    return int(limit), (int(found[1]), found[2])


def _no_such() -> ApiError:
    return ApiError(404, "The gallery has no such picture; it may have expired.", "not_found")


def _entry_json(request: Request, entry: Entry, mine: str) -> dict[str, Any]:
    return {
        "id": entry.id,
        "created": entry.made_ms // 1000,
        "expires": entry.expires_ms // 1000,
        "prompt": entry.prompt,
        "seed": entry.seed,
        "num_inference_steps": entry.num_inference_steps,
        "width": entry.width,
        "height": entry.height,
        "url": f"{request.scope.get('root_path', '')}/v1/gallery/{entry.id}/file",
        "mine": hmac.compare_digest(entry.owner, mine),
    }


def _json(content: Any, status: int = 200) -> JSONResponse:
    return JSONResponse(content, status, {"cache-control": "no-store"})
