from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from onestill.pipeline import Pipeline
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import COOKIE, Access
from onestill.serve.gallery.store import Gallery, Rules
from onestill.serve.web.server import Settings
from tests.serve.client import Answer, Served, cookie_of, kept, serving

SECRET = "a very private apple"
ROUTES = [("GET", ""), ("POST", ""), ("GET", "/{name}"), ("GET", "/{name}/file"), ("DELETE", "/{name}")]


class Visitor:
    """A browser with a cookie of its own, or a client with a key."""

    def __init__(self, served: Served, key: str | None = None) -> None:
        self.served = served
        self.headers = (
            {"authorization": f"Bearer {key}"} if key else {"cookie": f"{COOKIE}={cookie_of(served.ask('GET', '/'))}"}
        )

    def ask(self, method: str, path: str = "", body: Any = None, **headers: str) -> Answer:
        return self.served.ask(method, f"/v1/gallery{path}", body, self.headers | headers)

    def save(self, prompt: str = "a red apple", **fields: Any) -> Answer:
        return self.ask("POST", "", {"prompt": prompt, "seed": 1, "consent": True, **fields})


@contextmanager
def shown(
    pipe: Pipeline, url: str, trial: int | None = None, settings: Settings | None = None, **rules: Any
) -> Iterator[tuple[Served, Gallery]]:
    ledger = Ledger(url)
    gallery = Gallery(ledger, Rules(**({"saves_a_minute": 600} | rules)))
    with serving(pipe, settings, Access(ledger=ledger, trial=trial), gallery) as served:
        yield served, gallery


def test_a_picture_is_shown_to_others_and_deleted_by_its_owner_alone(tiny_pipe: Pipeline, url: str) -> None:
    with shown(tiny_pipe, url) as (served, _):
        owner, other = Visitor(served), Visitor(served)
        saved = owner.save(show_prompt=True)
        assert saved.status == 201
        entry = saved.json
        assert (entry["prompt"], entry["seed"], entry["mine"]) == ("a red apple", 1, True)
        assert len(entry["id"]) == 32
        listed = other.ask("GET").json
        assert listed == {"object": "list", "data": [entry | {"mine": False}], "next": None}
        file = other.served.ask("GET", entry["url"])
        assert file.headers["content-type"] == "image/webp"
        assert file.headers["x-content-type-options"] == "nosniff"
        picture = PIL.Image.open(io.BytesIO(file.body))
        assert (picture.format, picture.size) == ("WEBP", (32, 32))
        assert picture.getexif()[0x010E].startswith("a red apple\n")
        tag = {"if-none-match": file.headers["etag"]}
        assert served.ask("GET", entry["url"], headers=tag).status == 304
        refused = other.ask("DELETE", f"/{entry['id']}")
        assert (refused.status, refused.error["code"]) == (403, "not_yours")
        nobody = served.ask("DELETE", f"/v1/gallery/{entry['id']}")
        assert (nobody.status, nobody.error["code"]) == (401, "no_owner")
        assert owner.ask("DELETE", f"/{entry['id']}").status == 204
        assert owner.ask("DELETE", f"/{entry['id']}").status == 404
        assert served.ask("GET", entry["url"], headers=tag).status == 404
        assert other.ask("GET").json["data"] == []


def test_nothing_is_kept_of_words_that_are_not_to_be_shown(tiny_pipe: Pipeline, url: str, tmp_path: Path) -> None:
    with shown(tiny_pipe, url) as (served, _):
        owner = Visitor(served)
        entry = owner.save(SECRET).json
        assert entry["prompt"] is None
        file = owner.ask("GET", f"/{entry['id']}/file").body
        assert b"private" not in file
        assert PIL.Image.open(io.BytesIO(file)).getexif()[0x010E].startswith("\n")
        cookie = owner.headers["cookie"].partition("=")[2].partition(".")[0]
        assert b"RIFF" in kept(tmp_path)
        assert b"private" not in kept(tmp_path)
        assert cookie.encode() not in kept(tmp_path)  # who it was is a keyed hash


@pytest.mark.parametrize("fields", [{"consent": False}, {"consent": None}, {"consent": "true"}, {"consent": 1}])
def test_without_consent_nothing_is_drawn_or_kept(tiny_pipe: Pipeline, url: str, fields: Any) -> None:
    with shown(tiny_pipe, url) as (served, gallery):
        answer = Visitor(served).save(**fields)
        assert (answer.status, answer.error["param"]) == (400, "consent")
        without = Visitor(served).ask("POST", "", {"prompt": "a"})
        assert (without.status, without.error["param"]) == (400, "consent")
        assert served.server.scheduler.counts["drawn"] == 0
        assert gallery.page(9) == []


