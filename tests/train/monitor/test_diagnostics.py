from __future__ import annotations

from typing import Any

from onestill.train.monitor.diagnostics import PATIENCE, Watch, heads


def row(hinge: float, real: float = 0.0, fake: float = 0.0, **more: Any) -> dict[str, Any]:
    logits = {f"{kind}_logits/{k}": 0.0 for kind in ("real", "fake") for k in range(3)}
    return {"hinge": hinge, "real_logits": real, "fake_logits": fake, "r1": 1.0, **logits, **more}


def said(rows: list[dict[str, Any]]) -> list[str]:
    watch = Watch()
    return [warning for one in rows for warning in watch.look(one)]


def test_a_healthy_game_is_left_alone() -> None:
    assert heads(row(4.0)) == 3
    assert said([row(4.0, 0.4, -0.4)] * 20) == []


def test_heads_that_have_won_are_named_once_with_the_remedy() -> None:
    won = [row(0.1, 2.0, -2.0)] * PATIENCE
    (warning,) = said(won * 3)
    assert "gamma_r1" in warning
    assert said(won[1:]) == []  # not long enough
    assert len(said([*won, row(4.0, 0.4, -0.4), *won])) == 2  # gone and back


def test_heads_that_know_nothing() -> None:
    (warning,) = said([row(6.0, 0.01, 0.0)] * PATIENCE)
    assert "heads.lr" in warning
    assert said([row(6.0, 0.5, -0.5)] * PATIENCE) == []


def test_steep_heads() -> None:
    (warning,) = said([row(4.0, 0.4, -0.4, r1=1e6)] * PATIENCE)
    assert "R1" in warning


def test_a_sheet_speaks_by_itself() -> None:
    watch = Watch()
    assert watch.look({"steps_4_to_1": 0.3}) == []
    assert "student_input.timesteps" in watch.look({"steps_4_to_1": 1.4})[0]
    assert watch.look({"steps_4_to_1": 1.4}) == []


def test_rows_without_heads_or_numbers() -> None:
    assert said([{"loss": 0.1, "hinge": None}] * 20) == []
