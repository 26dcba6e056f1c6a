"""Pictures in and out: any picture fitted to a model's size, and files that carry what they were drawn from."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from onestill.checkpoint import written_whole
from onestill.errors import ImageError, OutputError

__all__ = ["cut_to", "fitted", "on_white", "picture_bytes", "save_picture", "upright", "upright_size"]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
EXIF_DESCRIPTION = 0x010E
MOST_EXIF_TEXT = 24_000  # bytes of one text: a JPEG's EXIF data have 65,533, for a prompt and a negative one
LYING = (5, 6, 7, 8)  # EXIF's orientations that exchange width and height


def save_picture(
    image: Image, path: str | os.PathLike[str], metadata: Mapping[str, str], *, force: bool = False
) -> Path:
    """Save an image with what it was drawn from: a PNG's text fields, or the description of a JPEG or WebP.

    The file appears whole or not at all. Its field `parameters` has the form that other tools read.

    Args:
        image: RGB.
        path: ends in .png, .jpg, .jpeg or .webp; its folder is made where there is none.
        metadata: name -> text, with at least `prompt` and `seed`.
        force: replace a file that exists.

    Raises:
        OutputError: the file exists and `force` is not set, cannot be written, or is of another kind.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise OutputError(f"'{target}' does not end in {', '.join(FORMATS)}; choose one of those.")
    try:
        with written_whole(target, replace=force) as unfinished, unfinished.open("xb") as file:
            file.write(picture_bytes(image, FORMATS[target.suffix.lower()], metadata))
    except OSError as error:
        if isinstance(error, FileExistsError) and os.path.lexists(target):
            raise OutputError(f"'{target}' exists; choose another name, or replace it with force.") from error
        raise OutputError(f"'{target}' cannot be written: {error.strerror or error}; choose another place.") from error
    return target


def picture_bytes(image: Image, kind: str, metadata: Mapping[str, str], *, quality: int = 95) -> bytes:
    """An image as a file of a kind, with what it was drawn from, as in `save_picture`.

    Args:
        image: RGB.
        kind: "PNG", "JPEG" or "WEBP".
        metadata: name -> text, with at least `prompt`.
        quality: 0 to 100, of a JPEG or WebP.
    """
    file = io.BytesIO()
    image.save(file, kind, **_embedded(kind, metadata, quality))
    return file.getvalue()


def _embedded(kind: str, metadata: Mapping[str, str], quality: int) -> dict[str, Any]:
    if kind == "JPEG":
        metadata = {name: _cut(value) for name, value in metadata.items()}
    names = {"num_inference_steps": "Steps", "guidance_scale": "CFG scale", "strength": "Denoising strength"}
    rest = {names.get(name, name.capitalize()): value for name, value in metadata.items() if name != "prompt"}
    parameters = metadata["prompt"] + "\n" + ", ".join(f"{name}: {value}" for name, value in rest.items())
    if kind == "PNG":
        fields = PngInfo()
        for name, value in {**metadata, "parameters": parameters}.items():
            fields.add_text(name, value)
        return {"pnginfo": fields}
    exif = PIL.Image.Exif()
    exif[EXIF_DESCRIPTION] = parameters.encode()  # Pillow would put a question mark for what is not ASCII
    return {"exif": exif, "quality": quality}


def _cut(text: str) -> str:
    """A text that fits into a JPEG's EXIF data."""
    data = text.encode()
    return text if len(data) <= MOST_EXIF_TEXT else data[:MOST_EXIF_TEXT].decode(errors="ignore") + "…"


def fitted(image: Image | NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A picture as uint8 [height, width, 3]: upright, on white where transparent, its longer sides cut evenly."""
    try:
        picture = cut_to(on_white(upright(image)), height, width)
    except (AttributeError, OSError, TypeError, ValueError, SyntaxError) as error:
        raise ImageError(f"The image cannot be used ({error}); give a PIL image or uint8 [H, W, 3].") from error
    return np.asarray(picture, dtype=np.uint8)


def upright(image: Image | NDArray[np.uint8]) -> Image:
    """A picture or an array as a picture, turned as its EXIF data says."""
    return PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else PIL.ImageOps.exif_transpose(image)


def upright_size(image: Image | NDArray[np.uint8]) -> tuple[int, int]:
    """The (width, height) of `upright`, without decoding a pixel."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    width, height = image.size
    return (height, width) if image.getexif().get(PIL.ExifTags.Base.Orientation) in LYING else (width, height)


def cut_to(picture: Image, height: int, width: int) -> Image:
    """A picture of this size, its longer sides cut evenly."""
    if picture.size == (width, height):
        return picture
    return PIL.ImageOps.fit(picture, (width, height), PIL.Image.Resampling.LANCZOS)


def on_white(picture: Image) -> Image:
    """A picture of any mode as RGB, on white where it is transparent."""
    if picture.mode.startswith("I;16"):  # which Pillow cuts off at 255
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
