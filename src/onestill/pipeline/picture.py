"""Pictures in and out: any picture fitted to a model's size, and files that carry what they were drawn from."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from onestill.checkpoint import written_whole
from onestill.errors import ImageError, OutputError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
EXIF_DESCRIPTION = 0x010E
EXIF_ORIENTATION = 0x0112
TRANSPOSITIONS = dict(
    enumerate((0, 3, 1, 5, 4, 6, 2), 2)
)  # EXIF's orientations -> Pillow's transpositions; 1 is upright
TURNED_BY = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow finds an orientation
MOST_EXIF_BYTES = 65_000  # of text in a JPEG, whose segments hold 65,533
MOST_VALUE_BYTES = 20_000  # of a prompt where both would not fit into that


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
    names = {"num_inference_steps": "Steps", "guidance_scale": "CFG scale", "strength": "Denoising strength"}
    most = None if kind != "JPEG" or sum(map(len, metadata.values())) * 4 < MOST_EXIF_BYTES else MOST_VALUE_BYTES
    metadata = {name: _storable(value, most) for name, value in metadata.items()}
    rest = {names.get(name, name.capitalize()): value for name, value in metadata.items() if name != "prompt"}
    parameters = metadata["prompt"] + "\n" + ", ".join(f"{name}: {value}" for name, value in rest.items())
    if kind == "PNG":
        fields = PngInfo()
        for name, value in {**metadata, "parameters": parameters}.items():
            fields.add_text(name, value)
        return {"pnginfo": fields}
    exif = PIL.Image.Exif()
    # As bytes, as Pillow would put a question mark for what is not ASCII.
    exif[EXIF_DESCRIPTION] = parameters.encode()[: MOST_EXIF_BYTES if most else None]
    return {"exif": exif, "quality": quality}


def _storable(text: str, most_bytes: int | None) -> str:
    """A text as files can hold it: of valid Unicode, without NUL, and cut where it has more bytes than that."""
    data = text.encode(errors="replace").replace(b"\0", b" ")
    if most_bytes is None or len(data) <= most_bytes:
        return data.decode()
    return data[:most_bytes].decode(errors="ignore") + "…"


def read_picture(source: str | os.PathLike[str] | bytes) -> Image:
    """The picture in a file or its bytes: upright, RGB, on white where transparent.

    Raises:
        ImageError: it is damaged, of no known kind, or too large to be opened safely.
        OSError: the file is not there, or may not be read.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with PIL.Image.open(io.BytesIO(data)) as picture:
            return on_white(upright(picture))
    except (ImageError, MemoryError):
        raise
    except PIL.UnidentifiedImageError as error:
        raise ImageError("its image is of no known kind") from error
    except Exception as error:  # Pillow's decoders raise anything on damaged bytes
        raise ImageError(f"its image cannot be read: {str(error) or type(error).__name__}") from error


def fitted(image: Image | NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A picture as uint8 [height, width, 3]: upright, on white where transparent, its longer sides cut evenly."""
    try:
        picture = cut_to(on_white(as_upright(image)), height, width)
    except MemoryError:
        raise
    except Exception as error:  # Pillow decodes only now, and raises anything on damaged bytes
        raise ImageError(f"The image cannot be used ({error}); give a PIL image or uint8 [H, W, 3].") from error
    return np.asarray(picture, dtype=np.uint8)


def as_upright(image: Image | NDArray[np.uint8]) -> Image:
    """A picture or an array as an upright picture."""
    return PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else upright(image)


def cut_to(picture: Image, height: int, width: int) -> Image:
    """A picture of this size, its longer sides cut evenly."""
    if picture.size == (width, height):
        return picture
    return PIL.ImageOps.fit(picture, (width, height), PIL.Image.Resampling.LANCZOS)


def upright(picture: Image) -> Image:
    """A picture turned as its EXIF or XMP says; where those are damaged it stays as it is.

    Pillow's own `exif_transpose` also writes the rest of the EXIF anew, which fails on what it could read.
    """
    picture.load()  # which turns a TIFF
    try:
        turn = TRANSPOSITIONS.get(picture.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # of EXIF that is no EXIF
        return picture
    if turn is None:
        return picture
    turned = picture.transpose(PIL.Image.Transpose(turn))
    for name in TURNED_BY:  # so that nobody turns it again
        turned.info.pop(name, None)
    return turned


def on_white(picture: Image) -> Image:
    """A picture of any mode as RGB, on white where it is transparent.

    Raises:
        ImageError: its numbers do not say what is white.
    """
    if picture.mode.startswith("I;16"):  # which Pillow cuts off at 255
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):  # likewise
        picture = PIL.Image.fromarray(_in_bytes(np.asarray(picture)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _in_bytes(numbers: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey of 32 bits as bytes: whole numbers are of 8 bits or of 16, others from 0 to 1."""
    low, high = numbers.min(), numbers.max()
    if low >= 0 and high <= 1 and numbers.dtype.kind == "f":
        return np.asarray(np.rint(numbers * 255), np.uint8)
    if low >= 0 and high <= 65535 and np.isfinite(high) and (numbers == np.rint(numbers)).all():
        return np.asarray(numbers if high <= 255 else numbers.astype(np.int32) >> 8, np.uint8)
    raise ImageError(f"its numbers go from {low:g} to {high:g}, which does not say what is white: save it with 8 bits")
