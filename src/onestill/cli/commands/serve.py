"""`onestill serve`: the page that draws while one types, and the API under it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestill.cli.console import note, note_device
from onestill.cli.database import open_ledger
from onestill.cli.options import (
    AdditionOptions,
    CompileOptions,
    Database,
    KeysFile,
    Model,
    RuntimeOptions,
    parse_daily,
    with_groups,
)
from onestill.errors import OnestillError, require

if TYPE_CHECKING:
    from onestill.checkpoint import ModelInfo
    from onestill.pipeline import Pipeline
    from onestill.serve.access.ledger import Ledger
    from onestill.serve.access.quota import Access
    from onestill.serve.provenance import Stamp
    from onestill.serve.queue.scheduler import Limits
    from onestill.serve.safety import ImageFilter, PromptFilter
    from onestill.serve.web.server import Server, Settings


@dataclass(frozen=True)
class AccessOptions:
    """Who may draw."""

    database: Database = None
    keys: KeysFile = None
    trial_limit: Annotated[
        str | None,
        typer.Option(metavar="N/day", help="Pictures a day for each visitor without a key. (default: any number)"),
    ] = None

    @property
    def daily(self) -> int | None:
        """Pictures a day for each visitor without a key, None for any number."""
        limit = parse_daily(self.trial_limit)
        # Where there are keys and no trial limit, everyone needs a key.
        return 0 if limit is None and (self.keys is not None or self.database is not None) else limit

    def open(self, *, gallery: bool) -> tuple[Access, Ledger | None]:
        """Keys from a file, keys and counts from a database, which a trial limit or a gallery needs too."""
        from onestill.serve.access.keys import read_keys
        from onestill.serve.access.quota import Access

        needs_database = self.database is not None or self.daily or gallery
        ledger = open_ledger(self.database) if needs_database else None
        return Access(read_keys(self.keys) if self.keys is not None else {}, ledger, self.daily), ledger


@dataclass(frozen=True)
class GalleryOptions:
    """What visitors show each other."""

    gallery: Annotated[
        bool, typer.Option("--gallery", help="Let visitors show pictures to each other, and delete their own.")
    ] = False
    gallery_days: Annotated[
        int, typer.Option(min=1, max=3650, metavar="N", help="Number of days that a picture is shown.")
    ] = 30
    gallery_most: Annotated[int, typer.Option(min=1, metavar="N", help="Number of pictures shown at most.")] = 1000


@dataclass(frozen=True)
class Hooks:
    """What else decides on a picture."""

    blocked_words: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Refuse prompts with a word from this file, one a line. (default: none)"),
    ] = None
    image_filter: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="A Python function that refuses pictures. (default: none)")
    ] = None
    no_filter: Annotated[
        bool, typer.Option("--no-filter", help="Serve without the image filter that the model asks for.")
    ] = False
    sign_with: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Sign pictures with this C2PA certificate chain. (default: unsigned)"),
    ] = None
    sign_key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="The private key of the certificate for --sign-with.")
    ] = None

    def filters(self, info: ModelInfo) -> tuple[PromptFilter | None, ImageFilter | None]:
        """The two filters, None where none is wanted."""
        from onestill.serve.safety import blocked_words, card_asks_for_filter, named_filter

        if card_asks_for_filter(info) and self.image_filter is None and not self.no_filter:
            raise OnestillError(
                f"The model '{info.name}' asks for a filter of its pictures; give --image-filter, or --no-filter."
            )
        return (
            blocked_words(self.blocked_words) if self.blocked_words is not None else None,
            named_filter(self.image_filter) if self.image_filter is not None else None,
        )

    def stamp(self) -> Stamp | None:
        """What signs pictures, None where neither file is given."""
        if self.sign_with is None and self.sign_key is None:
            return None
        if self.sign_with is None or self.sign_key is None:
            raise OnestillError("Signing needs a certificate and its key; give both --sign-with and --sign-key.")
        from onestill.serve.provenance import Stamp

        return Stamp(self.sign_with, self.sign_key)


SLOWER = 5  # than the slowest call while warming up: no call of an engine that is well
COMPILE_S = 900.0  # torch compiles an image size that is new to it for no longer


@dataclass(frozen=True)
class RecoveryOptions:
    """What is done where the engine hangs, or the process dies."""

    timeout: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=3600,
            metavar="SECONDS",
            help="Answer what waits for longer, and replace an engine that hangs for longer. (default: 30, or more "
            "where the engine is slow)",
        ),
    ] = None
    no_restart: Annotated[
        bool, typer.Option("--no-restart", help="Do not start the server again when it dies or its engine hangs.")
    ] = False

    def limits(self, found: Limits) -> Limits:
        """These limits with the timeout, where one was chosen."""
        if self.timeout is None:
            return found
        return replace(found, timeout_s=self.timeout, stuck_s=self.timeout / 2, hung_s=self.timeout)


@with_groups
def serve(
    context: typer.Context,
    *,
    model: Model = "icons",
    runtime: RuntimeOptions,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPU threads to compute with. (default: the engine's choice)")
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address to listen on; 0.0.0.0 is every interface.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", "-p", min=0, max=65535, metavar="N", help="The port to listen on; 0 takes a free one."),
    ] = 8000,
    access: AccessOptions,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Another name that the server goes by. May be repeated. (default: localhost alone)"
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Another site whose pages may ask. May be repeated. (default: none)"),
    ] = None,
    trust_proxy: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The proxy whose X-Forwarded-For is believed. (default: none)")
    ] = None,
    gallery: GalleryOptions,
    queue: Annotated[int, typer.Option(min=1, metavar="N", help="Number of pictures that may wait.")] = 64,
    batch: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Number of pictures drawn in one call at most.")
    ] = 4,
    hooks: Hooks,
    ray: Annotated[
        int, typer.Option(min=0, metavar="N", help="Run N replicas under Ray Serve; 0 serves without Ray.")
    ] = 0,
    ray_gpus: Annotated[
        float, typer.Option(min=0, metavar="X", help="Number of GPUs for each replica; a fraction shares one.")
    ] = 0.0,
    recovery: RecoveryOptions,
    additions: AdditionOptions,
    compiling: CompileOptions,
    model_alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=MODEL]",
            help="Another name of the model in requests, such as gpt-image-1. May be repeated. (default: none)",
        ),
    ] = None,
    upload_mb: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Megabytes that one request may upload.")
    ] = 12,
    metrics_for_all: Annotated[
        bool,
        typer.Option("--metrics-for-all", help="Answer /metrics to every address. (default: this machine's alone)"),
    ] = False,
) -> None:
    """Serve the page, the realtime socket and the images API, until Ctrl-C."""
    from onestill.serve.supervisor import Supervised, supervise

    # First, while this process is small, and only where it is the command's own, as it forks. Ray has its own way to
    # replace replicas.
    is_alone = recovery.no_restart or ray or not context.obj
    supervised = Supervised() if is_alone else supervise()
    from onestill.serve.queue.scheduler import Limits
    from onestill.serve.run import listen, run
    from onestill.serve.web.requests import Bounds
    from onestill.serve.web.server import Settings

    settings = Settings(
        hosts=tuple(allow_host or ()),
        origins=tuple(allow_origin or ()),
        bounds=Bounds(body=upload_mb * 2**20),
        aliases=tuple(model_alias or ()),
        limits=Limits(waiting=queue, waiting_each=max(10, queue // 2), batch=batch),
        metrics_for_all=metrics_for_all,
    )
    loading = {"threads": threads, **vars(runtime), "options": compiling.torch_options()}
    build = partial(built, settings, hooks, model, loading, additions, access, gallery, recovery)
    daily = access.daily
    check(settings, hooks, model, additions)
    with supervised.bound or listen(host, port) as bound:
        supervised.keep(bound)
        found_host, found_port = bound.getsockname()[:2]
        shown = f"[{found_host}]" if ":" in found_host else found_host

        def ready(on: str = "") -> None:
            print(f"onestill draws at http://{shown}:{found_port}/{on} (Ctrl-C ends it)", flush=True)

        access.open(gallery=gallery.gallery)[0].close()
        if daily is None and not is_loopback(host):
            note("anyone who reaches this address can draw; --trial-limit and --keys set limits")
        if not ray:
            server = build()
            note_device(runtime.device, server.info.engine, server.info.device)
            said = None if supervised.bound else partial(ready, f" on {server.info.device}")
            run(server, bound, trusted_proxies=trust_proxy, ready=said, beat=supervised.beat)
            return
        require("ray.serve", "ray")
        from onestill.serve.cluster.ray import run_on_ray

        run_on_ray(build, settings, bound, replicas=ray, gpus=ray_gpus, trusted_proxies=trust_proxy, ready=ready)


def check(settings: Settings, hooks: Hooks, model: str, additions: AdditionOptions) -> Settings:
    """The settings with the hooks in them; what is wrong with the model or a hook is said before anything starts."""
    from onestill.checkpoint import Additions, describe, resolve

    info = describe(resolve(model), Additions.of(**additions.arguments()))
    aliases = tuple(checked_alias(text, info.name) for text in settings.aliases)
    prompt_filter, image_filter = hooks.filters(info)
    hooked = replace(settings, prompt_filter=prompt_filter, image_filter=image_filter, stamp=hooks.stamp())
    return replace(hooked, aliases=aliases)


def checked_alias(text: str, name: str) -> str:
    """The alias in `ALIAS` or `ALIAS=MODEL`.

    Raises:
        OnestillError: it is empty, or for another model than `name`.
    """
    alias, equals, of = text.partition("=")
    if not alias.strip() or (equals and of != name):
        raise OnestillError(f"--model-alias {text} names no alias of '{name}'; write it as ALIAS={name}.")
    return alias.strip()


def built(
    settings: Settings,
    hooks: Hooks,
    model: str,
    loading: dict[str, Any],
    additions: AdditionOptions,
    access: AccessOptions,
    gallery: GalleryOptions,
    recovery: RecoveryOptions,
) -> Server:
    """A server, its model loaded and warm. Under Ray this runs in each replica, so its arguments can be pickled."""
    from concurrent.futures import ThreadPoolExecutor

    from onestill.pipeline import load
    from onestill.serve.process import lower_priority
    from onestill.serve.queue.warm_up import warm_up
    from onestill.serve.web.server import Server

    settings = check(settings, hooks, model, additions)

    slowest_s = 0.0

    def loaded() -> Pipeline:
        nonlocal slowest_s
        pipe = load(model, **loading, **additions.arguments())
        slowest_s = warm_up(pipe, settings.limits.batch, note)
        return pipe

    # In a thread that steps back, so that the engine's own threads, which it starts here, do so too.
    with ThreadPoolExecutor(1, initializer=lower_priority) as pool:
        pipe = pool.submit(loaded).result()
    stage_s = max(SLOWER * slowest_s, COMPILE_S if loading["options"] and loading["options"].compile != "none" else 0)
    settings = replace(settings, limits=recovery.limits(settings.limits.within(stage_s)))
    opened, ledger = access.open(gallery=gallery.gallery)
    if not gallery.gallery or ledger is None:
        return Server(pipe, settings, opened, load=loaded)
    from onestill.serve.gallery.store import Gallery, Rules

    rules = Rules(gallery.gallery_days, gallery.gallery_most)
    return Server(pipe, settings, opened, Gallery(ledger, rules), loaded)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in ("localhost", "::1") or host.startswith("127.")
