"""Weights in float16, in pieces that may be brought back; and back together.

    python -m benchmarks.quarter.pieces OUT/student --to runs/icons-gpu/student/export/unet

Each piece is a safetensors file of whole tensors. Its notes say of which iteration it is, how many pieces there are,
and the network's config, so that pieces are all that is needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from onestill.checkpoint import written_whole
from onestill.errors import CheckpointError

__all__ = ["PIECE_BYTES", "join_pieces", "write_pieces"]

PIECE_BYTES = 31 * 2**19  # 15.5 MiB of weights, which leaves room for the header


def write_pieces(
    weights: Mapping[str, torch.Tensor], folder: Path, name: str, config: Mapping[str, Any], iteration: int
) -> list[Path]:
    """Write NAME-0.safetensors and so on into a folder, in place of those of an earlier iteration.

    Args:
        weights: a network's, of any type; floating ones are written in float16.
        folder: where the pieces go.
        name: what they are called.
        config: the network's, as its config.json has it.
        iteration: of which they are.
    """
    halves = {key: one.half() if one.is_floating_point() else one for key, one in weights.items()}
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, one in halves.items():
        more = one.numel() * one.element_size()
        if parts[-1] and size + more > PIECE_BYTES:
            parts.append({})
            size = 0
        parts[-1][key] = one.contiguous()
        size += more
    notes = {"config": json.dumps(dict(config)), "iteration": str(iteration), "pieces": str(len(parts))}
    written = []
    for number, part in enumerate(parts):
        written.append(folder / f"{name}-{number}.safetensors")
        with written_whole(written[-1]) as unfinished:
            save_file(part, unfinished, metadata=notes)
    for old in set(pieces_of(folder, name)) - set(written):
        old.unlink()
    return written


def pieces_of(folder: Path, name: str) -> list[Path]:
    """The pieces of a name in a folder."""
    return sorted(folder.glob(f"{name}-[0-9]*.safetensors"))


def join_pieces(folder: Path, name: str, to: Path) -> Path:
    """Put a network's pieces together, into a folder in diffusers' format.

    Returns:
        `to`, with config.json and diffusion_pytorch_model.safetensors.

    Raises:
        CheckpointError: a piece is missing, or they are of different iterations.
    """
    pieces = pieces_of(folder, name)
    notes = []
    weights: dict[str, torch.Tensor] = {}
    for piece in pieces:
        with safe_open(str(piece), framework="pt") as file:
            notes.append(file.metadata())
        weights |= load_file(piece)
    if not notes or len({tuple(sorted(one.items())) for one in notes}) > 1 or len(notes) != int(notes[0]["pieces"]):
        raise CheckpointError(
            f"'{folder}' holds {len(pieces)} pieces of '{name}', which are not the whole of one iteration; copy all of "
            "them there again."
        )
    to.mkdir(parents=True, exist_ok=True)
    save_file(weights, to / "diffusion_pytorch_model.safetensors")
    (to / "config.json").write_text(json.dumps(json.loads(notes[0]["config"]), indent=2) + "\n", encoding="utf-8")
    return to


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path, metavar="FOLDER/NAME", help="where the pieces lie, and their name")
    parser.add_argument("--to", type=Path, required=True, help="the folder that they become")
    options = parser.parse_args(arguments)
    print(join_pieces(options.pieces.parent, options.pieces.name, options.to))


if __name__ == "__main__":
    main()
