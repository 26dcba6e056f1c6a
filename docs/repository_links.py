"""A hook of MkDocs: links from a page to files outside `docs/` lead to the repository.

On the repository's own pages such links work as they stand; the site holds `docs/` alone. A link to a file that does
not exist stops a strict build.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")
LOG = logging.getLogger("mkdocs.hooks.repository_links")  # warnings under this name count in a strict build


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace the page's links to files of the repository by addresses; called by MkDocs for each page."""
    source = Path(page.file.abs_src_path)

    def address(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        if target.is_relative_to(config.docs_dir):
            return match[0]
        if not (target.is_relative_to(ROOT) and target.exists()):
            LOG.warning("%s links to '%s', which does not exist", page.file.src_uri, match[1])
            return match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(ROOT).as_posix()}"

    return OUTSIDE.sub(address, markdown)
