from __future__ import annotations

import numpy as np
import pytest

from onestill.errors import DataError
from onestill.evaluate.alignment import clip_scores, feature_diversity, pixel_diversity, retrieval_hits, style_hits


def directions(count: int, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width))


def test_clip_score_is_a_hundred_times_the_cosine() -> None:
    images = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0]])
    texts = np.array([[1.0, 0.0], [0.0, -1.0], [1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(clip_scores(images, texts), [100, -100, 100 / 2**0.5, 0], atol=1e-12)
    with pytest.raises(DataError, match="one text embedding"):
        clip_scores(images, texts[:2])


def test_retrieval_finds_equal_embeddings_and_guesses_by_chance() -> None:
    texts = directions(300)
    captions = [f"caption {i}" for i in range(300)]
    assert retrieval_hits(texts, texts, captions).mean() == 1
    assert retrieval_hits(directions(300, seed=1), texts, captions).mean() == pytest.approx(0.01, abs=0.02)


def test_retrieval_is_the_same_for_the_same_seed_only() -> None:
    texts, captions = directions(300), [f"caption {i}" for i in range(300)]
    images = texts + 3.0 * directions(300, seed=2)
    first = retrieval_hits(images, texts, captions, seed=3)
    assert (first == retrieval_hits(images, texts, captions, seed=3)).all()
    assert (first != retrieval_hits(images, texts, captions, seed=4)).any()


def test_a_network_that_says_the_same_of_everything_scores_chance() -> None:
    captions = [f"caption {i}" for i in range(120)]
    hits = retrieval_hits(directions(120), np.ones((120, 64)), captions)
    np.testing.assert_allclose(hits, 0.01)


def test_a_repeated_caption_is_never_its_own_distractor() -> None:
    # Ten captions, each twelve times over: if copies were distractors, a perfect network would tie with itself.
    captions = [f"Caption  {i % 10}" if i % 2 else f"caption {i % 10}" for i in range(120)]
    texts = directions(10)[np.arange(120) % 10]
    assert (retrieval_hits(texts, texts, captions, among=10) == 1).all()
    with pytest.raises(DataError, match="11 needs at least 11 distinct captions, got 10"):
        retrieval_hits(texts, texts, captions, among=11)


def test_style_is_judged_against_every_style() -> None:
    styles = np.eye(3)
    images = np.array([[1.0, 0.1, 0.0], [0.0, 0.2, 1.0], [1.0, 1.0, 0.0]])
    np.testing.assert_allclose(style_hits(images, styles, [0, 1, 1]), [1, 0, 0.5])


def test_diversity_is_zero_for_copies_and_the_mean_distance_otherwise() -> None:
    features = np.zeros((2, 3, 2))
    features[1] = [[0, 0], [3, 4], [6, 8]]
    np.testing.assert_allclose(feature_diversity(features), [0, (5 + 10 + 5) / 3])
    with pytest.raises(DataError, match="two seeds"):
        feature_diversity(features[:, :1])


def test_pixel_diversity_spans_its_range() -> None:
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    assert pixel_diversity(pictures) == 0
    pictures[1] = 255
    assert pixel_diversity(pictures) == pytest.approx(0.5)
