"""Building the icon table from a small WordNet, a small Iconify package and drawings, laid out as the real ones are."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recipes.icons import fetch, packages
from recipes.icons.clipart import ClipArt, caption_words
from recipes.icons.collect import _largest
from recipes.icons.emoji import EmojiNames
from recipes.icons.iconify import Iconify
from recipes.icons.looks import looks_of, near_copies
from recipes.icons.names import Namer, strip_style
from recipes.icons.notice import notice
from recipes.icons.sets import COLOUR, EMOJI, FLAGS, MONO
from recipes.icons.splits import held_concepts, name_concepts, split
from recipes.icons.table import Icon, write_table
from recipes.icons.vocabulary import BRAND_SETS
from recipes.icons.wordnet import WordNet

# word -> offsets of its senses; offset -> number of its kind (6 artifact, 5 animal, 10 communication, 25 shape).
NOUNS = {
    "bus": ["001"],
    "coach": ["001"],
    "cat": ["002"],
    "house": ["003"],
    "bell": ["004"],
    "idea": ["005"],
    "user": ["006"],
    "banana": ["007"],
    "knife": ["008"],
    "fork": ["009"],
    "file_folder": ["010"],
    "folder": ["010"],
}
KINDS = {"001": 6, "002": 5, "003": 6, "004": 6, "005": 9, "006": 18, "007": 13, "008": 6, "009": 6, "010": 6}


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> WordNet:
    folder = tmp_path_factory.mktemp("wordnet")
    (folder / "dict").mkdir()
    licence = "  1 This software and database is being provided to you\n"
    data = "".join(f"{offset} {kind:02d} n 01 word 0 000\n" for offset, kind in KINDS.items())
    index = "".join(f"{word} n {len(senses)} 0 1 0 {' '.join(senses)}\n" for word, senses in NOUNS.items())
    (folder / "dict" / "data.noun").write_text(licence + data)
    (folder / "dict" / "index.noun").write_text(licence + index)
    for part, words in (("verb", "align"), ("adj", "red"), ("adv", "plus")):
        (folder / "dict" / f"index.{part}").write_text(f"{licence}{words} x 1\n")
    return WordNet(folder)


@pytest.fixture(scope="module")
def iconify(tmp_path_factory: pytest.TempPathFactory) -> Iconify:
    folder = tmp_path_factory.mktemp("iconify")
    (folder / "json").mkdir()
    info = {"name": "Set", "author": {"name": "Ann"}, "license": {"spdx": "MIT", "url": "a-link"}}
    square = {"body": '<path fill="currentColor" d="M2 2h12v12H2z"/>'}

    def write(name: str, icons: dict[str, object], **more: object) -> None:
        text = json.dumps({"prefix": name, "info": info, "icons": icons, **more})
        (folder / "json" / f"{name}.json").write_text(text)

    for name in BRAND_SETS:
        write(name, {"acmecorp": square, "cat": square, "acmecorp-icon": square})
    aliases = {"bus-alt": {"parent": "bus"}, "sub": {"parent": "bus", "rotate": 2}, "coach": {"parent": "bus"}}
    write(
        "plain",
        {"bus": square, "old": {**square, "hidden": True}, "wide": {**square, "width": 32, "height": 16}},
        aliases=aliases,
        categories={"Transport": ["bus"], "Late": ["bus", "wide"]},
        suffixes={"": "Line", "filled": "Filled"},
    )
    for name in ("noto", "twemoji", "openmoji", "fluent-emoji-flat", "fluent-emoji-high-contrast"):
        write(name, {"bus": square}, chars={"1f68c": "bus"})
    return Iconify(folder)


@pytest.fixture(scope="module")
def namer(wordnet: WordNet, iconify: Iconify) -> Namer:
    return Namer(wordnet, iconify)


def icon(concept: str, style: str, number: int = 0, **more: object) -> Icon:
    values = {
        "id": f"{style}:{concept}-{number}",
        "set": style,
        "style": style,
        "licence": "MIT",
        "name": concept,
        "phrase": concept,
        "concept": concept,
        "group": "objects",
        "palette": False,
        "source": "interface",
        "svg": '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path d="M4 4h9v9H4z"/></svg>',
    }
    return Icon(**(values | more))  # type: ignore[arg-type]


def test_wordnet(wordnet: WordNet) -> None:
    assert wordnet.lexnames("cat") == ["noun.animal"]
    assert wordnet.singular("buses") is None
    assert wordnet.singular("bells") == "bell"
    assert wordnet.singular("mice") == "mouse"
    assert wordnet.concept("bus") == wordnet.concept("coach") == "@001"
    assert wordnet.concept("idea") == "idea"
    assert wordnet.concept("file folders") == "@010"


def test_iconify(iconify: Iconify) -> None:
    assert list(iconify.visible("plain")) == ["bus", "wide"]
    assert 'viewBox="0 -8 32 32"' in iconify.svg("plain", "wide")
    assert 'viewBox="0 0 16 16"' in iconify.svg("plain", "bus")
    assert iconify.categories("plain") == {"bus": "Transport", "wide": "Late"}
    assert iconify.aliases("plain") == {"bus": ["bus-alt", "coach"]}
    assert iconify.attribution("plain") == {"name": "Set", "author": "Ann", "licence": "MIT", "url": "a-link"}


@pytest.mark.parametrize(
    ("icon_set", "name", "core"),
    [
        ("plain", "bus-filled", "bus"),
        ("plain", "bus-duotone", "bus"),
        ("plain", "bus-2", "bus"),
        ("plain", "dice-2", "dice-2"),
        ("plain", "green-light", "green-light"),
        ("lets-icons", "house-light", "house"),
        ("plain", "bell-outline-24", "bell"),
    ],
)
def test_style_words_are_stripped(icon_set: str, name: str, core: str) -> None:
    assert strip_style(icon_set, name, ["", "filled"], []) == core


@pytest.mark.parametrize(
    ("core", "phrase", "junk"),
    [
        ("bus", "bus", ""),
        ("bell-off", "crossed-out bell", ""),
        ("house-plus", "house with a plus sign", ""),
        ("catbus", "cat bus", ""),
        ("knife-fork-red", "knife fork red", ""),
        ("house-up", "house with an arrow pointing up", ""),
        ("align-up", "align with an arrow pointing up", "abstract"),
        ("idea", "idea", "abstract"),
        ("acmecorp", "acmecorp", "brand"),
        ("house-logo", "house logo", "brand"),
        ("letter-a", "letter a", "alnum"),
        ("qzx-wvx", "qzx wvx", "unknown"),
    ],
)
def test_names_become_phrases(namer: Namer, core: str, phrase: str, junk: str) -> None:
    name = namer.analyse(core)
    assert (name.phrase, name.junk) == (phrase, junk)


def test_only_so_many_words_are_split(namer: Namer) -> None:
    assert namer.split("catbushouse", 2) == ["catbushouse"]
    assert namer.split("catbushouse", 4) == ["cat", "bus", "house"]


def test_emoji_names(tmp_path: Path, iconify: Iconify) -> None:
    base, more = tmp_path / "base", tmp_path / "more"
    (base / "en").mkdir(parents=True)
    (more / "dist").mkdir(parents=True)
    tone = {"hexcode": "1F44B-1F3FD", "label": "waving hand: medium skin tone", "tone": 3}
    data = [
        {"hexcode": "1F68C", "label": "bus", "tags": ["vehicle"], "group": 5, "subgroup": 9},
        {"hexcode": "1F44B", "label": "waving hand", "group": 5, "subgroup": 9, "skins": [tone]},
        {"hexcode": "1F1F5-1F1EA", "label": "flag: Peru", "group": 5, "subgroup": 9},
    ]
    (base / "en" / "data.json").write_text(json.dumps(data))
    messages = {"groups": [{"order": 5, "message": "travel"}], "subgroups": [{"order": 9, "message": "road"}]}
    (base / "en" / "messages.json").write_text(json.dumps(messages))
    (more / "dist" / "emoji-en-US.json").write_text(json.dumps({"\U0001f68c": ["public_transport"]}))
    names = EmojiNames(base, more, iconify)
    bus = names.resolve("noto", "bus", names.codes_of("noto"))
    assert bus is not None
    assert (bus.code, bus.group, bus.keywords) == ("1F68C", "travel / road", ("vehicle", "public transport"))
    waving = names.resolve("emojione", "waving-hand-medium-skin-tone", {})
    assert waving is not None
    assert (waving.tones, waving.base, waving.phrase) == ((3,), "1F44B", "waving hand")
    peru = names.flag("pe")
    assert peru is not None
    assert peru.phrase == "flag of peru"
    assert names.flag("zz") is None
    assert names.resolve("noto", "nothing-like-it", {}) is None


def test_the_largest_size_is_taken() -> None:
    names = ["bus-16-filled", "bus-24-filled", "bus-20-regular", "odd"]
    assert _largest(names, r"(?P<what>.*)-(?P<size>\d+)-(?P<style>filled|regular)") == [
        "bus-24-filled",
        "bus-20-regular",
    ]


def test_styles_by_rule() -> None:
    assert MONO["ph"]("bus-bold") is None
    assert MONO["ph"]("bus") == "outline"
    assert MONO["solar"]("bus-line-duotone") is None
    assert MONO["solar"]("bus-bold-duotone") == "duotone"
    assert MONO["healthicons"]("bus-outline-24px") is None
    assert not set(MONO) & set(COLOUR) | set(EMOJI) & set(FLAGS)


def drawing(path: str, colour: str = "#000") -> str:
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">'
    return f'{head}<path fill="{colour}" d="{path}"/></svg>'


def test_near_copies_and_colours() -> None:
    blot = "M3 2l9 3 9-1-2 9 3 7-9-3-8 4 1-9-2-5z"
    close = "M3 2.1l9 3 9-1-2 9 3 7-9-3-8 4 1-9-2-5z"
    icons = [
        icon("cat", "a", svg=drawing(blot)),
        icon("cat", "b", svg=drawing(close)),
        icon("bus", "a", svg=drawing("M2 6h20v9H2zM4 15h4v4H4z")),
        icon("cat", "c", palette=True, source="emoji", hex="1", svg=drawing(blot, "#da282d")),
        icon("cat", "d", palette=True, source="emoji", hex="2", svg=drawing(close, "#da282d")),
        icon("cat", "e", palette=True, source="emoji", hex="1", svg=drawing(close, "#da282d")),
    ]
    looks = [looks_of(i) for i in icons]
    found = [look for look in looks if look is not None]
    assert len(found) == len(icons)
    assert found[3].colours == ["red"]
    assert found[0].colours == []
    assert near_copies(icons, found, block=2) == [-1, 0, -1, -1, -1, 3]
    assert looks_of(icon("cat", "f", svg=drawing("M0 0"))) is None
    assert looks_of(icon("cat", "f", svg="<svg ")) is None


def test_splits_hold_concepts_and_styles_out(wordnet: WordNet) -> None:
    styles = [f"style {i}" for i in range(6)]
    icons = [icon(concept, style) for concept in ("bus", "cat", "house", "banana", "bell", "knife") for style in styles]
    icons += [icon("cat", "outline", 1, phrase="banana cat"), icon("cat", "outline", 2, phrase="two bananas")]
    icons += [icon("fork", style, keywords=["banana split", "cutlery"]) for style in styles]
    split(icons, wordnet, ["banana"])
    by_split: dict[str, set[tuple[str, str]]] = {}
    for i in icons:
        by_split.setdefault(i.split, set()).add((i.concept, i.style))
        assert ("banana" in i.phrase) == (i.split == "concept")
        if i.split != "concept":
            assert not any("banana" in keyword for keyword in i.keywords)
    held = Counter(concept for concept, _ in by_split["style"])
    assert set(held.values()) == {1}
    assert set(held) == {"bus", "cat", "house", "bell", "knife", "fork"}
    for i in icons:
        if i.split == "train":
            assert (i.concept, i.style) not in by_split["style"]


def test_synonyms_share_a_concept(wordnet: WordNet) -> None:
    icons = [
        icon("@001", "a", phrase="coach"),
        icon("@001", "b", phrase="bus"),
        icon("bus", "c", phrase="bus", source="emoji"),
    ]
    name_concepts(icons, wordnet)
    assert [i.concept for i in icons] == ["bus", "bus", "bus"]


def test_the_committed_holdout_list() -> None:
    concepts = held_concepts()
    assert len(concepts) == len(set(concepts)) == 120


def test_clip_art(tmp_path: Path, namer: Namer, wordnet: WordNet) -> None:
    root = tmp_path / "usr/share/openclipart/svg"
    meta = (
        "<metadata><dc:title>{title}</dc:title><rdf:li>pet</rdf:li>"
        '<cc:license rdf:resource="web/{licence}"/></metadata>'
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="10cm" height="5cm">'
    body = '<path fill="#c33" d="M100 40h150v100H100z"/>'
    files = {
        "animals/good.svg": (meta.format(title="Red Cat", licence="PublicDomain"), body),
        "animals/licence.svg": (meta.format(title="Red Cat", licence="by-sa"), body),
        "animals/words.svg": (meta.format(title="Qzxwv", licence="PublicDomain"), body),
        "animals/text.svg": (meta.format(title="Cat", licence="PublicDomain"), "<text>cat</text>"),
        "animals/blank.svg": (meta.format(title="Cat", licence="PublicDomain"), ""),
        "shapes/cat.svg": (meta.format(title="Cat", licence="PublicDomain"), body),
    }
    for name, (about, drawn) in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"<?xml version='1.0'?>\n{head}{about}{drawn}</svg>")
    art = ClipArt(tmp_path, namer, wordnet)
    (row,) = art.icons()
    assert (row.id, row.phrase, row.concept) == ("openclipart:animals/good.svg", "red cat", "red cat")
    assert row.keywords == ["pet"]
    assert row.svg is not None
    assert "<metadata" not in row.svg
    x, y, width, height = (float(v) for v in re.findall(r'viewBox="([^"]*)"', row.svg)[0].split())
    assert width == height
    assert (x + width / 2, y + height / 2) == pytest.approx((175, 90), abs=3)
    assert sorted(art.dropped) == [
        f"openclipart: {reason}" for reason in ("blank", "caption", "folder", "licence", "text or bitmap inside")
    ]


def test_clip_art_captions() -> None:
    assert caption_words("Red Cat (remix) by Ann", "x") == "red cat"
    assert caption_words("clip art by Ann", "grey_cat_ann_01_") == "grey cat ann"
    assert caption_words("", "old_red_bus_ann_lee_01") == "old red bus"


def test_the_table_is_written_in_order(tmp_path: Path) -> None:
    icons = [icon("b", "mono"), icon("a", "mono"), icon("c", "paint", palette=True, colors=["red"])]
    credit = {name: {"name": name, "author": "Ann", "licence": "MIT"} for name in ("mono", "paint")}
    random.Random(0).shuffle(icons)
    write_table(icons, credit, tmp_path / "icons.parquet")
    rows = pq.read_table(tmp_path / "icons.parquet").to_pylist()
    assert [r["id"] for r in rows] == ["paint:c-0", "mono:a-0", "mono:b-0"]
    assert [r["recolour"] for r in rows] == [False, True, True]
    text = notice("# Icons\n", credit, {"mono": 2, "paint": 1})
    assert "| mono | mono | Ann | MIT | 2 |" in text


def test_a_built_table_is_taken_only_if_it_is_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "icons.parquet"
    file.write_bytes(b"something else")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(fetch.DataError, match=r"has the SHA-256 .*, not 03721a38cfda"):
        fetch.take_parquet(file, out)
    assert list(out.iterdir()) == []
    with pytest.raises(fetch.DataError, match="There is no file"):
        fetch.take_parquet(tmp_path / "none.parquet", out)
    monkeypatch.setattr(fetch, "PARQUET_SHA256", fetch.sha256_of(file))
    assert fetch.take_parquet(file, out).read_bytes() == b"something else"


def test_packages_are_pinned() -> None:
    for package in packages.PACKAGES:
        assert len(package.sha256) == 64
        assert package.version in package.request
    with pytest.raises(FileNotFoundError, match=r"fetch it with python -m recipes\.icons\.fetch"):
        packages.unpacked("nowhere", packages.ICONIFY)
