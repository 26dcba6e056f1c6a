"""What schemathesis sends as a picture: it has no pictures of its own. Named by SCHEMATHESIS_HOOKS."""

from __future__ import annotations

import io
from typing import Any

import PIL.Image
import schemathesis
from hypothesis import strategies as st


def picture(kind: str, size: tuple[int, int], colour: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


sizes = st.tuples(st.integers(1, 60), st.integers(1, 60))
colours = st.sampled_from(["red", "white", "#123456"])
kinds = st.sampled_from(["PNG", "JPEG", "WEBP"])
schemathesis.openapi.format("binary", st.builds(picture, kinds, sizes, colours))


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """An empty list leaves nothing in a form, so the server cannot see what was wrong with it."""
    form = context.operation.path.endswith("/edits")
    return not (form and isinstance(body, dict) and any(value == [] for value in body.values()))
