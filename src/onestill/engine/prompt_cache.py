"""The states of the last prompts, so that a prompt that is drawn again is not encoded again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

MOST_PROMPTS = 256  # of a model; the shipped one's take some 50 KB each, SDXL's 0.3 MB
S = TypeVar("S")


class PromptCache(Generic[S]):
    """Remembers what `encode` made of each of the last prompts. Any number of threads may call it at once.

    Args:
        encode: distinct prompts -> the states of each.
    """

    def __init__(self, encode: Callable[[list[str]], Sequence[S]]) -> None:
        self._encode = encode
        self._states: OrderedDict[str, S] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, prompts: Sequence[str]) -> list[S]:
        """The states of the prompts, in their order; each distinct one is encoded at most once."""
        distinct = dict.fromkeys(prompts)
        with self._lock:
            known = {prompt: self._states[prompt] for prompt in distinct if prompt in self._states}
        new = [prompt for prompt in distinct if prompt not in known]
        if new:  # encoded without the lock, which would make other threads wait for the text encoder
            known |= zip(new, self._encode(new), strict=True)
        with self._lock:
            for prompt, states in known.items():
                self._states[prompt] = states
                self._states.move_to_end(prompt)
            while len(self._states) > MOST_PROMPTS:
                self._states.popitem(last=False)
        return [known[prompt] for prompt in prompts]
