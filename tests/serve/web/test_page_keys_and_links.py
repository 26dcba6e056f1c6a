"""The page's key, its history and what names a picture, in the browser of `test_page`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onestill.pipeline import Pipeline
from onestill.serve.access.keys import Key, hash_of, new_key
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import Access
from onestill.serve.gallery.store import Gallery
from onestill.serve.run import ProxySettings
from onestill.serve.web.requests import Bounds
from onestill.serve.web.server import Settings
from tests.serve.client import Served, serving
from tests.serve.conftest import Gated
from tests.serve.reverse_proxy import reverse_proxy
from tests.serve.web import test_page
from tests.serve.web.test_page import opened, until

pytestmark = test_page.pytestmark
browser = test_page.browser


def test_enter_saves_the_key_and_nothing_else_changes_it(browser: Any, tiny_pipe: Pipeline) -> None:
    key_id, key = new_key()
    with serving(tiny_pipe, access=Access({key_id: Key(key_id, "me", hash_of(key))}, trial=0)) as served:
        page = opened(browser, served, wait="offline")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-field", key[:9] + "\u200b" + key[9:])  # as some pages let one copy it
        page.keyboard.press("Enter")
        until(page, "document.getElementById('notice').textContent === 'This key is not valid.'")
        assert page.get_attribute("#link", "data-state") == "offline"
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-field", f" {key}\n")
        page.keyboard.press("Enter")
        page.wait_for_selector("#link[data-state=live]")
        assert page.evaluate("localStorage['onestill.key']") == key
        for leave in ("Escape", "#cancel-key"):
            page.click("#open-key")
            page.fill("#key-field", "another")
            page.click(leave) if leave.startswith("#") else page.keyboard.press(leave)
            page.wait_for_selector("#key-dialog", state="hidden")
            assert page.evaluate("localStorage['onestill.key']") == key
        assert page.faults == []


@pytest.fixture
def styled(gated: Gated) -> Gated:
    """An engine that also has two styles and a second size."""
    gated.info = replace(gated.info, styles=("flat icon", "icon"), sizes=((32, 32), (64, 32)))  # type: ignore[attr-defined]
    denoise, decode = gated.denoise, gated.decode
    # Its network takes one size only, so the lower half of a tall picture is the upper one again.
    gated.denoise = lambda latents, *more: np.tile(denoise(latents[:, :, :4], *more), (1, 1, latents.shape[2] // 4, 1))  # type: ignore[method-assign]
    gated.decode = lambda latents: np.tile(decode(latents[:, :, :4]), (1, latents.shape[2] // 4, 1, 1))  # type: ignore[attr-defined]
    return gated


def test_style_and_size_and_drawing_tell_pictures_apart(browser: Any, styled: Gated) -> None:
    with serving(Pipeline(styled)) as served:
        page = opened(browser, served, "#prompt=a%20star&seed=7")
        page.wait_for_selector("#history li")
        page.click("[data-style=icon]")
        page.wait_for_selector("#history li:nth-child(2)")
        page.click("[data-style='flat icon']")
        page.wait_for_selector("#history li:nth-child(3)")
        page.select_option("#size", "32x64")
        page.wait_for_selector("#history li:nth-child(4)")
        assert page.url.endswith("#prompt=a%20star&seed=7&style=flat%20icon&size=32x64")
        # The link is of the picture that is seen, not of what is typed by now.
        page.evaluate("history.replaceState(null, '', '/')")
        styled.hold()
        page.fill("#prompt", "a heart")
        page.click("#share")
        assert page.url.endswith("#prompt=a%20star&seed=7&style=flat%20icon&size=32x64")
        styled.gate.set()
        page.wait_for_selector('#pictures img[alt="a heart, flat icon"]')
        page.click("#history li:nth-last-child(1) button")
        page.wait_for_selector('#pictures img[alt="a star"]')
        assert page.input_value("#size") == "32x32"
        other = opened(browser, served, "#prompt=a%20star&seed=7&style=flat%20icon&size=32x64")
        other.wait_for_selector('#pictures img[alt="a star, flat icon"]')
        assert other.evaluate("document.querySelector('#pictures img').naturalHeight") == 64
        # What began with a drawing no link can name, and each is one more to keep.
        other.wait_for_selector("#history li")
        other.select_option("#size", "32x32")
        other.wait_for_selector("#history li:nth-child(2)")
        other.click("summary")
        for count in (3, 4):
            box = other.locator("#sketch").bounding_box()
            other.mouse.click(box["x"] + 20 * count, box["y"] + 20)
            other.wait_for_selector(f"#history li:nth-child({count})")
            assert other.is_disabled("#share")
            assert "words alone" in other.get_attribute("#share", "title")
        assert page.faults == other.faults == []


def test_what_is_left_is_seen_at_once_and_spoken_when_the_typing_stops(
    browser: Any, tiny_pipe: Pipeline, tmp_path: Path
) -> None:
    with serving(tiny_pipe, access=Access(ledger=Ledger(f"sqlite:///{tmp_path}/serve.db"), trial=100)) as served:
        page = opened(browser, served)
        page.evaluate(
            """() => {
                window.spoken = [];
                const watch = (changes) => window.spoken.push(...changes.map((one) => one.target.textContent));
                for (const one of document.querySelectorAll('[role=status]'))
                    new MutationObserver(watch).observe(one, {childList: true, characterData: true, subtree: true});
            }"""
        )
        page.type("#prompt", "a red star", delay=120)
        page.wait_for_selector('#pictures img[alt="a red star"]')
        assert "free pictures left today." in page.inner_text("#left")
        until(page, "window.spoken.length")
        (said,) = page.evaluate("window.spoken")
        assert said.startswith("Drawn: a red star, seed ")
        assert said.endswith(" " + page.inner_text("#left"))


def test_a_busy_server_that_goes_is_not_called_live(browser: Any, tiny_pipe: Pipeline) -> None:
    with serving(tiny_pipe, Settings(bounds=Bounds(messages_each_s=1))) as served:
        page = opened(browser, served)
        page.type("#prompt", "a red star", delay=30)
        page.wait_for_selector("#link[data-state=busy]")
        # The connection ends, and no other comes.
        page.evaluate("() => { window.WebSocket = class {}; dispatchEvent(new Event('offline')); }")
        page.wait_for_timeout(1500)
        assert page.get_attribute("#link", "data-state") in ("offline", "connecting")


class Below(Served):
    """A server below a path, asked through a proxy."""

    @property
    def url(self) -> str:
        return f"{super().url}/draw"


@pytest.mark.parametrize("strip", [True, False])
def test_the_page_draws_and_publishes_below_a_path(
    browser: Any, tiny_pipe: Pipeline, tmp_path: Path, strip: bool
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/serve.db")
    access = Access(ledger=ledger, trial=100)
    with (
        serving(tiny_pipe, access=access, gallery=Gallery(ledger), proxy=ProxySettings(root_path="/draw")) as served,
        reverse_proxy(served.port, "/draw", strip) as port,
    ):
        page = opened(browser, Below(served.server, port))
        page.fill("#prompt", "a red star")
        page.wait_for_selector('#pictures img[alt="a red star"]')
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename.startswith("a-red-star-")
        page.click("#show")
        page.click('#show-dialog button[value="save"]')
        page.wait_for_selector("#shown img")
        until(page, "document.querySelector('#shown img').naturalWidth === 32")
        page.reload()
        page.wait_for_selector("#shown .delete")  # the cookie came along
        assert page.faults == []
