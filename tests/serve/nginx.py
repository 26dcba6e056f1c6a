"""The proxy of `deploy/nginx.conf.template`, on this machine. Skips where nginx is not installed."""

from __future__ import annotations

import os
import shutil
import socket
import string
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[2] / "deploy" / "nginx.conf.template"
AROUND = """daemon off; pid pid; error_log error.log; worker_processes 1;
events { worker_connections 512; }
http { access_log off; include /etc/nginx/mime.types; client_body_temp_path body; proxy_temp_path proxy;
fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s; include site.conf; }
"""


@contextmanager
def nginx(one: str, two: str) -> Iterator[int]:
    """Yields the port; `one` and `two` are the servers, as host:port."""
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        pytest.skip("nginx is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="nginx") as folder:
        given = {"ONESTILL_LISTEN": f"127.0.0.1:{port}", "ONESTILL_ONE": one, "ONESTILL_TWO": two}
        # As the image's envsubst: names that are in the environment are filled in, nginx's own are left.
        site = string.Template(TEMPLATE.read_text()).safe_substitute(given)
        Path(folder, "site.conf").write_text(site)
        user = "user root;\n" if os.geteuid() == 0 else ""
        Path(folder, "nginx.conf").write_text(user + AROUND)
        process = subprocess.Popen([program, "-p", folder, "-c", "nginx.conf"], stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and process.poll() is None:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            assert process.poll() is None, process.communicate()[1]
            yield port
        finally:
            process.terminate()
            process.communicate(timeout=20)
