"""Public-domain clip art as rows: a strict filter on its captions, a square view box cut to what is drawn."""

from __future__ import annotations

import gzip
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.icons.drawing import Pixels, rasterise
from recipes.icons.names import Namer
from recipes.icons.table import Icon
from recipes.icons.wordnet import WordNet

CREDIT = {"name": "Open Clip Art Library 0.18", "author": "see each file", "licence": "Public domain"}
_ROOT = Path("usr/share/openclipart/svg")
_MOST_BYTES = 400_000
# A longer drawing is kept as a picture of 128 px instead.
_MOST_SVG = 16_000
_SKIPPED = re.compile(
    r"^(shapes|special|unsorted/duplicates|logos|buttons|computer/icons|transportation/roadsigns|recreation/games/cards"
    r"|signs_and_symbols/(led|map_symbols|flags|warning|safety|dingbats|roadsigns)|computer/(networksym|connectors))"
)
_NO_TITLE = re.compile(
    r"clip ?art by|part of|theme|collection|untitled|layer|^svg|symbols?$|icons?$|^people$|gramastar|^card$", re.I
)
_NO_CAPTION = re.compile(
    r"\b(sexy|nude|naked|cm|cisco|sprint|dodge|tux|form|etiquette|various|unsorted|signs?|symbols?|aiga|mapsym|networksym"
    r"|sport|sports|hardware|landscapes?|pieces|contour|christianity|work|simple|part|pattern|border|corner|map|maps|people"
    r"|container|basic|layer|new|test|vector|svg|obligato|pie|tons|rib|mission|far|lente|norm|card figure|team|elfish"
    r"|peters|lcd|flourish|template|unknown|object|item|line art)\b"
)
_FILLER = re.compile(r"\b(clip ?art|clipart|stylized|symbol|icon|picture of|drawing of|image of)\b")
_FORBIDDEN = ("<image", "<text", "<flowRoot", "<script", "&ns_")
_UNITS = {"pt": 4 / 3, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0, "pc": 16.0}
_ROOT_ATTRIBUTES = re.compile(
    r'\s(width|height|viewBox|x|y|preserveAspectRatio|id|style|version|enable-background)="[^"]*"'
)


class _Unusable(Exception):
    """A file that is left out; its text is the reason."""


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float

    def square(self) -> _Box:
        side = max(self.width, self.height)
        return _Box(self.x - (side - self.width) / 2, self.y - (side - self.height) / 2, side, side)


def read_svg(path: Path) -> str:
    """The text of an SVG file, compressed or not."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) > _MOST_BYTES:
        raise _Unusable("too big")
    return data.decode("utf-8", "replace")


def cleaned(svg: str) -> str:
    """The drawing without comments, metadata and what editors leave in."""
    svg = re.sub(r"<\?xml.*?\?>|<!--.*?-->|<!DOCTYPE[^>\[]*(\[.*?\])?\s*>", "", svg, flags=re.S)
    svg = re.sub(r"<(metadata|sodipodi:namedview|sfw|i:pgf)\b[^>]*/>", "", svg)
    svg = re.sub(r"<(metadata|sodipodi:namedview|sfw|i:pgf)\b.*?</\1>", "", svg, flags=re.S)
    svg = re.sub(r'\s(sodipodi|inkscape):[\w-]+="[^"]*"', "", svg)
    svg = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", svg))
    return re.sub(r"(\.\d{3})\d+", r"\1", svg)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.S)
    return match.group(1).strip() if match else ""


def caption_words(title: str, stem: str) -> str:
    """The words for a file: its title, or the words of its file name where the title says nothing."""
    words = re.sub(r"\(.*?\)|\bby\b.*|[#\d]+| - .*", "", title).strip().lower()
    words = re.sub(r"\s+", " ", re.sub(r"[^a-z' ]+", " ", words).strip())
    if not words or _NO_TITLE.search(title) or len(words) > 60:
        tokens = [token for token in re.split(r"[^a-z]+", stem.lower()) if token]
        # File names end in the artist's name.
        words = " ".join(tokens[:-2] if len(tokens) > 3 else tokens)
    return re.sub(r"\s+", " ", _FILLER.sub("", words)).strip()


def _length(text: str) -> float | None:
    number = re.match(r"[\d.]+", text)
    if not number or "%" in text:
        return None
    return float(number.group(0)) * _UNITS.get(re.sub(r"[\d.\s]", "", text), 1.0)


def _view_box(tag: str) -> _Box:
    box = _found(r'\sviewBox="([^"]*)"', tag)
    try:
        values = [float(v) for v in re.split(r"[ ,]+", box)] if box else []
    except ValueError:
        values = []
    if not box:
        size = [_length(_found(rf'\s{name}="([^"]*)"', tag)) for name in ("width", "height")]
        values = [0.0, 0.0, *(v for v in size if v is not None)]
    if len(values) != 4 or not values[2] or not values[3]:
        raise _Unusable("no size")
    return _Box(*values)


def _drawn_part(pixels: Pixels) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of what is drawn, as shares of the side."""
    alpha = pixels[..., 3] > 8
    ys, xs = np.where(alpha)
    side = alpha.shape[0]
    if len(ys) < 75:
        raise _Unusable("blank")
    left, right, top, bottom = xs.min() / side, (xs.max() + 1) / side, ys.min() / side, (ys.max() + 1) / side
    width, height = right - left, bottom - top
    if max(width, height) / max(1e-6, min(width, height)) > 6:
        raise _Unusable("sliver")
    edges = [alpha[0].mean(), alpha[-1].mean(), alpha[:, 0].mean(), alpha[:, -1].mean()]
    if sum(edge > 0.25 for edge in edges) in (1, 2) and alpha.mean() < 0.9:
        raise _Unusable("cut by its page")
    return float(left), float(right), float(top), float(bottom)


