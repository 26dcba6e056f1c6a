"""The page in a real browser: headless Chromium, where there is one with its driver."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from onestill.pipeline import Pipeline
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import COOKIE, Access
from onestill.serve.gallery.store import Gallery, Rules
from tests.serve.client import Served, cookie_of, serving
from tests.serve.conftest import Gated

playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
SENTENCE = "a red apple on a green leaf"
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def opened(browser: Any, served: Served, fragment: str = "", wait: str = "live", **context: Any) -> Any:
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(WAIT_MS)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: page.faults.append(request.url) if served.url not in request.url else None)
    page.faults.clear()
    page.on("websocket", lambda socket: watch(page, socket))
    page.sent, page.answers = [], []
    page.goto(f"{served.url}/{fragment}")
    page.wait_for_selector(f"#link[data-state={wait}]")
    return page


def until(page: Any, expression: str) -> None:
    """Wait for a JavaScript expression; the page's own policy forbids the driver's way of doing so."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(30)


def watch(page: Any, socket: Any) -> None:
    socket.on("framesent", lambda frame: page.sent.append(frame))
    socket.on("framereceived", lambda frame: page.answers.append(frame))


def test_the_last_words_are_the_picture_and_nothing_older_follows(browser: Any, served: Served) -> None:
    page = opened(browser, served)
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const image = document.querySelector('#pictures img');
                if (image) window.seen.push(image.alt);
            }).observe(document.getElementById('pictures'), {childList: true});
        }"""
    )
    page.type("#prompt", SENTENCE, delay=30)
    page.wait_for_selector(f'#pictures img[alt="{SENTENCE}"]')
    until(page, f"document.getElementById('spoken').textContent.includes({SENTENCE!r})")
    seen = page.evaluate("window.seen")
    assert seen[-1] == SENTENCE
    assert [len(text) for text in seen] == sorted(len(text) for text in seen)
    assert page.evaluate("document.querySelector('#pictures img').naturalWidth") == 32
    assert page.inner_text("#total").endswith(" ms")
    # Every id that went up came back once.
    ids = [json.loads(frame)["id"] for frame in page.sent]
    back = [
        json.loads(frame if isinstance(frame, str) else frame[4 : 4 + int.from_bytes(frame[:4], "big")]).get("id")
        for frame in page.answers
    ]
    assert sorted(name for name in back if name is not None) == sorted(ids)
    assert page.input_value("#seed") == str(json.loads(page.sent[0])["seed"])  # it stayed while typing
    assert len(page.query_selector_all("#history li")) == 1
    assert "prompt=a%20red%20apple" in page.url
    assert page.faults == []


def test_dice_lock_steps_and_four_at_once_by_keyboard_alone(browser: Any, served: Served) -> None:
    page = opened(browser, served, "#prompt=a%20blue%20star&seed=7")
    page.wait_for_selector('#pictures img[alt="a blue star"]')
    assert page.input_value("#seed") == "7"
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Enter")
    until(page, "document.getElementById('seed').value !== '7'")
    rolled = page.input_value("#seed")
    page.focus("#lock")
    page.keyboard.press("Space")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    assert page.input_value("#seed") == rolled
    page.focus("#steps")
    page.keyboard.press("ArrowRight")
    page.focus("#four")
    page.keyboard.press("Space")
    page.wait_for_selector('#frame[data-count="4"]')
    seeds = [
        int(label.rsplit(" ", 1)[1])
        for label in page.eval_on_selector_all("#pictures img", "all => all.map(i => i.alt)")
    ]
    assert seeds == [int(rolled) + i for i in range(4)]
    page.focus("#pictures button:nth-child(3)")
    page.keyboard.press("Enter")
    page.wait_for_selector('#frame[data-count="1"]')
    assert page.input_value("#seed") == str(seeds[2])
    assert json.loads(page.sent[-1])["num_inference_steps"] == 2


def test_drawing_goes_up_with_the_words(browser: Any, served: Served) -> None:
    page = opened(browser, served, "#prompt=a%20red%20heart&seed=1")
    page.wait_for_selector("#pictures img")
    page.click("summary")
    box = page.locator("#sketch").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 90, steps=4)
    page.mouse.up()
    deadline = time.monotonic() + 30
    while not any(isinstance(frame, bytes) for frame in page.sent) and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    frame = [frame for frame in page.sent if isinstance(frame, bytes)][-1]
    size = int.from_bytes(frame[:4], "big")
    assert json.loads(frame[4 : 4 + size])["strength"] == 0.6
    assert frame[4 + size :].startswith(b"\x89PNG")


def test_a_download_carries_its_parameters(browser: Any, served: Served, tmp_path: Any) -> None:
    import PIL.Image

    page = opened(browser, served, "#prompt=a%20red%20heart&seed=9")
    page.wait_for_selector("#download:not([disabled])")
    with page.expect_download() as waiting:
        page.click("#download")
    assert waiting.value.suggested_filename == "a-red-heart-9.png"
    waiting.value.save_as(tmp_path / "a.png")
    with PIL.Image.open(tmp_path / "a.png") as picture:
        text: Any = picture.text  # type: ignore[attr-defined]
        assert (text["prompt"], text["seed"]) == ("a red heart", "9")


def test_history_survives_and_restores(browser: Any, served: Served) -> None:
    page = opened(browser, served, "#prompt=a%20red%20heart&seed=9")
    page.wait_for_selector("#history li")
    page.fill("#prompt", "a blue star")
    until(page, "document.querySelectorAll('#history li').length === 2")
    page.goto(served.url)
    page.wait_for_selector("#history li:nth-child(2) button")
    page.click("#history li:nth-child(2) button")
    page.wait_for_selector('#pictures img[alt="a red heart"]')
    assert page.input_value("#seed") == "9"
    page.click("#forget")
    assert not page.query_selector_all("#history li")


def test_a_picture_that_takes_longer_than_the_pause_is_kept_too(browser: Any, gated: Gated) -> None:
    with serving(Pipeline(gated)) as served:
        gated.hold()
        page = opened(browser, served)
        page.type("#prompt", "a star")
        page.wait_for_timeout(1500)
        gated.gate.set()
        page.wait_for_selector("#history li")
        until(page, "document.getElementById('spoken').textContent.includes('a star')")


def test_a_key_is_asked_for_and_kept(browser: Any, tiny_pipe: Pipeline) -> None:
    from onestill.serve.access.keys import Key, hash_of, new_key

    key_id, key = new_key()
    with serving(tiny_pipe, access=Access({key_id: Key(key_id, "me", hash_of(key))}, trial=0)) as served:
        page = opened(browser, served, wait="offline")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-field", key)
        page.click("#key-form .primary")
        page.wait_for_selector("#link[data-state=live]")
        page.type("#prompt", "a star")
        page.wait_for_selector('#pictures img[alt="a star"]')


def test_a_server_that_goes_is_told_and_come_back_to(browser: Any, gated: Gated, tiny_pipe: Pipeline) -> None:
    with serving(tiny_pipe) as served:
        page = opened(browser, served)
        page.type("#prompt", "a star")
        page.wait_for_selector('#pictures img[alt="a star"]')
    page.wait_for_selector("#link[data-state=offline]")
    assert "Offline" in page.inner_text("#link")


@pytest.fixture(scope="module")
def with_gallery(tiny_pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('gallery') / 'serve.db'}")
    gallery = Gallery(ledger, Rules(saves_a_minute=6000, each=100))
    with serving(tiny_pipe, access=Access(ledger=ledger), gallery=gallery) as served:
        yield served


def test_without_a_gallery_there_is_no_trace_of_one(browser: Any, served: Served) -> None:
    page = opened(browser, served, "#prompt=a%20blue%20star&seed=7")
    page.wait_for_selector("#pictures img")
    assert not page.is_visible("#show")
    assert not page.is_visible("#gallery")
    assert "allery" not in page.inner_text("body")


def save(page: Any, words: bool) -> None:
    """Save what is drawn, by keyboard alone."""
    page.wait_for_selector("#show:not([disabled])")
    page.focus("#show")
    page.keyboard.press("Enter")
    page.wait_for_selector("#show-dialog[open]")
    assert not page.is_checked("#show-words")  # the words are shown to nobody unless one says so
    if words:
        page.focus("#show-words")
        page.keyboard.press("Space")
    page.focus("#show-dialog .primary")
    page.keyboard.press("Enter")


def test_a_picture_is_shown_looked_at_and_deleted_by_keyboard_alone(browser: Any, with_gallery: Served) -> None:
    page = opened(browser, with_gallery, "#prompt=a%20blue%20star&seed=7")
    page.wait_for_selector("#none-shown:not([hidden])")
    save(page, words=True)
    page.wait_for_selector("#shown li")
    assert page.inner_text("#notice") == "Saved to the gallery."
    # Another visitor sees it, may take it up, and may not delete it.
    other = opened(browser, with_gallery)
    other.wait_for_selector('#shown img[alt="a blue star, seed 7"]')
    until(other, "document.querySelector('#shown img').naturalWidth === 32")
    assert other.query_selector("#shown .delete") is None
    other.focus("#shown button")
    other.keyboard.press("Enter")
    other.wait_for_selector('#pictures img[alt="a blue star"]')
    assert other.input_value("#seed") == "7"
    # Of one without words there is nothing to read.
    page.fill("#prompt", "a secret leaf")
    page.wait_for_selector('#pictures img[alt="a secret leaf"]')
    save(page, words=False)
    page.wait_for_selector("#shown li:nth-child(2)")
    other.reload()
    other.wait_for_selector("#shown li:nth-child(2)")
    assert "secret" not in other.inner_text("#gallery")
    assert "secret" not in str(other.eval_on_selector_all("#shown img", "all => all.map((one) => one.alt)"))
    for left in (1, 0):
        page.focus("#shown .delete")
        page.keyboard.press("Enter")
        page.wait_for_selector("#delete-dialog[open]")
        page.focus("#delete-dialog .primary")
        page.keyboard.press("Enter")
        until(page, f"document.querySelectorAll('#shown li').length === {left}")
        assert page.evaluate("document.activeElement !== document.body")
    other.reload()
    other.wait_for_selector("#none-shown:not([hidden])")
    assert page.faults == other.faults == []


def test_the_gallery_goes_on_by_pages_and_not_from_uploads(browser: Any, with_gallery: Served) -> None:
    cookie = {"cookie": f"{COOKIE}={cookie_of(with_gallery.ask('GET', '/'))}"}
    for seed in range(30):
        body = {"prompt": "a star", "seed": seed, "consent": True, "show_prompt": True}
        assert with_gallery.ask("POST", "/v1/gallery", body, cookie).status == 201
    page = opened(browser, with_gallery, "#prompt=a%20blue%20star&seed=7")
    page.wait_for_selector("#shown li:nth-child(24)")
    page.click("#more")
    page.wait_for_selector("#shown li:nth-child(30)")
    assert not page.is_visible("#more")
    assert page.evaluate("document.activeElement.closest('li') === document.querySelector('#shown li:nth-child(25)')")
    page.click("summary")
    box = page.locator("#sketch").bounding_box()
    page.mouse.click(box["x"] + 20, box["y"] + 20)
    page.wait_for_selector("#show[disabled]")
    assert "words alone" in page.get_attribute("#show", "title")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=["phone", "desktop"])
def test_axe_finds_nothing_in_the_gallery(
    browser: Any, with_gallery: Served, scheme: str, size: tuple[int, int]
) -> None:
    page = opened(
        browser,
        with_gallery,
        "#prompt=a%20red%20heart&seed=9",
        viewport={"width": size[0], "height": size[1]},
        color_scheme=scheme,
        bypass_csp=True,
    )
    save(page, words=True)
    page.wait_for_selector("#shown .delete")
    assert axe.Axe().run(page).response["violations"] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    for opener in ("#show", "#shown .delete"):
        page.click(opener)
        assert axe.Axe().run(page).response["violations"] == []
        page.keyboard.press("Escape")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=["phone", "desktop"])
def test_axe_finds_nothing_and_nothing_is_cut(browser: Any, served: Served, scheme: str, size: tuple[int, int]) -> None:
    page = opened(
        browser,
        served,
        "#prompt=a%20red%20heart&seed=9",
        viewport={"width": size[0], "height": size[1]},
        color_scheme=scheme,
        bypass_csp=True,  # axe itself is put into the page
    )
    page.wait_for_selector("#history li")
    page.click("summary")
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.click("#open-key")
    assert axe.Axe().run(page).response["violations"] == []
