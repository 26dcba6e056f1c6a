"""A PostgreSQL of the test's own, in a folder, on a socket there. Skips where it is not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

USER = "nobody"  # PostgreSQL refuses to run as root


@contextmanager
def postgres() -> Iterator[str]:
    """Yields a URL for `--database`."""
    initdb, server = shutil.which("initdb"), shutil.which("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed")
    as_user = ["setpriv", "--reuid", USER, "--regid", "nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a short path, as a socket's must be
    folder.chmod(0o777)
    data = folder / "data"
    process = None
    try:
        subprocess.run(
            [*as_user, initdb, "-D", data, "-U", "onestill", "-A", "trust", "--no-sync"],
            check=True,
            capture_output=True,
        )
        options = ["-c", "listen_addresses=", "-k", str(folder), "-c", "max_connections=20"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen([*as_user, server, "-D", data, *options], stdout=log, stderr=log)
        ready = ["pg_isready", "-h", str(folder), "-U", "onestill", "-t", "30"]
        for _ in range(100):
            if subprocess.run(ready, capture_output=True).returncode == 0:
                break
            process.poll()
        yield f"postgresql://onestill@/postgres?host={folder}"
    finally:
        if process is not None:
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
