from __future__ import annotations

import pytest

from onestill.serve.web.messages import pack, unpack


def test_packing_is_its_own_inverse() -> None:
    assert unpack(pack({"a": 1}, b"xyz")) == ({"a": 1}, b"xyz")
    with pytest.raises(ValueError, match="length"):
        unpack(b"\0\0\0\x09{}")
