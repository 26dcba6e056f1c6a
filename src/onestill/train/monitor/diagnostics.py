"""What a run's numbers say while it goes wrong, each with what to do about it. Reads rows of the log, nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
PATIENCE = 5  # rows in a row before a sign is believed


def heads(row: Row) -> int:
    """How many heads the row tells of."""
    return sum(key.startswith("real_logits/") for key in row)


def _won(row: Row) -> bool:
    # A head's hinge is 2 when it knows nothing and 0 when every logit is beyond the margin.
    return heads(row) > 0 and _number(row, "hinge") < 0.1 * heads(row)


def _blind(row: Row) -> bool:
    margin = _number(row, "real_logits") - _number(row, "fake_logits")
    return heads(row) > 0 and 1.9 * heads(row) < _number(row, "hinge") < 2.2 * heads(row) and abs(margin) < 0.05


def _steep(row: Row) -> bool:
    return _number(row, "r1") > 1e4


def _steps_leave(row: Row) -> bool:
    # Latents have unit variance: two independent pictures are 1.41 apart.
    return any(_number(row, key) > 1.3 for key in row if key.endswith("_to_1"))


SIGNS: dict[str, tuple[Callable[[Row], bool], str]] = {
    "saturation": (
        _won,
        "the heads have won (hinge near 0): raise adversarial.gamma_r1, lower heads.lr, or show them more noise "
        "(discriminator_input: t_high, augment).",
    ),
    "blind": (
        _blind,
        "the heads tell nothing apart (hinge near 2 for each): lower adversarial.weight, as the student may outrun "
        "them, raise heads.lr, or look at the feature network.",
    ),
    "steep": (_steep, "R1 is above 10000: the heads are very steep in their features. Raise adversarial.gamma_r1."),
    "steps": (
        _steps_leave,
        "pictures of more steps are unlike those of one step from the same noise: the timesteps trained "
        "(student_input.timesteps) may not be those sampled.",
    ),
}


class Watch:
    """Looks at each row; says a sign once it has held for `PATIENCE` rows, and again only after it was gone."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    def look(self, row: Row) -> list[str]:
        """The warnings that this row brings."""
        said = []
        for name, (holds, remedy) in SIGNS.items():
            if (name == "steps") != any(key.endswith("_to_1") for key in row):
                continue  # a sheet's numbers and the log's come apart
            if not holds(row):
                self._held[name] = 0
                continue
            self._held[name] += 1
            # A sheet's numbers come seldom, and each is a verdict by itself.
            if self._held[name] == (1 if name == "steps" else PATIENCE):
                said.append(remedy)
        return said


def _number(row: Row, key: str) -> float:
    """A value of the row, NaN where it is missing; comparisons with NaN are false."""
    value = row.get(key)
    return float("nan") if value is None else float(value)
