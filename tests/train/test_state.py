from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from onestill.errors import CheckpointError, OutputError, RecipeError
from onestill.train import state as state_module
from onestill.train.state import (
    STATE_FILE,
    TrainState,
    checkpoints,
    drop_checkpoint,
    load_checkpoint,
    save_checkpoint,
    start_ema,
    sweep,
)


def new_state(seed: int) -> TrainState:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    network[0].weight.data = network[0].weight.data.t().contiguous().t()  # a stride that safetensors does not keep
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1 / 3, betas=(0.5, 0.99), fused=True)
    generator = torch.Generator().manual_seed(seed)
    return TrainState({"net": network}, {"net": optimizer}, {"net": start_ema(network)}, generator)


def steps(state: TrainState, count: int) -> list[float]:
    """`count` optimisation steps on noise; their losses."""
    losses = []
    for _ in range(count):
        x = torch.randn(5, 3, generator=state.generator)
        loss = (state.networks["net"](x) - x.sum(1, keepdim=True)).square().mean()
        state.optimizers["net"].zero_grad()
        loss.backward()
        state.optimizers["net"].step()
        state.iteration += 1
        state.nimg += 5
        state.update_ema(0.9)
        losses.append(loss.item())
    return losses


def test_round_trip_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    state = new_state(1)
    steps(state, 3)
    state.data, state.bad_steps = {"epoch": 1, "position": 7}, 2
    save_checkpoint(state, tmp_path / "00000003", '{"lr": 1}')
    expected = steps(state, 3)

    other = new_state(2)
    load_checkpoint(other, tmp_path / "00000003", '{"lr": 1}')
    assert (other.iteration, other.nimg, other.bad_steps) == (3, 15, 2)
    assert other.data == {"epoch": 1, "position": 7}
    assert steps(other, 3) == expected
    for name, value in state.networks["net"].state_dict().items():
        assert torch.equal(value, other.networks["net"].state_dict()[name]), name
    for name, value in state.ema["net"].items():
        assert torch.equal(value, other.ema["net"][name]), name
    assert torch.equal(state.generator.get_state(), other.generator.get_state())


def test_ema_is_the_running_mean_and_copies_what_cannot_be_averaged() -> None:
    state = new_state(1)
    state.iteration = 10_000
    before = {name: value.clone() for name, value in state.ema["net"].items()}
    with torch.no_grad():
        for value in state.networks["net"].state_dict().values():
            value.add_(1)
    state.update_ema(0.75)
    for name, value in state.ema["net"].items():
        moved = 0.25 if value.is_floating_point() else 1
        torch.testing.assert_close(value, before[name] + moved)
    assert state.averaged("net") is state.ema["net"]


def test_a_failure_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, folder = new_state(1), tmp_path / "00000000"
    save_checkpoint(state, folder, "{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    steps(state, 1)

    real, written = state_module.save_file, []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(OutputError, match=r"No space.*make room"):
        save_checkpoint(state, folder, "{}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["00000000"]


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    state, folder = new_state(1), tmp_path / "00000000"
    save_checkpoint(state, folder, "{}")
    (folder / "stray").touch()
    save_checkpoint(state, folder, "{}")
    assert not (folder / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["00000000"]


@pytest.mark.parametrize("name", ["net.safetensors", "net.ema.safetensors", "net.optimizer.safetensors", STATE_FILE])
@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_a_damaged_file_is_told(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "00000000"
    state = new_state(1)
    steps(state, 1)
    save_checkpoint(state, folder, "{}")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    if damage == "missing":
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"00000000 is damaged.*the one before"):
        load_checkpoint(new_state(1), folder, "{}")


def test_another_networks_checkpoint_is_refused(tmp_path: Path) -> None:
    state = new_state(1)
    save_checkpoint(state, tmp_path / "00000000", "{}")
    other = new_state(1)
    other.networks["net"] = nn.Linear(2, 2)
    with pytest.raises(CheckpointError):
        load_checkpoint(other, tmp_path / "00000000", "{}")


def test_another_recipe_is_refused_by_name(tmp_path: Path) -> None:
    old = {"loop": {"seed": 1, "warmup": 2}, "add": {"lr": 1.0}}
    new = {"loop": {"seed": 2, "warmup": 2}, "add": {"lr": 2.0, "beta1": 0.5}}
    save_checkpoint(new_state(1), tmp_path / "00000000", json.dumps(old))
    with pytest.raises(RecipeError, match=r"add\.beta1, add\.lr, loop\.seed differ"):
        load_checkpoint(new_state(1), tmp_path / "00000000", json.dumps(new))


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for name in ("00000002", "00000010", "00000004"):
        save_checkpoint(new_state(1), tmp_path / name, "{}")
    (tmp_path / "00000012").mkdir()
    shutil.copytree(tmp_path / "00000002", tmp_path / ".00000014-abc")
    assert [path.name for path in checkpoints(tmp_path)] == ["00000002", "00000004", "00000010"]
    drop_checkpoint(tmp_path / "00000002")
    drop_checkpoint(tmp_path / "00000002")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000004", "00000010", "00000012"]
    assert checkpoints(tmp_path / "none") == []


def test_settings_younger_than_the_checkpoint_count_as_their_defaults(tmp_path: Path) -> None:
    state, folder = new_state(1), tmp_path / "00000001"
    save_checkpoint(state, folder, '{"loop": {"seed": 0}, "add": {"lr": 1.0}}')
    defaults = '{"loop": {"seed": 9, "new": 2}, "add": {"lr": 0.5}}'
    load_checkpoint(state, folder, '{"loop": {"seed": 0, "new": 2}, "add": {"lr": 1.0}}', defaults)
    with pytest.raises(RecipeError, match=r"loop\.new differ"):
        load_checkpoint(state, folder, '{"loop": {"seed": 0, "new": 3}, "add": {"lr": 1.0}}', defaults)


def test_the_average_is_lent_and_given_back() -> None:
    state = new_state(1)
    steps(state, 3)
    network = state.networks["net"]
    own = {name: value.clone() for name, value in network.state_dict().items()}
    with state.using_average("net") as lent:
        assert lent is network
        assert not network.training
        assert all(torch.equal(value, state.ema["net"][n]) for n, value in network.state_dict().items())
    assert network.training
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())


def test_what_is_frozen_is_neither_kept_nor_asked_for(tmp_path: Path) -> None:
    state, folder = new_state(1), tmp_path / "00000001"
    state.networks["net"][0].requires_grad_(False)  # type: ignore[index, union-attr]
    state.ema["net"] = start_ema(state.networks["net"])
    save_checkpoint(state, folder, "{}")
    assert "0.weight" not in load_file(folder / "net.safetensors")
    assert "1.running_mean" in load_file(folder / "net.safetensors")
    load_checkpoint(state, folder, "{}")
    with pytest.raises(CheckpointError, match="its weights are others"):
        load_checkpoint(new_state(1), folder, "{}")
