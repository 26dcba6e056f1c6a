from __future__ import annotations

import torch

from onestill.train.noise import Draw, Part
from onestill.train.optim.step import split


def everything(draw: Draw, count: int) -> list[torch.Tensor]:
    whole, weights = draw.normal(count, 2, 3), [1.0, 2.0, 3.0]
    return [whole, draw.uniform(count), draw.integers(3, 900, count), draw.choice(weights, count)]


def test_the_parts_of_any_world_are_the_rows_of_the_whole() -> None:
    whole = everything(Draw(torch.Generator().manual_seed(1)), 12)
    for world, passes in ((2, 1), (1, 3), (2, 3), (3, 2)):
        rows = 12 // (world * passes)
        for rank in range(world):
            held = torch.arange(12)[rank::world]  # what a reader gives this process
            for index in range(passes):
                mine = split({"rows": held}, passes)[index]["rows"]
                part = everything(Draw(torch.Generator().manual_seed(1), Part(rank, world, index, passes)), rows)
                for some, every in zip(part, whole, strict=True):
                    assert torch.equal(some, every[mine])


def test_every_process_leaves_the_generator_alike() -> None:
    states = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        generator = torch.Generator().manual_seed(5)
        draw = Draw(generator, Part(rank, world))
        everything(draw, 12 // world)
        states.append((generator.get_state().tolist(), draw.shared(0, 100, 3)))
    assert states[0] == states[1] == states[2]


def test_ranges_include_both_ends() -> None:
    draw = Draw(torch.Generator().manual_seed(0))
    assert set(draw.integers(3, 5, 200).tolist()) == {3, 4, 5}
    assert set(draw.shared(-1, 1, 200)) == {-1, 0, 1}
