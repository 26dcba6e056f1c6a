"""A contender's samples: the features of all its pictures and the pixels of a few, drawn once, saved and read again.

Shapes: N prompts, F feature width, P diversity prompts, S diversity seeds, H W pixels.
"""

from __future__ import annotations

import heapq
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from onestill.checkpoint import written_whole
from onestill.errors import DataError, OutputError
from onestill.evaluate.alignment import clip_scores, pixel_diversity
from onestill.evaluate.colour import colour_prompts, named_colour
from onestill.evaluate.protocol import Contender, Network, Pictures, Protocol

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PromptSamples:
    """One picture for each of the N prompts, of a contender or of the reference.

    Attributes:
        features: network name -> [N, F] float32.
        kept: pictures of `Protocol.kept`, in that order.
        worst: indices of the pictures with the lowest CLIP scores, worst first.
        worst_scores: their CLIP scores.
        worst_pictures: those pictures.
    """

    features: dict[str, NDArray[np.float32]]
    kept: Pictures
    worst: tuple[int, ...]
    worst_scores: tuple[float, ...]
    worst_pictures: Pictures


@dataclass(frozen=True)
class Samples(PromptSamples):
    """Everything that the figures of one contender are computed from.

    Attributes:
        diversity_features: [P, S, F] float32 of the first network.
        diversity_pictures: [P, S, H, W, 3] for the first few prompts only.
        pixel_diversity: [P].
        colours_seen: families seen in the colour test, prompt by prompt and seed by seed; "" for an empty picture.
        colour_pictures: the pictures of the colour test, in that order.
        seconds: spent in `generate` for the N pictures.
    """

    diversity_features: NDArray[np.float32]
    diversity_pictures: Pictures
    pixel_diversity: NDArray[np.float64]
    colours_seen: tuple[str, ...]
    colour_pictures: Pictures
    seconds: float


_SHOWN_DIVERSITY_PROMPTS = 8  # with four seeds each, what fits on one screen of the report
_ARRAYS = ("kept", "worst_pictures", "diversity_features", "diversity_pictures", "pixel_diversity", "colour_pictures")
_FACTS = ("worst", "worst_scores", "colours_seen", "seconds")
_HEADER = "onestill.drawn"  # names the facts in a file's metadata, since version 0.1


def _checked(pictures: Any, count: int, who: str) -> Pictures:
    array = np.asarray(pictures)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or len(array) != count:
        raise DataError(
            f"{who} gave {array.dtype} {list(array.shape)} where uint8 [{count}, H, W, 3] is needed; convert to RGB"
        )
    return array


def observe(
    batches: Iterable[Pictures],
    protocol: Protocol,
    networks: list[Network],
    texts: NDArray[Any],
    who: str,
) -> PromptSamples:
    """Stream the pictures of the N prompts, in order, through the feature networks.

    One batch of pictures is held at a time, and those to be shown.

    Args:
        batches: pictures; only one batch is held at a time.
        protocol: says which pictures to keep.
        networks: the first one ranks the worst.
        texts: the prompts' embeddings by the first network [N, D].
        who: named in errors.

    Raises:
        DataError: pictures of a wrong shape or number.
    """
    kept_indices = set(protocol.kept)
    features: dict[str, list[NDArray[np.float32]]] = {network.name: [] for network in networks}
    kept: list[Pictures] = []
    heap: list[tuple[float, int, Pictures]] = []  # the worst so far, best of them first: (-score, index, picture)
    start = 0
    for batch in batches:
        pictures = _checked(batch, len(batch), who)
        stop = start + len(pictures)
        if stop > len(protocol.prompts):
            break
        for network in networks:
            features[network.name].append(np.asarray(network.features(pictures), np.float32))
        scores = clip_scores(networks[0].embed(features[networks[0].name][-1]), texts[start:stop])
        for offset, picture in enumerate(pictures):
            index = start + offset
            if index in kept_indices:
                kept.append(picture)
            entry = (-float(scores[offset]), index, picture)
            if len(heap) < protocol.num_worst:
                heapq.heappush(heap, entry)
            elif protocol.num_worst and entry[:2] > heap[0][:2]:
                heapq.heapreplace(heap, entry)
        start = stop
    if start != len(protocol.prompts):
        raise DataError(f"{who} gave pictures for {start} of the {len(protocol.prompts)} prompts; give one a prompt")
    worst = sorted(heap, key=lambda entry: (-entry[0], entry[1]))
    joined = {name: np.concatenate(parts) for name, parts in features.items()}
    return PromptSamples(
        joined,
        _joined(picture[None] for picture in kept),
        worst=tuple(index for _, index, _ in worst),
        worst_scores=tuple(-negated for negated, _, _ in worst),
        worst_pictures=_joined(picture[None] for _, _, picture in worst),
    )


