from __future__ import annotations

import torch

from onestill.networks.condition import Condition, concatenated, pool


def condition(count: int, value: float = 1.0) -> Condition:
    mask = torch.ones(count, 3, dtype=torch.bool)
    return Condition(
        torch.full((count, 3, 4), value), mask, torch.full((count, 5), value), torch.full((count, 6), value)
    )


def test_dropped_prompts_become_the_empty_one_and_keep_their_sizes() -> None:
    mixed = condition(3).where(torch.tensor([False, True, False]), condition(1, 7.0))
    assert mixed.text[:, 0, 0].tolist() == [1, 7, 1]
    assert mixed.pooled is not None
    assert mixed.pooled[:, 0].tolist() == [1, 7, 1]
    assert mixed.sizes is not None
    assert mixed.sizes[:, 0].tolist() == [1, 1, 1]


def test_two_conditions_one_after_the_other() -> None:
    both = concatenated(condition(2), condition(1, 7.0).expand(2))
    assert both.text[:, 0, 0].tolist() == [1, 1, 7, 7]
    assert both.added["added_cond_kwargs"]["text_embeds"].shape == (4, 5)
    plain = Condition(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    assert concatenated(plain, plain).added == {}
    assert condition(1, 7.0).sized(condition(1)).sizes.tolist() == [[1.0] * 6]  # type: ignore[union-attr]


def test_an_embedding_is_the_pooled_one_or_the_mean_of_what_is_no_padding() -> None:
    assert condition(2).embedding.shape == (2, 5)
    text, mask = torch.tensor([[[1.0], [3.0], [50.0]]]), torch.tensor([[True, True, False]])
    assert Condition(text, mask).embedding.tolist() == [[2.0]]


def test_pooling_leaves_padding_out() -> None:
    text = torch.tensor([[[1.0], [3.0], [50.0]], [[7.0], [9.0], [9.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert pool(text, mask).tolist() == [[2.0], [0.0]]
