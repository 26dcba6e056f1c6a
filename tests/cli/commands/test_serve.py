from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from onestill.cli.commands.serve import AccessOptions, GalleryOptions, Hooks, RecoveryOptions, built, is_loopback
from onestill.cli.options import AdditionOptions, parse_daily
from onestill.errors import OnestillError
from onestill.serve.queue.scheduler import Limits
from onestill.serve.web.server import Settings

Refused = Callable[..., str]


@pytest.mark.parametrize(("text", "pictures"), [("50/day", 50), (" 7 / day ", 7), ("0", 0), (None, None)])
def test_limits(text: str | None, pictures: int | None) -> None:
    assert parse_daily(text) == pictures


@pytest.mark.parametrize("text", ["", "many", "-1", "5/hour", "1e9", "²"])
def test_a_limit_that_is_none(text: str) -> None:
    with pytest.raises(OnestillError, match="pictures a day"):
        parse_daily(text)


def test_mistakes_are_one_line_before_the_model_is_loaded(refused: Refused, tmp_path: Path) -> None:
    assert "Did you mean 'icons'?" in refused("serve", "--model", "icon")
    assert "pictures a day" in refused("serve", "--trial-limit", "many")
    assert "--port" in refused("serve", "--port", "70000")
    assert "cannot listen" in refused("serve", "--host", "203.0.113.9", "--port", "0")
    assert "cannot be read" in refused("serve", "--port", "0", "--keys", tmp_path / "none.txt")
    assert "sqlite" in refused("serve", "--port", "0", "--database", "nonsense")
    assert "cannot be read" in refused("serve", "--blocked-words", tmp_path / "none.txt")
    assert "no LoRA" in refused("serve", "--lora", tmp_path / "none.safetensors")
    assert "nothing at" in refused("serve", "--tiny-vae", tmp_path / "none")
    assert "Did you mean 'turbo'?" in refused("serve", "--preset", "turboo")
    assert "package.module:function" in refused("serve", "--image-filter", "nothing.at:all")
    assert "Did you mean 'cuda'?" in refused("serve", "--port", "0", "--device", "gpu")
    assert "addresses or networks" in refused("serve", "--port", "0", "--trust-proxy", "proxy")
    assert "such as /draw" in refused("serve", "--port", "0", "--root-path", "draw")
    assert "Ray" in refused("serve", "--port", "0", "--ray", "2", "--metrics-port", "0")
    assert "'text'" in refused("serve", "--port", "0", "--log-format", "xml")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "choose another" in refused("serve", "--port", "0", "--metrics-port", port)
        assert "choose another --port" in refused("serve", "--port", taken.getsockname()[1])


def test_a_model_that_asks_for_a_filter_is_not_served_without(refused: Refused, tmp_path: Path) -> None:
    import shutil

    from onestill import model_path

    folder = tmp_path / "model"
    shutil.copytree(model_path("icons"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": True}))
    assert "--image-filter" in refused("serve", "--port", "0", "--model", folder)


def test_who_may_draw(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'serve.db'}"
    (tmp_path / "keys.txt").write_text("")
    for database, keys, daily, trial in [
        (None, None, None, None),
        (None, tmp_path / "keys.txt", None, 0),
        (url, None, None, 0),
        (url, None, "20/day", 20),
        (None, None, "0", 0),
    ]:
        access, _ = AccessOptions(database, keys, daily).open(gallery=False)
        assert access.trial == trial
        access.close()


def test_a_server_says_what_it_draws_before_anyone_asks(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for batch, numbers in ((1, "1"), (3, "1, 2, 3")):
        server = built(
            Settings(limits=Limits(batch=batch)),
            Hooks(),
            str(tiny_folder),
            {"engine": "torch", "options": None},
            AdditionOptions(),
            AccessOptions(),
            GalleryOptions(),
            RecoveryOptions(),
        )
        server.scheduler.close()
        server.access.close()
        expected = f"note: warming up: {numbers} at once, 32x32 px, num_inference_steps 1\n"
        assert capsys.readouterr().err == expected


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))
