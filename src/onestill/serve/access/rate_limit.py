"""Rate limits by token buckets: a bucket fills with time, and each request takes one token from it."""

from __future__ import annotations

import time

__all__ = ["TokenBucket", "TokenBuckets"]

MOST_NAMES = 4096


class TokenBucket:
    """Allows `most` requests at once, and `each_s` a second in the long run. Starts full."""

    def __init__(self, each_s: float, most: float) -> None:
        self._each_s = each_s
        self._tokens = self._most = most
        self._at = time.monotonic()

    def take(self) -> bool:
        """Take a token; False where there is none."""
        if not self.has_one():
            return False
        self._tokens -= 1
        return True

    def has_one(self) -> bool:
        """Whether there is a token."""
        self.refill()
        return self._tokens >= 1

    def spend(self, tokens: float) -> float:
        """Take tokens, also those that are not there yet; returns the seconds until they will have been."""
        self.refill()
        self._tokens -= tokens
        return max(0.0, -self._tokens / self._each_s)

    def refill(self) -> bool:
        """Add the tokens of the time since the last call; returns whether the bucket is full."""
        now = time.monotonic()
        self._tokens = min(self._most, self._tokens + (now - self._at) * self._each_s)
        self._at = now
        return self._tokens >= self._most


class TokenBuckets:
    """A token bucket for each name. When there are many, the full ones are dropped: a new one would be full too."""

    def __init__(self, each_s: float, most: float) -> None:
        self._each_s, self._most = each_s, most
        self._buckets: dict[str, TokenBucket] = {}

    def is_empty(self, name: str) -> bool:
        """Whether there is no token of this name."""
        return name in self._buckets and not self._buckets[name].has_one()

    def take(self, name: str) -> bool:
        """Take a token of this name. With too many names in use, new ones are refused."""
        if name not in self._buckets:
            if len(self._buckets) >= MOST_NAMES:
                self._buckets = {name: one for name, one in self._buckets.items() if not one.refill()}
            if len(self._buckets) >= MOST_NAMES:
                return False
            self._buckets[name] = TokenBucket(self._each_s, self._most)
        return self._buckets[name].take()
