"""Does a picture show what its caption says, and do several seeds give several pictures?

Pure functions of embeddings (an image-text network's) and features; see `colour.py` for colours by name.

Shapes: N pictures, D embedding width, P prompts, S seeds, F feature width, K styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onestill.errors import DataError

Float = NDArray[np.float64]


def unit(vectors: NDArray[Any]) -> Float:
    """The vectors [..., D] scaled to length 1; a zero vector stays zero."""
    wide = np.asarray(vectors, np.float64)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    return np.asarray(wide / np.where(length > 0, length, 1), np.float64)


def clip_scores(images: NDArray[Any], texts: NDArray[Any]) -> Float:
    """100 x the cosine between each picture's embedding and its own caption's: the CLIP score, one per picture.

    Not clipped at 0 and not multiplied by CLIPScore's 2.5 (Hessel et al. 2021): a mean of plain cosines, comparable
    only within one network.

    Args:
        images: [N, D], any length.
        texts: [N, D], row i the caption of picture i.

    Returns:
        [N], each in [-100, 100].
    """
    if images.shape != texts.shape or images.ndim != 2:
        raise DataError(f"need one text embedding a picture, got {list(images.shape)} and {list(texts.shape)}")
    return np.asarray(100 * (unit(images) * unit(texts)).sum(axis=-1), np.float64)


def normalise_caption(caption: str) -> str:
    """The form in which two captions count as the same: case and spacing ignored."""
    return " ".join(caption.casefold().split())


def retrieval_hits(
    images: NDArray[Any], texts: NDArray[Any], captions: Sequence[str], *, among: int = 100, seed: int = 0
) -> Float:
    """Top-1 caption retrieval: is a picture's own caption the nearest of `among` different ones?

    Each picture meets its caption and `among - 1` distractors, drawn by `seed` without replacement from the *distinct*
    other captions of the set, so chance is exactly 1 / among however often a caption repeats, and every contender
    meets the same distractors. A tie for the first place gives each tied caption its share, so a network that says the
    same of everything scores 1 / among and not 1.

    Args:
        images: [N, D].
        texts: [N, D], row i embeds `captions[i]`.
        captions: N captions.
        among: how many captions to choose from, at least 2.
        seed: draws the distractors.

    Returns:
        [N], each in [0, 1]; the mean is the accuracy.

    Raises:
        DataError: fewer than `among` distinct captions.
    """
    first: dict[str, int] = {}
    own = np.array([first.setdefault(normalise_caption(caption), i) for i, caption in enumerate(captions)])
    distinct = np.array(sorted(first.values()))
    if among < 2 or len(distinct) < among:
        raise DataError(
            f"retrieval among {among} needs at least {max(among, 2)} distinct captions, got {len(distinct)}; "
            f"add captions or lower 'among'"
        )
    image, text = unit(images), unit(texts)
    rng = np.random.default_rng(seed)
    hits = np.empty(len(own))
    for i, mine in enumerate(own):
        # One more than needed is drawn, so that leaving out the picture's own caption keeps exactly `among - 1`.
        drawn = rng.choice(distinct, size=among, replace=False)
        others = drawn[drawn != mine][: among - 1]
        similar = text[np.concatenate(([mine], others))] @ image[i]
        best = np.isclose(similar, similar.max(), rtol=0, atol=1e-9)
        hits[i] = best[0] / best.sum()
    return hits


def style_hits(images: NDArray[Any], styles: NDArray[Any], asked: Sequence[int]) -> Float:
    """Zero-shot style: is the asked style's text embedding the nearest of all styles'?

    Args:
        images: picture embeddings [N, D].
        styles: one text embedding a style [K, D], of the style's name alone.
        asked: N indices into `styles`.

    Returns:
        [N], 1 for a hit and 0 for a miss; ties share as in `retrieval_hits`.
    """
    similar = unit(images) @ unit(styles).T  # [N, K]
    best = np.isclose(similar, similar.max(axis=1, keepdims=True), rtol=0, atol=1e-9)
    wanted = best[np.arange(len(best)), np.asarray(asked, np.intp)]
    return np.asarray(wanted / best.sum(axis=1), np.float64)


def feature_diversity(features: NDArray[Any]) -> Float:
    """Mean Euclidean distance between the pictures that different seeds give for one prompt.

    Args:
        features: [P, S, F], S >= 2 seeds a prompt.

    Returns:
        [P], one mean over the S (S - 1) / 2 pairs per prompt, in the feature network's units.
    """
    wide = np.asarray(features, np.float64)
    if wide.ndim != 3 or wide.shape[1] < 2:
        raise DataError(f"diversity needs features [P, S>=2, F], got {list(wide.shape)}; draw two seeds or more")
    left, right = np.triu_indices(wide.shape[1], 1)
    return np.asarray(np.linalg.norm(wide[:, left] - wide[:, right], axis=-1).mean(axis=1), np.float64)


def pixel_diversity(pictures: NDArray[np.uint8]) -> float:
    """Standard deviation of a pixel over the seeds of one prompt, root mean square over pixels and channels.

    Args:
        pictures: uint8 [S, H, W, 3], S >= 2 seeds.

    Returns:
        0 (all alike) to about 0.5, in units of the full range of a channel.
    """
    if pictures.ndim != 4 or len(pictures) < 2:
        raise DataError(f"diversity needs pictures [S>=2, H, W, 3], got {list(pictures.shape)}; draw two seeds or more")
    return float(np.sqrt((pictures.astype(np.float64) / 255).var(axis=0).mean()))
