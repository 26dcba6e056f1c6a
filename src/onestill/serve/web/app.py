"""The application: its routes, the guard before them, and one form for all errors."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Path, Request, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from onestill import __version__
from onestill.errors import OnestillError
from onestill.serve.access.quota import COOKIE, COOKIE_S
from onestill.serve.errors import ApiError
from onestill.serve.web.errors import ErrorBody, response_of, to_api_error
from onestill.serve.web.guard import Guard
from onestill.serve.web.images import images_router
from onestill.serve.web.realtime import converse
from onestill.serve.web.server import Server
from onestill.serve.web.site import Site

__all__ = ["create_app"]

LOG = logging.getLogger("onestill.serve")
LAG_EVERY_S = 0.05
EXPIRE_EVERY_S = 3600.0


def create_app(server: Server) -> FastAPI:
    """The ASGI application of a server. The server is closed when the application ends.

    `GET /` is the page, `/v1/...` the API; `/healthz`, `/readyz` and `/metrics` are for monitoring, and `/openapi.json`
    describes the API.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = [asyncio.create_task(task) for task in (_watch_loop(server), _delete_expired(server))]
        yield
        for task in watching:
            task.cancel()
        server.close()

    app = FastAPI(
        title="onestill",
        version=__version__,
        description="Images from prompts in one step.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from another site
        redoc_url=None,
    )
    app.state.server = server
    app.include_router(images_router(server))
    if server.gallery is not None:
        from onestill.serve.web.gallery import gallery_router

        app.include_router(gallery_router(server, server.gallery))
    _add_page(app, server)
    _add_models(app, server)
    _add_monitoring(app, server)

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await converse(server, socket)

    _add_error_handlers(app)
    settings = server.settings

    def watch(method: str, route: str, status: int, seconds: float) -> None:
        server.metrics.count("onestill_http_requests_total", route=route, status=str(status))
        server.metrics.observe("onestill_http_request_seconds", seconds, route=route)

    app.add_middleware(Guard, hosts=settings.hosts, origins=settings.origins, most_body=server.bounds.body, watch=watch)
    return app


def _add_page(app: FastAPI, server: Server) -> None:
    site = Site()

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        response = site.response("index.html", request)
        cookie = server.access.cookie_for(request)
        if cookie is not None and (server.access.trial is not None or server.gallery is not None):
            response.set_cookie(
                COOKIE,
                cookie,
                max_age=COOKIE_S,
                httponly=True,
                samesite="strict",
                secure=request.url.scheme == "https",
            )
        return response

    @app.get("/web/{name}", include_in_schema=False)
    async def part(request: Request, name: str) -> Response:
        return site.response(name, request)


def _add_models(app: FastAPI, server: Server) -> None:
    info, bounds, aliases = server.info, server.bounds, server.settings.aliases
    model = {
        "id": info.name,
        "object": "model",
        "created": 0,
        "owned_by": "onestill",
        "version": info.version,
        "licence": info.licence,
        "sizes": [f"{width}x{height}" for height, width in info.sizes],
        "size": f"{info.width}x{info.height}",
        "num_inference_steps": info.num_inference_steps,
        "styles": list(info.styles),
        "limits": {
            "prompt": bounds.prompt,
            "live_prompt": bounds.live_prompt,
            "n": bounds.n,
            "live_n": bounds.live_n,
            "num_inference_steps": bounds.steps,
            "upload_bytes": bounds.body,
            "upload_px": bounds.upload_px,
        },
    }

    @app.get("/v1/models", tags=["models"], responses={403: {"model": ErrorBody}})
    async def models() -> dict[str, Any]:
        """The models, their native sizes and limits."""
        gallery = server.gallery
        more = {} if gallery is None else {"gallery": {"days": gallery.rules.days, "each": gallery.rules.each}}
        others = [{**model, "id": alias, "alias_of": info.name} for alias in aliases]
        return {"object": "list", "data": [model, *others], **more}

    @app.get("/v1/models/{name}", tags=["models"], responses={403: {"model": ErrorBody}, 404: {"model": ErrorBody}})
    async def one_model(name: str = Path(json_schema_extra={"enum": [info.name, *aliases]})) -> dict[str, Any]:
        """One model."""
        server.check_model(name)
        return model if name == info.name else {**model, "id": name, "alias_of": info.name}


