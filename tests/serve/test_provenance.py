from __future__ import annotations

import base64
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from onestill import __version__
from onestill.cli import main
from onestill.errors import ImageError, OnestillError
from onestill.pipeline import Pipeline
from onestill.serve.provenance import Stamp, read_provenance
from onestill.serve.web.server import Settings
from tests.serve.certificates import certificates
from tests.serve.client import serving

pytest.importorskip("c2pa", reason="the extra [c2pa] is not installed")
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


@pytest.fixture(scope="module")
def stamp(tmp_path_factory: pytest.TempPathFactory) -> Stamp:
    return Stamp(*certificates(tmp_path_factory.mktemp("certificates")))


SIGNED = f"Signed by Draw of Test, which is on no list of trusted ones here; made with onestill {__version__}.\n"


def verified(path: Path) -> tuple[int, str]:
    """The exit status of `onestill verify` and what it printed after the first line."""
    done = subprocess.run(
        [sys.executable, "-m", "onestill", "verify", str(path)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout.partition("\n")[2]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_what_the_api_hands_out_is_signed_and_a_change_shows(
    tiny_pipe: Pipeline, stamp: Stamp, tmp_path: Path, kind: str
) -> None:
    with serving(tiny_pipe, Settings(stamp=stamp)) as served:
        data = base64.b64decode(served.draw(output_format=kind, seed=3).json["data"][0]["b64_json"])
    path = tmp_path / f"a.{kind}"
    path.write_bytes(data)
    found = read_provenance(path)
    assert found["format"] == kind.upper()
    assert found["parameters"].startswith("a red apple\nSeed: 3, ")
    manifest = found["manifest"]
    assert (manifest["state"], manifest["signer"], manifest["authority"]) == ("Valid", "Draw", "Test")
    assert manifest["generator"].startswith("onestill ")
    assert manifest["problems"] == ["signingCredential.untrusted"]
    assert len(data) < 30_000
    assert verified(path) == (0, found["parameters"] + "\n" + SIGNED)

    changed = data.replace(b"Seed: 3", b"Seed: 4")
    if kind == "png":  # whose chunks have a checksum each
        at = data.index(b"tEXtseed")
        changed = data[:at] + b"tEXtseed\x004" + zlib.crc32(b"tEXtseed\x004").to_bytes(4, "big") + data[at + 14 :]
    assert changed != data
    path.write_bytes(changed)
    status, said = verified(path)
    assert status == 1
    assert "Its signature does not hold: assertion.dataHash.mismatch" in said


def test_an_unsigned_picture_still_tells_its_parameters(tiny_pipe: Pipeline, tmp_path: Path, capsys: Any) -> None:
    path = tiny_pipe("a red apple", seed=1).save(0, tmp_path / "a.png")
    assert read_provenance(path)["manifest"] is None
    assert main(["verify", str(path)]) == 0
    said = capsys.readouterr().out
    assert "a red apple\nSeed: 1" in said
    assert "not signed" in said


def test_what_is_no_picture_and_what_is_no_certificate(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    for name in ("a.png", "none.png"):
        with pytest.raises(ImageError):
            read_provenance(tmp_path / name)
    with pytest.raises(OnestillError, match="PEM"):
        Stamp(tmp_path / "none.pem", tmp_path / "a.png")
    with pytest.raises(OnestillError, match="C2PA does not accept"):
        Stamp(tmp_path / "a.png", tmp_path / "a.png")
    assert main(["serve", "--port", "0", "--sign-key", str(tmp_path / "a.png")]) == 2
    assert "--sign-with" in capsys.readouterr().err
