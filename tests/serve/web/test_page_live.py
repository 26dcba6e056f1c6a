"""The page's side of a live connection, in a real browser where there is one."""

from __future__ import annotations

from typing import Any

from tests.serve.client import Served
from tests.serve.web.test_page import browser, opened, pytestmark  # noqa: F401

SCRIPT = """async () => {
    const { Live } = await import('/web/live.js');
    const sent = [], told = [];
    const live = new Live({ state() {}, picture() {}, refused: (error, request) => told.push(request?.fields.prompt) });
    live.socket = { send: (text) => sent.push(JSON.parse(text).prompt), readyState: 1 };
    const fault = JSON.stringify({ type: 'error', id: null, error: { code: 'invalid_body' } });
    live.ready = true;
    for (const prompt of ['a', 'b', 'c']) live.ask({ prompt });
    live.receive(fault);
    const waited = live.pending;
    live.receive(fault);
    const kept = live.pending.fields.prompt;
    live.ask({ prompt: 'd' });
    return { sent, told, waited, kept, under_way: live.asked.size };
}"""


def test_errors_without_an_id_do_not_stop_the_page(browser: Any, served: Served) -> None:  # noqa: F811
    page = opened(browser, served)
    found = page.evaluate(SCRIPT)
    assert found == {"sent": ["a", "b", "c", "d"], "told": ["b", "c"], "waited": None, "kept": "c", "under_way": 1}