def _add_monitoring(app: FastAPI, server: Server) -> None:
    @app.get("/healthz", tags=["watch"], responses={403: {"model": ErrorBody}, 503: {"model": ErrorBody}})
    async def alive() -> dict[str, str]:
        """Whether the process answers and its engine lives; where it does not, only a new process helps."""
        reason = server.scheduler.why_dead()
        if reason is not None:
            raise ApiError(503, f"Not healthy: {reason}.", "not_healthy", retry_after_s=5)
        return {"status": "ok"}

    @app.get("/readyz", tags=["watch"], responses={403: {"model": ErrorBody}, 503: {"model": ErrorBody}})
    async def ready() -> dict[str, str]:
        """Whether work may be sent here."""
        reason = server.scheduler.why_not_ready() or await server.access.why_not_ready()
        if reason is not None:
            raise ApiError(503, f"Not ready: {reason}.", "not_ready", retry_after_s=2)
        return {"status": "ready"}

    @app.get("/metrics", tags=["watch"], response_class=PlainTextResponse, responses={403: {"model": ErrorBody}})
    async def metrics(request: Request) -> Response:
        """Metrics for Prometheus, shown to this machine's addresses unless the operator allows all."""
        if not server.settings.metrics_for_all and not _is_local(request):
            raise ApiError(403, "Metrics are shown to this machine only; see --metrics-for-all.", "forbidden")
        gauges = {
            "onestill_waiting_pictures": ("Pictures in the queue.", float(server.scheduler.waiting)),
            "onestill_live_connections": ("Open live connections.", float(server.live.total())),
            "onestill_batch_limit": ("Pictures one call may draw at present.", float(server.scheduler.batch)),
            "onestill_ready": ("Whether work may be sent here.", float(server.scheduler.why_not_ready() is None)),
            "onestill_resident_bytes": ("Memory of the process.", _resident_bytes()),
        }
        text = server.metrics.render(gauges, server.scheduler.counts)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _watch_loop(server: Server) -> None:
    """Measure how late the event loop wakes: whatever blocks it delays every request."""
    while True:
        due = time.perf_counter() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        server.metrics.observe("onestill_loop_lag_seconds", max(0.0, time.perf_counter() - due))


async def _delete_expired(server: Server) -> None:
    """Delete expired pictures of the gallery, now and each hour, even where nobody adds to it."""
    while server.gallery is not None:
        try:
            await server.access.in_pool(server.gallery.forget_expired)
        except OnestillError:
            LOG.warning("The gallery's database does not answer.")
        await asyncio.sleep(EXPIRE_EVERY_S)


def _is_local(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _resident_bytes() -> float:
    try:
        with open("/proc/self/statm") as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0.0


def _allowed(app: FastAPI, path: str) -> str:
    """The methods of all routes of a path; Starlette lists only those of the first."""
    methods: set[str] = set()
    for template, operations in app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            methods |= {method.upper() for method in operations}
    return ", ".join(sorted(methods))


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(OnestillError)
    async def package_error(request: Request, error: OnestillError) -> JSONResponse:
        return response_of(to_api_error(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        messages = {404: "There is nothing here; see /openapi.json.", 405: "This path does not take that method."}
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        response = response_of(ApiError(error.status_code, messages.get(error.status_code, "Not possible."), code))
        response.headers.update(error.headers or {})
        if error.status_code == 405 and (allowed := _allowed(app, request.url.path)):
            response.headers["allow"] = allowed
        return response
