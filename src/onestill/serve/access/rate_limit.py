"""How often one may ask: a bucket that fills with time, from which each request takes a drop."""

from __future__ import annotations

import time

__all__ = ["Bucket", "Buckets"]

NAMES_KEPT = 4096


class Bucket:
    """Full at first; `most` may come at once, `each_s` a second in the long run."""

    def __init__(self, each_s: float, most: float) -> None:
        self._each_s = each_s
        self._left = self._most = most
        self._at = time.monotonic()

    def take(self) -> bool:
        """Take a drop, where there is one."""
        self.fill()
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def fill(self) -> bool:
        """Let in what has come since the last time; returns whether it is full."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._each_s)
        self._at = now
        return self._left >= self._most


class Buckets:
    """One for each name. A full bucket is one that nobody used, so those are what is forgotten when there are many."""

    def __init__(self, each_s: float, most: float) -> None:
        self._each_s, self._most = each_s, most
        self._found: dict[str, Bucket] = {}

    def take(self, name: str) -> bool:
        """Take a drop from the bucket of this name. With too many names in use, new ones find nothing."""
        if name not in self._found:
            if len(self._found) >= NAMES_KEPT:
                self._found = {name: one for name, one in self._found.items() if not one.fill()}
            if len(self._found) >= NAMES_KEPT:
                return False
            self._found[name] = Bucket(self._each_s, self._most)
        return self._found[name].take()
