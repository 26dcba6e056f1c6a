from __future__ import annotations

import http.client
import io
import json
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from benchmarks.serve.server import running
from onestill.errors import OnestillError
from onestill.pipeline import Pipeline
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import COOKIE, Access
from onestill.serve.errors import ApiError
from onestill.serve.gallery.store import DAY_MS, Gallery, Rules
from onestill.serve.web.server import Settings
from tests.serve.client import Answer, Served, cookie_of, serving
from tests.serve.postgres import postgres

SECRET = "a very private apple"
ROUTES = [("GET", ""), ("POST", ""), ("GET", "/{name}"), ("GET", "/{name}/file"), ("DELETE", "/{name}")]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'serve.db'}"


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


def kept(folder: Path) -> bytes:
    """All that is on the disk, the database's log included."""
    return b"".join(file.read_bytes() for file in folder.iterdir())


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
        assert owner.ask("PUT", "").headers["allow"] == "GET, POST"
        assert owner.ask("POST", f"/{'0' * 32}").headers["allow"] == "DELETE, GET"
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


def test_saving_and_looking_have_their_pace(tiny_pipe: Pipeline, url: str) -> None:
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


# --- the store --------------------------------------------------------------------------------------------------------

ROW: dict[str, Any] = {
    "address": "here",
    "prompt": "a",
    "seed": 1,
    "num_inference_steps": 1,
    "width": 32,
    "height": 32,
}


def test_the_gallery_is_bounded(url: str) -> None:
    with closing(Ledger(url)) as ledger:
        gallery = Gallery(ledger, Rules(each=2, most=10, most_bytes=1000, file_bytes=300))

        def code(file: bytes, owner: str, address: str = "here") -> str | None:
            try:
                gallery.add(file, owner=owner, **ROW | {"address": address})
            except ApiError as error:
                return error.code
            return None

        assert code(b"x" * 301, "a") == "too_large"
        assert [code(b"x", "a") for _ in range(3)] == [None, None, "gallery_share_full"]
        assert [code(b"x", owner) for owner in "bbccddee"] == [None] * 6 + ["gallery_share_full"] * 2  # of one address
        assert code(b"x", "f", "there") is None
        assert code(b"x", "f", "there") is None
        assert code(b"x", "g", "elsewhere") == "gallery_full"
        for entry in gallery.page(10):
            assert gallery.remove(entry.id)
        assert [code(b"x" * 300, owner, owner) for owner in "abcd"] == [None] * 3 + ["gallery_full"]
        assert code(b"x" * 100, "k", "") is None


def test_what_expired_or_was_deleted_leaves_nothing_behind(url: str, tmp_path: Path) -> None:
    now = [1_000_000.0]
    with closing(Ledger(url)) as ledger:
        gallery = Gallery(ledger, Rules(days=3), clock=lambda: now[0])
        first = gallery.add(b"FIRST" * 2000, owner="a", **ROW | {"prompt": "words of the first"})
        second = gallery.add(b"SECOND" * 2000, owner="a", **ROW)
        assert first.expires_ms - first.made_ms == 3 * DAY_MS
        assert b"FIRST" in kept(tmp_path)
        assert gallery.remove(first.id)
        assert not gallery.remove(first.id)
        for trace in (b"FIRST", b"words of the first", first.id.encode()):
            assert trace not in kept(tmp_path)
        assert gallery.file(second.id) == b"SECOND" * 2000
        now[0] += 3 * DAY_MS / 1000
        assert (gallery.page(9), gallery.find(second.id), gallery.file(second.id)) == ([], None, None)
        assert gallery.forget_expired() == 1
        assert b"SECOND" not in kept(tmp_path)


def test_the_last_place_is_taken_once(url: str) -> None:
    check_last_place([Ledger(url), Ledger(url)])


def test_the_gallery_on_postgresql() -> None:
    pytest.importorskip("psycopg", reason="the extra [postgres] is not installed")
    with postgres() as url:
        check_last_place([Ledger(url), Ledger(url)])


def check_last_place(ledgers: list[Ledger]) -> None:
    """Two servers fill one gallery; then a page, a file and a deletion."""
    galleries = [Gallery(ledger, Rules(most=12)) for ledger in ledgers]
    refused: list[str] = []

    def fill(gallery: Gallery, name: str) -> None:
        for _ in range(10):
            try:
                gallery.add(name.encode(), owner=name, **ROW)
            except ApiError as error:
                refused.append(error.code)

    threads = [threading.Thread(target=fill, args=pair) for pair in zip(galleries, "ab", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == ["gallery_full"] * 8
    first, *rest = galleries[0].page(5)
    found = [first, *rest, *galleries[1].page(20, (rest[-1].made_ms, rest[-1].id))]
    assert len({entry.id for entry in found}) == 12
    assert galleries[1].file(first.id) == first.owner.encode()
    assert galleries[1].remove(first.id)
    assert galleries[0].find(first.id) is None
    for ledger in ledgers:
        ledger.close()


@pytest.mark.slow
def test_a_kill_leaves_whole_pictures_only(tiny_folder: Path, url: str) -> None:
    options = ["--model", str(tiny_folder), "--threads", "1", "--gallery", "--database", url]
    with closing(Ledger(url)) as ledger:
        key = ledger.add_key("me", None)[1]
    told: list[str] = []
    with running(options) as process:

        def save() -> None:
            body = json.dumps({"prompt": "a", "consent": True}).encode()
            headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
            request = urllib.request.Request(f"{process.url}/v1/gallery", body, headers)
            try:
                while True:
                    told.append(json.load(urllib.request.urlopen(request, timeout=30))["id"])
            except (OSError, ValueError, http.client.HTTPException):  # wherever in an answer the kill fell
                return

        threads = [threading.Thread(target=save) for _ in range(3)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while len(told) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.stop(signal.SIGKILL)
        for thread in threads:
            thread.join(60)
    with closing(Ledger(url)) as ledger:
        gallery = Gallery(ledger)
        found = {entry.id for entry in gallery.page(100)}
        assert set(told) <= found
        assert len(told) >= 4
        for name in found:
            PIL.Image.open(io.BytesIO(gallery.file(name) or b"")).load()


def test_the_operator_lists_and_removes(url: str, capsys: Any) -> None:
    from onestill.cli import main

    with closing(Ledger(url)) as ledger:
        entry = Gallery(ledger).add(b"x", owner="a", **ROW)
    assert main(["gallery", "list", "--database", url]) == 0
    assert entry.id in capsys.readouterr().out
    assert main(["gallery", "list", "--database", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"][0]["prompt"] == "a"
    assert main(["gallery", "remove", entry.id, "--database", url]) == 0
    assert main(["gallery", "remove", entry.id, "--database", url]) == 2
    assert "There is no picture" in capsys.readouterr().err


def test_a_database_that_is_newer_is_told(url: str) -> None:
    with closing(Ledger(url)) as ledger, ledger.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(OnestillError, match="database"):
        Ledger(url)
