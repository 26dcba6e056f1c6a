"""A certificate to sign pictures with, from an authority that the test makes."""

from __future__ import annotations

import subprocess
from pathlib import Path


def certificates(folder: Path) -> tuple[Path, Path]:
    """The chain (leaf, then authority) and the leaf's key, as PEM files."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    ours = ["-keyout", "ca.key", "-out", "ca.pem", "-subj", "/O=Test/CN=Authority", "-days", "9"]
    openssl("req", "-x509", *curve, *ours)
    openssl("req", *curve, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/O=Test/CN=Draw")
    (folder / "leaf.ext").write_text(
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
        "extendedKeyUsage=critical,emailProtection\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    )
    ca = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
    openssl("x509", "-req", "-in", "leaf.csr", *ca, "-out", "leaf.pem", "-days", "9", "-extfile", "leaf.ext")
    openssl("pkcs8", "-topk8", "-nocrypt", "-in", "leaf.key", "-out", "leaf.pk8")
    (folder / "chain.pem").write_text((folder / "leaf.pem").read_text() + (folder / "ca.pem").read_text())
    return folder / "chain.pem", folder / "leaf.pk8"
