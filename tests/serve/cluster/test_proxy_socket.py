from __future__ import annotations

from onestill.serve.cluster.proxy_socket import _id_in
from onestill.serve.web.messages import pack


def test_the_proxy_reads_ids_as_a_replica_does() -> None:
    assert _id_in('{"id": 3, "prompt": 5}', 2**20) == 3
    assert _id_in(pack({"id": 3}, b"x"), 100) == 3
    for message in ('{"id": 3, "prompt": "' + "a" * 2**16 + '"}', pack({"id": 3}, b"x" * 100), "[3]", "{"):
        assert _id_in(message, 100) is None