def cropped(svg: str) -> tuple[str, bytes | None]:
    """The drawing in a square box around what it shows, and, where its text is long, a WebP of 128 px of it."""
    match = re.search(r"<svg\b[^>]*>", svg)
    if match is None:
        raise _Unusable("no root")
    tag = match.group(0)
    page = _view_box(tag).square()
    plain = _ROOT_ATTRIBUTES.sub("", tag)

    def boxed(box: _Box) -> str:
        values = f"{box.x:.6g} {box.y:.6g} {box.width:.6g} {box.height:.6g}"
        return svg.replace(tag, plain.replace("<svg", f'<svg viewBox="{values}"', 1), 1)

    try:
        left, right, top, bottom = _drawn_part(rasterise(boxed(page), 128))
        side = max(page.width, page.height)
        pad = 0.03 * max(right - left, bottom - top)
        x, y = page.x + (left - pad) * side, page.y + (top - pad) * side
        result = boxed(_Box(x, y, (right - left + 2 * pad) * side, (bottom - top + 2 * pad) * side).square())
        if len(result) <= _MOST_SVG:
            return result, None
        file = io.BytesIO()
        picture = Image.fromarray(rasterise(result, 256)).resize((128, 128), Image.Resampling.LANCZOS)
        picture.save(file, "WEBP", quality=88, method=6)
        return result, file.getvalue()
    except (ValueError, OverflowError) as error:
        raise _Unusable("cannot be drawn") from error


class ClipArt:
    """The rows of an unpacked `openclipart-svg`; `dropped` counts what was left out, by reason."""

    def __init__(self, folder: Path, namer: Namer, wordnet: WordNet):
        self.root = folder / _ROOT
        self.namer = namer
        self.wordnet = wordnet
        self.dropped: Counter[str] = Counter()

    def icons(self) -> Iterator[Icon]:
        """The drawings that have a caption, by path."""
        names = (
            os.path.join(folder, name) for folder, _, files in os.walk(self.root) for name in files if ".svg" in name
        )
        for path in sorted(os.path.relpath(name, self.root) for name in names):
            try:
                yield self._icon(path)
            except _Unusable as reason:
                self.dropped[f"openclipart: {reason}"] += 1

    def _icon(self, path: str) -> Icon:
        folder = os.path.dirname(path) or "."
        if _SKIPPED.match(folder):
            raise _Unusable("folder")
        text = read_svg(self.root / path)
        licence = _found(r'<(?:cc:)?license[^>]*rdf:resource="([^"]*)"', text)
        if "PublicDomain" not in licence and "publicdomain" not in licence:
            raise _Unusable("licence")
        svg = cleaned(text)
        if any(mark in svg for mark in _FORBIDDEN):
            raise _Unusable("text or bitmap inside")
        stem = os.path.basename(path).split(".")[0]
        words = caption_words(_found(r"<dc:title>(.*?)</dc:title>", text), stem)
        tokens = words.split()
        if not 0 < len(tokens) <= 7 or not all(map(self.namer.known, tokens)) or _NO_CAPTION.search(words):
            raise _Unusable("caption")
        name = self.namer.analyse("-".join(tokens))
        if name.junk:
            raise _Unusable(f"caption {name.junk}")
        subjects = [subject.strip() for subject in re.findall(r"<rdf:li>(.*?)</rdf:li>", text, re.S)]
        keywords = [
            s.lower() for s in subjects if re.fullmatch(r"[A-Za-z][A-Za-z _\-]+", s) and "hash" not in s.lower()
        ]
        drawing, picture = cropped(svg)
        return Icon(
            id=f"openclipart:{path}",
            set="openclipart",
            style="clip art",
            licence="Public-Domain",
            name=words,
            phrase=name.phrase,
            concept=self.wordnet.concept(name.base),
            group=folder.replace("_", " "),
            palette=True,
            source="clipart",
            keywords=list(dict.fromkeys(keywords))[:10],
            lex=name.lex,
            svg=drawing if picture is None else None,
            img=picture,
        )
