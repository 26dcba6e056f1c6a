from __future__ import annotations

import pytest
import torch

from onestill.train.discriminator.heads import LEVEL_WIDTH, Discriminator, HeadCondition, level_embedding
from onestill.train.losses import hinge_discriminator, r1

WIDTHS, TEXT, IMAGE = (6, 10), 5, 7


def features(seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(3, count, width, generator=draw) for count, width in zip((16, 4), WIDTHS, strict=True)]


def conditions() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    return torch.randn(3, TEXT, generator=draw), torch.randn(3, IMAGE, generator=draw)


def new(text: int = TEXT, image: int = IMAGE, seed: int = 0) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(WIDTHS, 16, text, image)


def test_a_logit_for_each_token_of_each_feature() -> None:
    logits = new()(features(), HeadCondition(*conditions()))
    assert [tuple(logit.shape) for logit in logits] == [(3, 16), (3, 4)]
    assert all(logit.dtype == torch.float32 for logit in logits)


def test_each_condition_matters() -> None:
    network = new().eval()
    text, image = conditions()
    base = network(features(), HeadCondition(text, image))
    for other in (
        network(features(), HeadCondition(text + 1, image)),
        network(features(), HeadCondition(text, image + 1)),
        network(features(), HeadCondition(None, image)),
    ):
        assert all(not torch.allclose(a, b) for a, b in zip(base, other, strict=True))


def test_a_zero_image_condition_counts_for_nothing_but_its_bias() -> None:
    network = new(image=IMAGE).eval()
    for head in network.heads:
        torch.nn.init.zeros_(head.image.bias)  # type: ignore[union-attr, arg-type]
    text, image = conditions()
    blind, without = (
        network(features(), HeadCondition(text, torch.zeros_like(image))),
        network(features(), HeadCondition(text, None)),
    )
    assert all(torch.allclose(a, b) for a, b in zip(blind, without, strict=True))


def test_conditions_left_out_have_no_weights() -> None:
    names = [name for name, _ in new(text=0, image=0).named_parameters()]
    assert not [name for name in names if ".text" in name or ".image" in name]
    bare = new(text=0, image=0).eval()
    text, image = conditions()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            bare(features(), HeadCondition(None, None)), bare(features(), HeadCondition(text, image)), strict=True
        )
    )


def test_the_right_caption_is_told_from_a_wrong_one() -> None:
    """Projection: the difference that a caption makes is the inner product of its direction with the features."""
    network = new(image=0).eval()
    text, _ = conditions()
    with torch.no_grad():
        without = network(features(), HeadCondition(None, None))
        once = network(features(), HeadCondition(text, None))
        twice = network(features(), HeadCondition(2 * text, None))
        bias = network(features(), HeadCondition(torch.zeros_like(text), None))
    for none, one, two, zero in zip(without, once, twice, bias, strict=True):
        torch.testing.assert_close(two - zero, 2 * (one - zero), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(zero, none)


def test_two_instances_share_nothing() -> None:
    one, other = new(seed=0), new(seed=1)
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}
    before = [p.clone() for p in other.parameters()]
    optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
    text, image = conditions()
    hinge_discriminator(
        one(features(), HeadCondition(text, image)), one(features(1), HeadCondition(text, image))
    ).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_spectral_norm_holds_every_layer() -> None:
    network = new()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("original"):
                parameter.mul_(100)
    for _ in range(30):
        network(features(), HeadCondition(*conditions()))  # power iterations
    for head in network.heads:
        for layer in (head.enter, *head.mix, head.judge, head.text, head.image):
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)  # type: ignore[union-attr, operator]
            assert norm.item() == pytest.approx(1, abs=0.05)


def test_r1_reaches_every_weight() -> None:
    network = new()
    real = [one.requires_grad_() for one in features()]
    text, image = conditions()
    r1(real, network(real, HeadCondition(text, image))).backward()
    weights = [p for name, p in network.named_parameters() if "weight" in name]  # a bias may leave the slope as it is
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)


def test_the_noise_level_is_a_condition_of_its_own() -> None:
    torch.manual_seed(0)
    network = Discriminator(WIDTHS, 16, 0, 0, LEVEL_WIDTH).eval()
    low, high = (HeadCondition(level=level_embedding(torch.full((3,), t))) for t in (10, 900))
    assert all(
        not torch.allclose(a, b) for a, b in zip(network(features(), low), network(features(), high), strict=True)
    )
    embedded = level_embedding(torch.tensor([0, 999]))
    assert embedded.shape == (2, LEVEL_WIDTH)
    torch.testing.assert_close(embedded[0], torch.cat([torch.ones(32), torch.zeros(32)]))


@pytest.mark.parametrize("blocks", [1, 3])
def test_each_block_lets_a_logit_see_one_place_further(blocks: int) -> None:
    torch.manual_seed(0)
    head = Discriminator((6,), 16, 0, 0, blocks=blocks).heads[0].eval()
    head.norm = torch.nn.Identity()  # its statistics are those of the whole grid
    feature = torch.randn(1, 81, 6, requires_grad=True)
    head(feature, HeadCondition())[0, 40].backward()  # the middle of 9 x 9
    assert feature.grad is not None
    seen = feature.grad.abs().sum(2).view(9, 9).nonzero()
    assert (seen.max(0).values - seen.min(0).values).tolist() == [2 * blocks, 2 * blocks]
