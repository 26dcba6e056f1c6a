from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onestill.errors import DataError
from onestill.evaluate import Contender, Evaluation, Protocol, evaluate, frechet_ratio
from onestill.evaluate.samples import load_samples
from tests.evaluate.shapes import KINDS, NAMES, Painter, colour_network

PROMPTS = tuple(f"a {colour} {kind}, style {i % 3}" for i, colour in enumerate(NAMES) for kind in KINDS)
PROTOCOL = Protocol(
    prompts=PROMPTS,
    seeds=tuple(range(len(PROMPTS))),
    sheets={"some": (0, 5, 39)},
    num_worst=3,
    num_diversity_prompts=4,
    retrieval_among=100,
    batch_size=7,
)


def reference(seed: int = 1000) -> Iterator[np.ndarray]:
    painter = Painter()
    for i in range(0, len(PROMPTS), 16):
        yield painter(PROMPTS[i : i + 16], [seed + j for j in range(i, min(i + 16, len(PROMPTS)))])


def run(folder: Path, good: Painter, bad: Painter, protocol: Protocol = PROTOCOL) -> Evaluation:
    contenders = [
        Contender("good, 1 step", good, 1, group="student"),
        Contender("bad, 1 step", bad, 1, 2.0, group="teacher"),
    ]
    networks = [colour_network(), colour_network("other")]
    return evaluate(contenders, protocol, reference(), networks, folder, floor=reference(5000))


def test_the_better_contender_is_better_by_every_figure(tmp_path: Path) -> None:
    done = run(tmp_path, Painter(), Painter(mistakes=0.8, spread=0.0))
    good, bad = done.results
    distance = good.frechet_distance
    assert distance is not None
    assert bad.frechet_distance is not None
    assert distance.value < bad.frechet_distance.value
    assert distance.low < distance.value < distance.high
    assert done.floor == pytest.approx(distance.value, abs=5 * abs(distance.high - distance.value))
    assert good.clip_score.value > bad.clip_score.value
    assert good.retrieval.value > bad.retrieval.value
    assert good.colour is not None
    assert good.colour.value == 1
    assert len(good.colour_verdicts) == 100
    assert bad.colour is not None
    assert bad.colour.value < 0.5
    assert good.frechet_by_network["colours"] == pytest.approx(good.frechet_distance.value)
    assert set(good.frechet_by_network) == {"colours", "other"}
    assert good.coverage is not None
    assert good.coverage > 0.6
    ratio = frechet_ratio(bad, good)
    assert ratio.value > 1
    assert ratio.low < ratio.value < ratio.high
    assert done.real.clip_score.value == pytest.approx(good.clip_score.value, abs=2)
    assert done.result("good, 1 step") is good
    with pytest.raises(DataError, match="good, 1 step, bad, 1 step"):
        done.result("ugly")


def test_pictures_to_show_are_the_ones_named(tmp_path: Path) -> None:
    painter = Painter()
    done = run(tmp_path, painter, Painter(mistakes=0.5))
    good = done.pictures("good, 1 step")
    for index, picture in zip(PROTOCOL.kept, good.kept, strict=True):
        assert (picture == painter([PROMPTS[index]], [index])[0]).all()
    bad = done.drawn[1]
    assert len(bad.worst) == len(bad.worst_pictures) == 3
    scores = colour_network().embed(bad.features["colours"])
    texts = colour_network().texts(PROMPTS)
    cosines = (scores * texts).sum(1) / np.linalg.norm(scores, axis=1) / np.linalg.norm(texts, axis=1)
    assert list(bad.worst) == list(np.argsort(cosines, kind="stable")[:3])
    assert good.diversity_pictures.shape == (4, 4, 32, 32, 3)


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    class Killed(Painter):
        def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
            raise KeyboardInterrupt

    good = Painter()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, good, Killed())
    assert [path.name for path in tmp_path.iterdir()] == ["good-1-step.safetensors"]
    calls = good.calls
    resumed = run(tmp_path, good, Painter(mistakes=0.5))
    assert good.calls == calls
    fresh = run(tmp_path / "fresh", Painter(), Painter(mistakes=0.5))
    for again, first in zip(resumed.results, fresh.results, strict=True):
        assert replace(again, ms_per_picture=None) == replace(first, ms_per_picture=None)


def test_saved_material_is_used_for_the_same_question_only(tmp_path: Path) -> None:
    good, bad = Painter(), Painter()
    run(tmp_path, good, bad)
    calls = good.calls
    run(tmp_path, good, bad, replace(PROTOCOL, seeds=tuple(range(1, len(PROMPTS) + 1))))
    assert good.calls == 2 * calls
    path = tmp_path / "good-1-step.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert load_samples(tmp_path, "good, 1 step", "any") is None
    run(tmp_path, good, bad, replace(PROTOCOL, seeds=tuple(range(1, len(PROMPTS) + 1))))
    assert good.calls == 3 * calls


def test_styles_are_scored_over_the_prompts_that_ask_for_one(tmp_path: Path) -> None:
    # The network knows colours only, so colours stand in for styles.
    styles = tuple(next(c for c in NAMES if c in prompt) if i % 2 else None for i, prompt in enumerate(PROMPTS))
    done = run(tmp_path, Painter(), Painter(mistakes=0.9), replace(PROTOCOL, styles=styles))
    good, bad = done.results
    assert good.style is not None
    assert bad.style is not None
    assert good.style.value > bad.style.value


def test_every_contender_gets_the_same_prompts_and_seeds_in_any_batch(tmp_path: Path) -> None:
    small = run(tmp_path / "a", Painter(), Painter(mistakes=0.5), replace(PROTOCOL, batch_size=1))
    large = run(tmp_path / "b", Painter(), Painter(mistakes=0.5), replace(PROTOCOL, batch_size=1000))
    for one, other in zip(small.results, large.results, strict=True):
        assert replace(one, ms_per_picture=None) == replace(other, ms_per_picture=None)


def test_tests_can_be_left_out(tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, colour_test=None, num_diversity_prompts=0, num_worst=0, sheets={})
    result = run(tmp_path, Painter(), Painter(), protocol).results[0]
    assert result.colour is None
    assert result.diversity is None


def test_wrong_pictures_and_names_are_refused(tmp_path: Path) -> None:
    painter = Painter()
    network = colour_network()
    twice = [Contender("a b", painter, 1), Contender("a-b", painter, 1)]
    with pytest.raises(DataError, match="unlike 'a b' and 'a-b'"):
        evaluate(twice, PROTOCOL, reference(), [network], tmp_path)
    with pytest.raises(DataError, match="needs a feature network"):
        evaluate(twice[:1], PROTOCOL, reference(), [], tmp_path)
    floats = Contender("floats", lambda p, s: np.zeros((len(p), 8, 8, 3)), 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(DataError, match="floats gave float64"):
        evaluate([floats], PROTOCOL, reference(), [network], tmp_path)
    with pytest.raises(DataError, match="the reference gave pictures for 16 of the 40"):
        evaluate([], PROTOCOL, [next(reference())], [network], tmp_path)
    with pytest.raises(DataError, match="one seed for each"):
        Protocol(prompts=("a", "b"), seeds=(1,))
    with pytest.raises(DataError, match="names prompt 2"):
        Protocol(prompts=("a", "b"), seeds=(1, 2), sheets={"s": (2,)})
