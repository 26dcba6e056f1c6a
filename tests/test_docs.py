"""The documentation against the repository: paths, links, commands and versions that it names exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import onestill

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/*/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "LOG.md"  # a log names what there was
)
# Paths from the root, or from the package; NAME, * and <...> stand for something that the reader chooses.
NAMED = re.compile(r"(?<![\w./-])(?:src|tests|docs|recipes|benchmarks|deploy|requirements|\.ci)/[\w./*-]+")
INSIDE = re.compile(r"(?<![\w./-])(?:train|serve|engine|evaluate|networks|data)/[\w/]+\.py")
MADE = ("recipes/icons/report/", "recipes/ablations/report/")  # written by a command; a version may lack them
DRAWING = ROOT / "docs/assets/how-it-works.svg"
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, DRAWING], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {name.rstrip("./") for name in NAMED.findall(text) if "NAME" not in name}
    missing = {
        name for name in named if not name.startswith(MADE) and not any(ROOT.glob(name)) and not (ROOT / name).exists()
    }
    missing |= {name for name in INSIDE.findall(text) if not (ROOT / "src/onestill" / name).is_file()}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_the_readme_and_ci_run_the_same_tests() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^pip install -c requirements/ci\.txt -e '\.\[test\]' && (pytest .+)$", readme, re.MULTILINE)
    assert command is not None
    assert f"check {command[1]} " in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_the_changelog_dates_the_versions_that_ship() -> None:
    package, model = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("## The model `icons`\n")
    manifest = json.loads((ROOT / "src/onestill/models/icons/onestill.json").read_text(encoding="utf-8"))
    for part, version in ((package, onestill.__version__), (model, manifest["version"])):
        assert re.search(rf"^### {re.escape(version)} - \d{{4}}-\d\d-\d\d$", part, re.MULTILINE), version


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {onestill.__version__}\n" in citation
