"""`onestill serve`: the page that draws while one types, and the API under it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from onestill.cli.console import note, note_device
from onestill.cli.database import open_ledger
from onestill.cli.options import (
    Compile,
    Database,
    Device,
    Dtype,
    Engine,
    KeysFile,
    Loras,
    Model,
    Preset,
    Quantize,
    TinyVae,
    Unet,
    parse_daily,
    parse_loras,
    torch_options,
)
from onestill.errors import OnestillError, require

if TYPE_CHECKING:
    from onestill.checkpoint import ModelInfo
    from onestill.pipeline import Pipeline
    from onestill.serve.access.ledger import Ledger
    from onestill.serve.access.quota import Access
    from onestill.serve.provenance import Stamp
    from onestill.serve.safety import ImageFilter, PromptFilter
    from onestill.serve.web.server import Server, Settings

__all__ = ["serve"]


def serve(
    model: Model = "icons",
    engine: Engine = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, metavar="N", help="CPU threads to compute with. (default: the engine's choice)"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="The address to listen on; 0.0.0.0 is every interface.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", "-p", min=0, max=65535, metavar="N", help="The port to listen on; 0 takes a free one."),
    ] = 8000,
    database: Database = None,
    keys: KeysFile = None,
    trial_limit: Annotated[
        str | None,
        typer.Option(
            "--trial-limit",
            metavar="N/day",
            help="Pictures a day for each visitor without a key. (default: any number)",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="Another name that the server goes by. May be repeated. (default: localhost alone)",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", metavar="URL", help="Another site whose pages may ask. May be repeated. (default: none)"
        ),
    ] = None,
    trust_proxy: Annotated[
        str | None,
        typer.Option(
            "--trust-proxy", metavar="ADDRESS", help="The proxy whose X-Forwarded-For is believed. (default: none)"
        ),
    ] = None,
    gallery: Annotated[
        bool, typer.Option("--gallery", help="Let visitors show pictures to each other, and delete their own.")
    ] = False,
    gallery_days: Annotated[
        int,
        typer.Option("--gallery-days", min=1, max=3650, metavar="N", help="Number of days that a picture is shown."),
    ] = 30,
    gallery_most: Annotated[
        int, typer.Option("--gallery-most", min=1, metavar="N", help="Number of pictures shown at most.")
    ] = 1000,
    queue: Annotated[int, typer.Option("--queue", min=1, metavar="N", help="Number of pictures that may wait.")] = 64,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=64, metavar="N", help="Number of pictures drawn in one call at most.")
    ] = 4,
    blocked: Annotated[
        Path | None,
        typer.Option(
            "--blocked-words",
            metavar="FILE",
            help="Refuse prompts with a word from this file, one a line. (default: none)",
        ),
    ] = None,
    image_filter: Annotated[
        str | None,
        typer.Option(
            "--image-filter", metavar="MODULE:NAME", help="A Python function that refuses pictures. (default: none)"
        ),
    ] = None,
    no_filter: Annotated[
        bool, typer.Option("--no-filter", help="Serve without the image filter that the model asks for.")
    ] = False,
    sign_with: Annotated[
        Path | None,
        typer.Option(
            "--sign-with", metavar="PEM", help="Sign pictures with this C2PA certificate chain. (default: unsigned)"
        ),
    ] = None,
    sign_key: Annotated[
        Path | None,
        typer.Option("--sign-key", metavar="PEM", help="The private key of the certificate for --sign-with."),
    ] = None,
    ray: Annotated[
        int, typer.Option("--ray", min=0, metavar="N", help="Run N replicas under Ray Serve; 0 serves without Ray.")
    ] = 0,
    ray_gpus: Annotated[
        float,
        typer.Option("--ray-gpus", min=0, metavar="X", help="Number of GPUs for each replica; a fraction shares one."),
    ] = 0.0,
    unet: Unet = None,
    lora: Loras = None,
    tiny_vae: TinyVae = None,
    preset: Preset = None,
    compiling: Compile = None,
    quantizing: Quantize = None,
    model_alias: Annotated[
        list[str] | None,
        typer.Option(
            "--model-alias",
            metavar="NAME[=MODEL]",
            help="Another name of the model in requests, such as gpt-image-1. May be repeated. (default: none)",
        ),
    ] = None,
    upload_mb: Annotated[
        int, typer.Option("--upload-mb", min=1, max=64, metavar="N", help="Megabytes that a request may upload.")
    ] = 12,
    metrics_for_all: Annotated[
        bool,
        typer.Option("--metrics-for-all", help="Answer /metrics to every address. (default: this machine's alone)"),
    ] = False,
) -> None:
    """Serve the page, the realtime socket and the images API, until Ctrl-C."""
    from onestill.serve.queue.scheduler import Limits
    from onestill.serve.run import listen, run
    from onestill.serve.web.requests import Bounds
    from onestill.serve.web.server import Settings

    daily = parse_daily(trial_limit)
    settings = Settings(
        hosts=tuple(allow_host or ()),
        origins=tuple(allow_origin or ()),
        bounds=Bounds(body=upload_mb * 2**20),
        aliases=tuple(model_alias or ()),
        limits=Limits(waiting=queue, waiting_each=max(10, queue // 2), batch=batch),
        metrics_for_all=metrics_for_all,
    )
    hooks = Hooks(blocked, image_filter, no_filter, sign_with, sign_key)
    added = {"unet": unet, "lora": parse_loras(lora), "tiny_vae": tiny_vae, "preset": preset}
    build = partial(
        built,
        settings,
        hooks,
        {"model": model, "engine": engine, "device": device, "dtype": dtype, "threads": threads}
        | {"options": torch_options(compiling, quantizing)},
        added,
        {"database": database, "keys": keys, "daily": daily},
        {"days": gallery_days, "most": gallery_most} if gallery else None,
    )
    check(settings, hooks, model, added)
    with listen(host, port) as bound:
        found_host, found_port = bound.getsockname()[:2]
        shown = f"[{found_host}]" if ":" in found_host else found_host

        def ready(on: str = "") -> None:
            print(f"onestill draws at http://{shown}:{found_port}/{on} (Ctrl-C ends it)", flush=True)

        opened_access(database, keys, daily, gallery=gallery)[0].close()
        if daily is None and keys is None and database is None and not is_loopback(host):
            note("anyone who reaches this address can draw; --trial-limit and --keys set limits")
        if not ray:
            server = build()
            note_device(device, server.info.engine, server.info.device)
            run(server, bound, trusted_proxies=trust_proxy, ready=partial(ready, f" on {server.info.device}"))
            return
        require("ray.serve", "ray")
        from onestill.serve.cluster.ray import run_on_ray

        run_on_ray(build, settings, bound, replicas=ray, gpus=ray_gpus, trusted_proxies=trust_proxy, ready=ready)


class Hooks(NamedTuple):
    """What else decides on a picture: the options of these names."""

    blocked: Path | None
    image_filter: str | None
    no_filter: bool
    sign_with: Path | None
    sign_key: Path | None


def check(settings: Settings, hooks: Hooks, model: str, added: dict[str, Any]) -> Settings:
    """The settings with the hooks in them; what is wrong with the model or a hook is said before anything starts."""
    from onestill.checkpoint import Additions, describe, resolve

    info = describe(resolve(model), Additions.of(**added))
    aliases = tuple(checked_alias(text, info.name) for text in settings.aliases)
    prompt_filter, image_filter = filters(info, hooks.blocked, hooks.image_filter, hooks.no_filter)
    signs = stamp(hooks.sign_with, hooks.sign_key)
    hooked = replace(settings, prompt_filter=prompt_filter, image_filter=image_filter, stamp=signs)
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
    model: dict[str, Any],
    added: dict[str, Any],
    access: dict[str, Any],
    gallery: dict[str, int] | None,
) -> Server:
    """A server, its model loaded and warm. Under Ray this runs in each replica, so its arguments can be pickled."""
    from concurrent.futures import ThreadPoolExecutor

    from onestill.pipeline import load
    from onestill.serve.process import lower_priority
    from onestill.serve.queue.warm_up import warm_up
    from onestill.serve.web.server import Server

    settings = check(settings, hooks, model["model"], added)

    def loaded() -> Pipeline:
        pipe = load(**model, **added)
        warm_up(pipe, settings.limits.batch, note)
        return pipe

    # In a thread that steps back, so that the engine's own threads, which it starts here, do so too.
    with ThreadPoolExecutor(1, initializer=lower_priority) as pool:
        pipe = pool.submit(loaded).result()
    opened, ledger = opened_access(**access, gallery=gallery is not None)
    if gallery is None or ledger is None:
        return Server(pipe, settings, opened)
    from onestill.serve.gallery.store import Gallery, Rules

    return Server(pipe, settings, opened, Gallery(ledger, Rules(**gallery)))


def opened_access(
    database: str | None, keys: Path | None, daily: int | None, *, gallery: bool
) -> tuple[Access, Ledger | None]:
    """Who may draw: keys from a file, keys and counts from a database, which a trial limit or a gallery needs too.

    Where there are keys and no trial limit, everyone needs a key.
    """
    from onestill.serve.access.keys import read_keys
    from onestill.serve.access.quota import Access

    ledger = None
    if database is not None or daily or gallery:
        ledger = open_ledger(database)
    if daily is None and (keys is not None or database is not None):
        daily = 0
    return Access(read_keys(keys) if keys is not None else {}, ledger, daily), ledger


def filters(
    info: ModelInfo, blocked: Path | None, image_filter: str | None, no_filter: bool
) -> tuple[PromptFilter | None, ImageFilter | None]:
    """The two filters, None where none is wanted.

    Raises:
        OnestillError: the model asks for an image filter, and none is given.
    """
    from onestill.serve.safety import blocked_words, card_asks_for_filter, named_filter

    if card_asks_for_filter(info) and image_filter is None and not no_filter:
        raise OnestillError(
            f"The model '{info.name}' asks for a filter of its pictures; give --image-filter, or --no-filter."
        )
    return (
        blocked_words(blocked) if blocked is not None else None,
        named_filter(image_filter) if image_filter is not None else None,
    )


def stamp(certificates: Path | None, key: Path | None) -> Stamp | None:
    """What signs pictures, None where neither file is given."""
    if certificates is None and key is None:
        return None
    if certificates is None or key is None:
        raise OnestillError("Signing needs a certificate and its key; give both --sign-with and --sign-key.")
    from onestill.serve.provenance import Stamp

    return Stamp(certificates, key)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in ("localhost", "::1") or host.startswith("127.")