def _joined(batches: Iterable[Pictures]) -> Pictures:
    """Batches one after the other; of none, no pictures of one pixel."""
    return np.concatenate(list(batches) or [np.zeros((0, 1, 1, 3), np.uint8)])


def draw_samples(
    contender: Contender,
    protocol: Protocol,
    networks: list[Network],
    texts: NDArray[Any],
    progress: Progress | None = None,
) -> Samples:
    """Draw everything that the protocol asks of a contender.

    Args:
        contender: whose `generate` is called with at most `protocol.batch_size` prompts at a time.
        protocol: the prompts, seeds and sets.
        networks: the first one is the headline's.
        texts: the prompts' embeddings by the first network [N, D].
        progress: called with (pictures done, pictures in all) after each batch.
    """
    seeds = protocol.diversity_seeds
    pairs = colour_prompts(protocol.colour_test) if protocol.colour_test else []
    total = protocol.num_pictures
    done, seconds = 0, 0.0

    def batches(prompts: list[str], all_seeds: list[int]) -> Iterator[Pictures]:
        nonlocal done, seconds
        for i in range(0, len(prompts), protocol.batch_size):
            asked = prompts[i : i + protocol.batch_size]
            began = time.perf_counter()
            pictures = contender.generate(asked, all_seeds[i : i + protocol.batch_size])
            seconds += time.perf_counter() - began
            done += len(asked)
            if progress:
                progress(done, total)
            yield _checked(pictures, len(asked), contender.name)

    stream = batches(list(protocol.prompts), list(protocol.seeds))
    observed = observe(stream, protocol, networks, texts, contender.name)
    main_seconds = seconds

    indices = protocol.diversity_indices
    again = [protocol.prompts[index] for index in indices for _ in seeds]
    flat = _joined(batches(again, list(seeds) * len(indices)))
    groups = flat.reshape(len(indices), len(seeds), *flat.shape[1:])  # [P, S, H, W, 3]
    spread = [np.asarray(networks[0].features(group), np.float32) for group in groups]

    asked = [prompt for prompt, _ in pairs for _ in protocol.colour_seeds]
    coloured = _joined(batches(asked, list(protocol.colour_seeds) * len(pairs)))
    return Samples(
        **vars(observed),
        diversity_features=np.stack(spread) if spread else np.zeros((0, 2, 1), np.float32),
        diversity_pictures=groups[:_SHOWN_DIVERSITY_PROMPTS],
        pixel_diversity=np.array([pixel_diversity(group) for group in groups]),
        colours_seen=tuple(named_colour(picture) or "" for picture in coloured),
        colour_pictures=coloured,
        seconds=main_seconds,
    )


def slug(name: str) -> str:
    """A contender's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-") or "contender"


def save_samples(samples: Samples, folder: Path, name: str, fingerprint: str) -> None:
    """Write a contender's samples so that a killed evaluation continues after it; each file appears whole.

    Raises:
        OutputError: the folder cannot be written.
    """
    tensors: dict[str, NDArray[Any]] = {f"features.{key}": value for key, value in samples.features.items()}
    tensors |= {key: np.ascontiguousarray(getattr(samples, key)) for key in _ARRAYS}
    facts = {"fingerprint": fingerprint, "name": name} | {key: getattr(samples, key) for key in _FACTS}
    path = folder / f"{slug(name)}.safetensors"
    try:
        # One file holds all, so that arrays and facts can never come from different runs.
        with written_whole(path) as unfinished:
            save_file(tensors, unfinished, metadata={_HEADER: json.dumps(facts)})
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror or error}); choose another folder") from error


def load_samples(folder: Path, name: str, fingerprint: str) -> Samples | None:
    """Read what `save_samples` wrote; None when it is missing, damaged, or of another protocol or contender."""
    path = folder / f"{slug(name)}.safetensors"
    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {})[_HEADER])
        if facts["fingerprint"] != fingerprint:
            return None
        tensors = load_file(path)
        prefix = "features."
        return Samples(
            features={key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)},
            worst=tuple(facts["worst"]),
            worst_scores=tuple(facts["worst_scores"]),
            colours_seen=tuple(facts["colours_seen"]),
            seconds=float(facts["seconds"]),
            **{key: tensors[key] for key in _ARRAYS},
        )
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
