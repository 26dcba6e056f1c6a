from __future__ import annotations

from pathlib import Path

import pytest

from onestill.cli.output import Target, free_path, slug
from onestill.errors import OutputError


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red apple, fluent 3d emoji", "a-red-apple-fluent-3d-emoji"),
        ("  A   B  ", "a-b"),
        ("../../etc/passwd", "etc-passwd"),
        ("пицца, 3d", "пицца-3d"),
        ("ﬁne ½", "fine-1-2"),
        ("!?", "picture"),
        ("", "picture"),
    ],
)
def test_slug(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_slug_is_short_whatever_the_script() -> None:
    for letter in ("a", "ж", "語", "😀a"):
        assert 90 <= len(slug(letter * 500).encode()) <= 100


def test_free_path_takes_the_next_number(tmp_path: Path) -> None:
    assert free_path(tmp_path, "a-1") == tmp_path / "a-1.png"
    (tmp_path / "a-1.png").touch()
    assert free_path(tmp_path, "a-1") == tmp_path / "a-1-2.png"
    assert free_path(tmp_path, "a-1", [tmp_path / "a-1-2.png"]) == tmp_path / "a-1-3.png"


def test_a_dangling_link_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "a-1.png").symlink_to(tmp_path / "nowhere")
    assert free_path(tmp_path, "a-1") == tmp_path / "a-1-2.png"


def test_pictures_of_one_prompt_and_seed_get_names_of_their_own(tmp_path: Path) -> None:
    target = Target(tmp_path, 2, force=False)
    assert [target.path("a", 1), target.path("a!", 1)] == [tmp_path / "a-1.png", tmp_path / "a-1-2.png"]


def test_force_replaces_what_was_there_but_not_what_was_just_drawn(tmp_path: Path) -> None:
    (tmp_path / "a-1.png").touch()
    target = Target(tmp_path, 2, force=True)
    assert [target.path("a", 1), target.path("a", 1)] == [tmp_path / "a-1.png", tmp_path / "a-1-2.png"]


@pytest.mark.parametrize("name", ["x.png", "x.PNG", "x.jpg", "x.jpeg", "x.webp"])
def test_a_picture_suffix_names_a_file_and_folders_above_are_made(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    assert Target(path, 1, force=False).path("a", 1) == path
    assert path.parent.is_dir()


def test_a_folder_may_have_a_picture_suffix(tmp_path: Path) -> None:
    folder = tmp_path / "x.png"
    folder.mkdir()
    assert Target(folder, 2, force=False).path("a", 1) == folder / "a-1.png"


def test_nothing_is_made_before_there_is_a_picture(tmp_path: Path) -> None:
    Target(tmp_path / "a" / "b", 3, force=False)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_without_force(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"kept")
    with pytest.raises(OutputError, match="--force"):
        Target(path, 1, force=False)
    assert Target(path, 1, force=True).path("a", 1) == path


def test_one_file_for_several_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="3 pictures; give a folder"):
        Target(tmp_path / "x.png", 3, force=False)


def test_a_kind_that_is_not_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"end it in \.png"):
        Target(tmp_path / "x.gif", 1, force=False)


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "x.png", tmp_path / "file" / "folder", tmp_path / "file"):
        with pytest.raises(OutputError, match="not a folder"):
            Target(out, 1, force=False)


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere, so the bits would not tell
    with pytest.raises(OutputError, match="may not be written"):
        Target(tmp_path / "x.png", 1, force=False)
