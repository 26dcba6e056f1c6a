"""The shards that a recipe's `[data]` table names, in an order that training can resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from onestill.data.shards import ReaderState, Sample, ShardReader


class DataTable(Protocol):
    """What is read of a recipe's `[data]` table: `onestill.train.recipe.DataOptions`, which data does not import."""

    @property
    def shards(self) -> list[str]:
        """Tar files, folders of them, or `sample` for the packaged set, which an empty list also means."""

    @property
    def seed(self) -> int:
        """Decides the order."""

    @property
    def images(self) -> bool:
        """Whether pictures are decoded."""

    @property
    def workers(self) -> int:
        """How many processes decode; with 0 the caller's thread does."""


class RecipeReader:
    """An endless iterator of samples that gives and takes back its state: `onestill.train.batches.Reader`.

    Args:
        options: a recipe's `[data]` table.
        part: (i, n), every n-th place of the order from i on; for process i of n.
    """

    def __init__(self, options: DataTable, part: tuple[int, int] = (0, 1)) -> None:
        self.shards = ShardReader(
            options.shards or ["sample"],
            seed=options.seed,
            images=options.images,
            workers=options.workers,
            shuffle=True,
            part=part,
        )

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.shards)

    def state(self) -> dict[str, Any]:
        """Where the reader stands, in values that JSON can hold."""
        return dict(self.shards.state.as_dict())

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to where a reader stood when it gave `state`."""
        self.shards.state = ReaderState.from_dict(state)
