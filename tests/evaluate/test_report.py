from __future__ import annotations

import base64
import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestill.bench.machine import machine_in_words, versions
from onestill.errors import DataError, OutputError
from onestill.evaluate import Contender, Evaluation, Protocol, evaluate
from onestill.evaluate.report import sheets
from onestill.evaluate.report.charts import Point, Series, line_chart
from onestill.evaluate.report.model import About, Report, Target, Tried
from onestill.evaluate.report.page import write_report
from tests.evaluate.shapes import KINDS, NAMES, Painter, colour_network

VOID = {"meta", "link", "img", "line", "polyline", "circle", "br"}
PROMPTS = tuple(f"a {colour} {kind} <b>&" for colour in NAMES for kind in KINDS)


class Checker(HTMLParser):
    """Every element is closed in order; ids are unique; nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.links += [str(found[name]) for name in ("href", "src") if found.get(name)]
        if tag == "img":
            self.images.append(found)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    painter = Painter()
    protocol = Protocol(
        prompts=PROMPTS,
        seeds=tuple(range(len(PROMPTS))),
        sheets={"compare": (0, 7, 30), "styles": (3, 7)},
        num_worst=3,
        num_diversity_prompts=2,
    )
    contenders = [
        Contender("student, 1 step", Painter(mistakes=0.2), 1, group="student"),
        Contender("teacher, 1 step", Painter(mistakes=0.7), 1, 3.0, "teacher"),
        Contender("teacher, 50 steps", painter, 50, 3.0, "teacher"),
    ]
    folder = tmp_path_factory.mktemp("work")
    real = painter(PROMPTS, [1000 + i for i in range(len(PROMPTS))])
    networks = [colour_network(), colour_network("other")]
    return evaluate(contenders, protocol, [real], networks, folder, floor=[real[::-1]])


def report(evaluation: Evaluation) -> Report:
    about = About(
        "A <title>",
        "A lead & more.",
        {"prompts": "40"},
        "python -m it --x 'a b'",
        7,
        machine_in_words(),
        versions(),
        ("A caveat.",),
    )
    one = "student, 1 step"
    shown = {
        "compare": sheets.side_by_side(evaluation, "compare", "Side by side", "text"),
        "styles": sheets.beside_real(evaluation, "styles", one, "Styles", "text"),
        "seeds": sheets.several_seeds(evaluation, [one, "teacher, 50 steps"], "Seeds", "text"),
        "colours": sheets.colour_sheet(evaluation, one, "Colours", "text"),
        "failures": sheets.failures(evaluation, one, "Failures", "text"),
    }
    targets = [
        Target("ratio", "1.1x", "at most 1.25x", True),
        Target("colours", "70 %", "at least 80 %", False, "by 10"),
    ]
    tried = [Tried("Guidance", "text", ("guidance", "Fréchet distance"), (("1", "3.2"), ("2", "2.9")))]
    return Report(about, evaluation, targets, shown, tried, hero=one)


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path, evaluation: Evaluation) -> None:
    page = write_report(report(evaluation), tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    inside = {link for link in checker.links if link.startswith(("data:", "#"))}
    assert set(checker.links) - inside == {"report.json"}
    assert {link[1:] for link in checker.links if link.startswith("#")} <= set(checker.ids)
    assert not re.search(r"https?://", text)
    assert "<b>&" not in text
    assert "prefers-color-scheme: dark" in text
    # 3 in the head, 3 x 4 side by side, 2 x 2 styles, 2 x 2 x 4 seeds, 100 colours, 3 failures
    assert len(checker.images) == 3 + 12 + 4 + 16 + 100 + 3
    assert all(image["alt"] for image in checker.images)
    assert sorted(path.name for path in page.parent.iterdir()) == ["index.html", "report.json"]


def test_pictures_are_the_drawn_ones(tmp_path: Path, evaluation: Evaluation) -> None:
    checker = Checker()
    checker.feed(write_report(report(evaluation), tmp_path).read_text(encoding="utf-8"))
    data = str(checker.images[0]["src"]).removeprefix("data:image/webp;base64,")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), np.float64)
    assert np.abs(picture - evaluation.pictures("student, 1 step").kept[0]).mean() < 6


def test_the_json_has_every_figure(tmp_path: Path, evaluation: Evaluation) -> None:
    write_report(report(evaluation), tmp_path)
    facts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [result["name"] for result in facts["results"]] == [result.name for result in evaluation.results]
    assert facts["results"][0]["frechet_distance"]["value"] == evaluation.results[0].frechet_distance.value
    assert facts["targets"][1]["met"] is False
    assert facts["about"]["seed"] == 7
    assert facts["floor_frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert facts["about"]["versions"]["numpy"] == np.__version__
    assert {"processor", "cores", "system"} <= set(facts["about"]["machine"])


def test_misses_of_the_colour_test_are_flagged(evaluation: Evaluation) -> None:
    sheet = sheets.colour_sheet(evaluation, "teacher, 1 step", "", "")
    flagged = sum(cell.flag for row in sheet.rows for cell in row.cells)
    accuracy = evaluation.result("teacher, 1 step").colour
    assert accuracy is not None
    assert flagged == round(100 * (1 - accuracy.value))
    assert len(sheet.rows) == 25


def test_unknown_sheets_and_folders_are_one_sentence(tmp_path: Path, evaluation: Evaluation) -> None:
    with pytest.raises(DataError, match="it has: compare, styles"):
        sheets.side_by_side(evaluation, "colors", "", "")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another folder"):
        write_report(report(evaluation), tmp_path / "file")


def test_a_report_can_be_bare(tmp_path: Path, evaluation: Evaluation) -> None:
    bare = Report(report(evaluation).about, replace(evaluation, floor=None))
    checker = Checker()
    checker.feed(write_report(bare, tmp_path).read_text(encoding="utf-8"))
    assert checker.open == []
    assert checker.images == []


@pytest.mark.parametrize("log_y", [True, False])
def test_charts_keep_their_points_inside_and_their_names_apart(log_y: bool) -> None:
    series = [
        Series("a", tuple(Point(x, 10 / x, 5 / x, 12 / x) for x in (1, 2, 4, 25, 50)), "red"),
        Series("b", (Point(1, 0.2),), "blue"),
        Series("c", (Point(1, 0.2), Point(50, 0.21)), "green"),
    ]
    svg = line_chart(series, title="t & t", x_label="steps", reference=("real", 0.2), log_y=log_y)
    ys = [float(y) for y in re.findall(r'cy="([\d.-]+)"', svg)]
    assert len(ys) == 8
    assert all(0 <= y <= 330 for y in ys)
    assert len(re.findall(r'class="tick"[^>]*text-anchor="end"', svg)) >= 3
    names = sorted(float(y) for y in re.findall(r'class="name" x="[\d.]+" y="([\d.-]+)"', svg))
    assert len(names) == 4
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(names))
    Checker().feed(svg)


def test_a_chart_of_one_value_is_drawn() -> None:
    assert "cy=" in line_chart([Series("a", (Point(1, 3.0),), "red")], title="t", x_label="x")
    assert "cy=" in line_chart([Series("a", (Point(1, 3.0),), "red")], title="t", x_label="x", log_y=True)
