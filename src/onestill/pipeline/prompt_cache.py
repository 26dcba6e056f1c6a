"""The states of the last prompts, so that a prompt that is drawn again is not encoded again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from onestill.engine.protocol import Conditioning, Engine

MOST_PROMPTS = 256  # some 50 KB each for the shipped model


class PromptCache:
    """Encodes prompts with an engine and remembers the last ones. Any number of threads may call it at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._states: OrderedDict[str, Conditioning] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of the prompts, in their order; each distinct one is encoded at most once."""
        distinct = dict.fromkeys(prompts)
        with self._lock:
            known = {prompt: self._states[prompt] for prompt in distinct if prompt in self._states}
        new = [prompt for prompt in distinct if prompt not in known]
        if new:  # encoded without the lock, which would make other threads wait for the text encoder
            found = self._engine.encode(new)
            known |= {prompt: found[i : i + 1] for i, prompt in enumerate(new)}
        with self._lock:
            for prompt, states in known.items():
                self._states[prompt] = states
                self._states.move_to_end(prompt)
            while len(self._states) > MOST_PROMPTS:
                self._states.popitem(last=False)
        return Conditioning.joined([known[prompt] for prompt in prompts])
