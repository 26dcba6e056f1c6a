from __future__ import annotations

from typing import Any

from onestill.serve.cluster.upstream import ClientFromProxy, retries

PROOF = "proof"


def test_who_asks_is_who_the_proxy_says() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["client"])

    async def ask(proof: str) -> None:
        headers = [(b"x-onestill-front", proof.encode()), (b"x-onestill-client", b"10.0.0.7")]
        await ClientFromProxy(app, PROOF)({"type": "http", "client": ("127.0.0.1", 1), "headers": headers}, None, None)  # type: ignore[arg-type]

    import asyncio

    asyncio.run(ask(PROOF))
    asyncio.run(ask("forged"))
    assert seen == [("10.0.0.7", 0), ("127.0.0.1", 1)]


def test_the_pauses_between_tries_grow_and_end() -> None:
    import asyncio

    async def count() -> int:
        return len([number async for number in retries(0.3)])

    assert 3 <= asyncio.run(count()) <= 5
