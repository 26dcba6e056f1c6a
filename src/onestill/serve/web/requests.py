"""The requests that draw, and their bounds: bodies of the images API and the gallery, live messages, uploads."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from onestill.checkpoint import ModelInfo
from onestill.serve.queue.jobs import Job

__all__ = [
    "LARGEST_SEED",
    "Bounds",
    "Edit",
    "Encoding",
    "Form",
    "Forms",
    "Generation",
    "Live",
    "Shown",
    "forms_for",
    "job_of",
    "notes_on",
]

LARGEST_SEED = 2**53 - 1  # the largest integer that JavaScript represents exactly
KINDS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}  # Pillow's names of the file formats, by those in requests
# Sizes of OpenAI's models, which clients send whatever the model is.
USUAL_SIZES = """
    256x256 512x512 1024x1024 1536x1024 1024x1536 1792x1024 1024x1792 2048x2048 2048x1152 1152x2048 3840x2160 2160x3840
"""
WITHOUT_EFFECT = ("quality", "style", "moderation", "input_fidelity")  # in the order in which a note names them


@dataclass(frozen=True)
class Bounds:
    """How much one request may ask for.

    Attributes:
        prompt, live_prompt: characters, of the images API, and of live messages and the gallery.
        n, live_n: pictures of one request, of one live message.
        steps: sampling steps.
        body: bytes of a request, uploads included.
        uploads: bytes of all uploads that are received or wait; of one visitor a quarter, or `body` where that is more.
        message: bytes of one live message.
        upload_px: pixels of an uploaded picture.
        messages_each_s: live messages a second of one connection; twice as many may come at once.
        live, live_each: live connections in all, and of one address.
    """

    prompt: int = 32_000
    live_prompt: int = 4000
    n: int = 10
    live_n: int = 4
    steps: int = 50
    body: int = 12 * 2**20
    uploads: int = 64 * 2**20
    message: int = 2**20
    upload_px: int = 16_000_000
    messages_each_s: float = 60.0
    live: int = 256
    live_each: int = 32


class Encoding(NamedTuple):
    """How the pictures of a request become files.

    Attributes:
        kind: PNG, JPEG or WEBP.
        quality: of a JPEG or WEBP, 0 to 100.
        signed: whether the server's signature, where it has one, goes into the file.
        with_prompt: whether the prompt is written into the file.
    """

    kind: str
    quality: int
    signed: bool = True
    with_prompt: bool = True


def _whole(value: object) -> object:
    # JSON Schema counts 1.0 as an integer, so a client may send it. A boolean or a text is no integer.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool | str | bytes):
        raise ValueError("give a whole number")
    return value


def _number(value: object) -> object:
    if isinstance(value, bool | str | bytes):
        raise ValueError("give a number")
    return value


def _whole_from(low: int, high: int) -> Any:
    # The bounds are inside the annotation, so that the OpenAPI schema has them.
    return Annotated[int, Field(ge=low, le=high), BeforeValidator(_whole)] | None


_Seed: TypeAlias = Annotated[int, Field(ge=0, le=LARGEST_SEED), BeforeValidator(_whole)]
_Quality: TypeAlias = Annotated[int, Field(ge=0, le=100), BeforeValidator(_whole)]


def _opaque(value: object) -> object:
    if value == "transparent":
        raise ValueError("this model cannot draw a transparent background; send 'opaque' or leave it out")
    return value


_Word: TypeAlias = Annotated[str, Field(max_length=64)]
_Share: TypeAlias = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), BeforeValidator(_number)]


class _Common(BaseModel):
    """Fields of every request. Those of OpenAI's API that have no effect here are accepted and ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    seed: _Seed | None = Field(None, description="Picture i has seed `seed + i`; null takes a random one.")


class Generation(_Common):
    """The body of `POST /v1/images/generations`; the bounds are filled in by `forms_for`."""

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    num_inference_steps: int | None = None
    response_format: Literal["b64_json", "url"] | None = Field(None, description="`url` gives a data URL.")
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: _Quality | None = Field(None, description="Quality of a JPEG or WebP.")
    stream: bool | None = Field(None, strict=True, description="Server-sent events, one a picture.")
    user: str | None = Field(None, max_length=256, description="Accepted and not stored.")
    safety_identifier: str | None = Field(None, max_length=256, description="Accepted and not stored.")
    quality: _Word | None = Field(None, description="Has no effect, which a note says.")
    background: Annotated[Literal["auto", "opaque"], BeforeValidator(_opaque)] | None = None
    moderation: _Word | None = Field(None, description="Has no effect, which a note says.")
    style: _Word | None = Field(None, description="Has no effect, which a note says.")
    partial_images: Annotated[int, Field(ge=0, le=3), BeforeValidator(_whole)] | None = Field(
        None, description="With `stream`, pictures between the steps; one step has none."
    )

    @property
    def encoding(self) -> Encoding:
        """How its pictures become files."""
        quality = 95 if self.output_compression is None else self.output_compression
        return Encoding(KINDS[self.output_format or "png"], quality)


class Edit(Generation):
    """The fields of `POST /v1/images/edits` beside its image."""

    strength: _Share | None = Field(
        None, description="How much of the image to change; null is 0.5, and 1 inside a mask."
    )
    input_fidelity: _Word | None = Field(None, description="Has no effect, which a note says.")


