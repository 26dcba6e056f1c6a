"""A seed draws what torch's CPU generator draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from onestill.errors import StepsError
from onestill.noise import Generator, draw_noise, noise_source

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63, 2**64 - 1, -1, -2, -(2**63)]
# Short draws leave half a pair behind, odd lengths redraw their tail: what comes next must still agree.
SEQUENCE = [(4, 16, 16), (3,), (1,), (16,), (17,), (15,), (31,), (2, 1), (5,), (33,), (0,), (), (8,), (4, 9, 7), (1, 7)]
TOLERANCE = 5e-7  # one unit in the last place of the largest normals


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sequence_of_draws_equals_torch(seed: int) -> None:
    theirs, ours = torch.Generator("cpu").manual_seed(seed), Generator(seed)
    for shape in SEQUENCE:
        expected, got = torch.randn(shape, generator=theirs).numpy(), ours.randn(shape)
        assert got.dtype == np.float32
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("count", range(70))
def test_every_length_equals_torch(count: int) -> None:
    expected = torch.randn(count, generator=torch.Generator("cpu").manual_seed(5))
    np.testing.assert_allclose(Generator(5).randn((count,)), expected.numpy(), rtol=0, atol=TOLERANCE)


def test_a_large_draw_equals_torch() -> None:
    shape = (4, 251, 251)  # 16 does not divide it
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(9)).numpy()
    got = Generator(9).randn(shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    assert math.isclose(got.std(), 1.0, abs_tol=0.01)


def test_only_the_low_32_bits_of_a_seed_count() -> None:
    first = Generator(7).randn((20,))
    np.testing.assert_array_equal(Generator(7 + 2**32).randn((20,)), first)
    np.testing.assert_array_equal(Generator(7 - 2**32).randn((20,)), first)
    assert (Generator(8).randn((20,)) != first).any()


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_what_torch_refuses_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="Overflow"):
        torch.Generator("cpu").manual_seed(seed)
    with pytest.raises(StepsError, match="0 to 4294967295"):
        Generator(seed)


def test_an_image_has_the_same_noise_in_every_batch() -> None:
    shape, seeds = (4, 8, 8), [10, 11, 12, 13]
    batch = draw_noise(seeds, shape)
    assert batch.shape == (4, *shape)
    for index, seed in enumerate(seeds):
        np.testing.assert_array_equal(batch[index], draw_noise([seed], shape)[0])


def test_a_source_goes_on_where_it_stopped() -> None:
    draw = noise_source([3, 4], (2, 9))
    first, second = draw(-1), draw(0)
    np.testing.assert_array_equal(first, draw_noise([3, 4], (2, 9)))
    generator = torch.Generator("cpu").manual_seed(4)
    torch.randn((2, 9), generator=generator)
    expected = torch.randn((2, 9), generator=generator).numpy()
    np.testing.assert_allclose(second[1], expected, rtol=0, atol=TOLERANCE)