def test_what_is_wrong_is_refused(tiny_pipe: Pipeline, url: str) -> None:
    with shown(tiny_pipe, url) as (served, gallery):
        owner = Visitor(served)
        for fields in ({"prompt": ""}, {"prompt": "\ud800"}, {"seed": -1}, {"size": "9x9"}, {"image": "data:,"}):
            assert owner.save(**fields).status == 400, fields  # type: ignore[arg-type]
        assert owner.save(model="other").status == 404
        assert owner.ask("POST", "", b"{", **{"content-type": "application/json"}).status == 400
        assert owner.ask("POST", "", b"{}", **{"content-type": "text/plain"}).status == 400
        foreign = owner.ask("POST", "", {"prompt": "a", "consent": True}, origin="https://evil.example")
        assert (foreign.status, foreign.error["code"]) == (403, "foreign_origin")
        assert owner.ask("PUT", "").headers["allow"] == "GET, HEAD, POST"
        assert owner.ask("POST", f"/{'0' * 32}").headers["allow"] == "DELETE, GET, HEAD"
        assert gallery.page(9) == []
        entry = owner.save("a\0b", show_prompt=True).json
        assert entry["prompt"] == "a b"
        assert owner.ask("DELETE", f"/{entry['id']}", origin="https://evil.example").status == 403
        for name in ("x", "0" * 32, "0" * 31, "%00" * 32, "..%2f" * 8, "0" * 33):
            for method, path in ROUTES[2:]:
                assert owner.ask(method, path.replace("{name}", name)).status == 404, (method, name)
        for query in (
            "limit=0",
            "limit=49",
            "limit=x",
            "limit=",
            "after=1",
            "after=1.x",
            f"after={'9' * 16}.{'0' * 32}",
        ):
            assert owner.ask("GET", f"?{query}").status == 400, query


def test_a_request_that_is_asked_again_is_one_picture(tiny_pipe: Pipeline, url: str) -> None:
    with shown(tiny_pipe, url) as (served, gallery):
        owner, other = Visitor(served), Visitor(served)
        body = {"prompt": "a", "consent": True}
        first, again, theirs = (one.ask("POST", "", body, **{"x-request-id": "7"}) for one in (owner, owner, other))
        assert first.json == again.json
        assert first.json["id"] != theirs.json["id"]
        assert first.json["seed"] == theirs.json["seed"]  # which the request's id names
        assert len(gallery.page(9)) == 2


def test_pages_go_through_all_once_newest_first(tiny_pipe: Pipeline, url: str) -> None:
    with shown(tiny_pipe, url) as (served, _):
        owner = Visitor(served)
        names = [owner.save(seed=seed).json["id"] for seed in range(7)]
        found: list[str] = []
        after = ""
        while True:
            listed = owner.ask("GET", f"?limit=3{after}").json
            found += [entry["id"] for entry in listed["data"]]
            if listed["next"] is None:
                break
            after = f"&after={listed['next']}"
            if len(found) == 3:
                owner.save(seed=99)  # one that comes meanwhile shifts nothing
        assert found == names[::-1]


def test_every_route_without_a_key_with_a_wrong_one_and_over_its_limit(tiny_pipe: Pipeline, url: str) -> None:
    with closing(Ledger(url)) as ledger:
        key, poor = ledger.add_key("me", None)[1], ledger.add_key("poor", 1)[1]
    with shown(tiny_pipe, url, trial=0) as (served, _):
        entry = Visitor(served, key).save().json
        for method, path in ROUTES:
            for headers, code in (({}, "no_api_key"), ({"authorization": "Bearer os-x"}, "invalid_api_key")):
                answer = served.ask(method, f"/v1/gallery{path.replace('{name}', entry['id'])}", {}, headers)
                assert (answer.status, answer.error["code"]) == (401, code), (method, path)
        assert Visitor(served, poor).save().status == 201
        over = Visitor(served, poor).save()
        assert (over.status, over.error["code"]) == (429, "insufficient_quota")
        assert Visitor(served, poor).ask("DELETE", f"/{entry['id']}").status == 403
        assert Visitor(served, key).ask("DELETE", f"/{entry['id']}").status == 204


def test_saving_and_looking_have_rate_limits(tiny_pipe: Pipeline, url: str) -> None:
    with shown(tiny_pipe, url, saves_a_minute=2, looks_a_second=1) as (served, _):
        statuses = [Visitor(served).save().status for _ in range(3)]  # a new cookie gains nothing
        assert statuses == [201, 201, 429]
        looks = [Visitor(served).ask("GET") for _ in range(8)]
        assert looks[0].status == 200
        assert (looks[-1].status, looks[-1].error["code"]) == (429, "rate_limit")
        assert "retry-after" in looks[-1].headers


def test_a_picture_counts_as_one_and_filters_hold_here_too(tiny_pipe: Pipeline, url: str) -> None:
    settings = Settings(prompt_filter=lambda prompt: "no stars" if "star" in prompt else None)
    with shown(tiny_pipe, url, trial=1, settings=settings) as (served, gallery):
        owner = Visitor(served)
        assert owner.save("a star").error["code"] == "moderation_blocked"
        assert owner.save().status == 201
        assert owner.save().error["code"] == "insufficient_quota"
        assert len(gallery.page(9)) == 1
    settings = Settings(image_filter=lambda images: [True for _ in images])
    with shown(tiny_pipe, url, settings=settings) as (served, gallery):
        assert Visitor(served).save().error["code"] == "moderation_blocked"
        assert len(gallery.page(9)) == 1


def test_what_the_gallery_does_not_take_counts_nothing(tiny_pipe: Pipeline, url: str) -> None:
    with shown(tiny_pipe, url, trial=1, file_bytes=10) as (served, _):
        owner = Visitor(served)
        assert [owner.save().error["code"] for _ in range(2)] == ["too_large"] * 2
        assert served.draw().status == 200


def test_off_it_is_not_there(served: Served) -> None:
    for method, path in ROUTES:
        assert served.ask(method, f"/v1/gallery{path.replace('{name}', '0' * 32)}", {}).status == 404
    assert not any("gallery" in path for path in served.ask("GET", "/openapi.json").json["paths"])
    assert "gallery" not in served.ask("GET", "/v1/models").json
    assert "set-cookie" not in served.ask("GET", "/").headers