class Shown(_Common):
    """The body of `POST /v1/gallery`: the parameters of a picture, and two consents."""

    prompt: str
    model: str | None = None
    size: str | None = None
    num_inference_steps: int | None = None
    consent: bool = Field(
        strict=True,
        description="Must be true: everyone who may look will see the picture.",
        json_schema_extra={"const": True},
    )
    show_prompt: bool = Field(False, strict=True, description="Show its prompt too; else it is not stored.")

    @property
    def encoding(self) -> Encoding:
        """How its picture becomes a file, which holds the prompt only where it may be shown."""
        return Encoding("WEBP", 90, with_prompt=self.show_prompt)


class Live(_Common):
    """A message of the socket."""

    id: _Seed
    prompt: str
    n: int | None = None
    size: str | None = None
    num_inference_steps: int | None = None
    strength: _Share | None = None
    format: Literal["jpeg", "webp", "png"] | None = None
    quality: _Quality | None = None

    @property
    def encoding(self) -> Encoding:
        """How its pictures become files; unsigned, as signing takes tens of milliseconds."""
        return Encoding(KINDS[self.format or "jpeg"], 85 if self.quality is None else self.quality, signed=False)


Form: TypeAlias = Generation | Shown | Live


@dataclass(frozen=True)
class Forms:
    """The request classes for one model."""

    generation: type[Generation]
    edit: type[Edit]
    live: type[Live]
    shown: type[Shown]


def forms_for(info: ModelInfo, bounds: Bounds, aliases: Sequence[str] = ()) -> Forms:
    """The classes with the model's names, sizes and bounds filled in, so that the OpenAPI schema has them."""
    own_sizes = ("auto", *(f"{width}x{height}" for height, width in info.sizes))
    every_size = tuple(dict.fromkeys([*own_sizes, *USUAL_SIZES.split()]))
    steps = (_whole_from(1, bounds.steps), Field(None, description="Null is the model's own."))

    def made(base: type[Any], most_characters: int, sizes: tuple[str, ...], **more: Any) -> Any:
        # At least one visible character. Python, Rust and JavaScript differ in what else is white space.
        prompt: Any = (
            Annotated[str, Field(min_length=1, max_length=most_characters, pattern=r"[^\s\x00-\x1f\x7f-\x9f]")],
            Field(description="What to draw.", examples=["a red apple"]),
        )
        size: Any = (Literal[sizes] | None, Field(None, description="Width x height in pixels."))
        return create_model(base.__name__, __base__=base, prompt=prompt, size=size, num_inference_steps=steps, **more)

    def many(most: int) -> Any:
        return (_whole_from(1, most), Field(None, description="How many pictures."))

    names: Any = (info.name, *aliases)
    model = (Literal[names] | None, Field(None))
    return Forms(
        made(Generation, bounds.prompt, every_size, n=many(bounds.n), model=model),
        made(Edit, bounds.prompt, every_size, n=many(bounds.n), model=model),
        made(Live, bounds.live_prompt, own_sizes, n=many(bounds.live_n)),
        made(Shown, bounds.live_prompt, own_sizes, model=model),
    )


def job_of(form: Form, info: ModelInfo, *, request_id: str | None = None) -> Job:
    """The job that a validated request asks for, without its upload.

    Args:
        form: the request.
        info: the model's.
        request_id: names the seed where the request has none, so that a retry draws the same; None draws a random seed.
    """
    n = getattr(form, "n", None) or 1
    height, width = _size_of(form, info)
    first = form.seed
    if first is None:
        named = hashlib.sha256(request_id.encode()).digest() if request_id else secrets.token_bytes(4)
        first = int.from_bytes(named[:4], "big")
    strength = getattr(form, "strength", None)
    return Job(
        prompt=form.prompt,
        seeds=tuple(range(first, first + n)),
        num_inference_steps=form.num_inference_steps or info.num_inference_steps,
        height=height,
        width=width,
        strength=0.5 if strength is None else strength,
        partial_images=(getattr(form, "partial_images", None) or 0) if getattr(form, "stream", None) else 0,
    )


def notes_on(form: Form, info: ModelInfo, images: int = 1) -> list[str]:
    """Sentences on what this server does not do as OpenAI's would.

    Args:
        form: the validated request.
        info: the model's.
        images: how many came with it.
    """
    notes = []
    height, width = _size_of(form, info)
    if form.size not in (None, "auto", f"{width}x{height}"):
        notes.append(f"The model does not draw {form.size}; the picture has {width}x{height} pixels.")
    if idle := [name for name in WITHOUT_EFFECT if getattr(form, name, None) not in (None, "auto")]:
        notes.append(f"Without effect here: {', '.join(idle)}.")
    if getattr(form, "partial_images", None) and not getattr(form, "stream", None):
        notes.append("Partial images come only with stream.")
    if images > 1:
        notes.append(f"Of {images} images the first was used; this model starts from one.")
    return notes


def _size_of(form: Form, info: ModelInfo) -> tuple[int, int]:
    """(height, width) in pixels for a validated request: the model's own where it names none.

    A size that the model does not draw becomes the one of the nearest aspect ratio, and of these of the nearest area.
    """
    if form.size in (None, "auto"):
        return info.height, info.width
    width, height = (int(part) for part in str(form.size).split("x"))

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        taller, wider = math.log(size[0] / height), math.log(size[1] / width)
        return round(abs(wider - taller), 6), abs(wider + taller)

    return min(info.sizes, key=distance)
