"""LoRA files: low-rank changes added to a model's weights once, when it is loaded, so that drawing costs no more.

A changed layer has the weight W + scale * alpha / rank * D, where D is

- LoRA: up @ down; of a convolution, LoCon, with a small convolution between the two;
- LoHa: (w1_a @ w1_b) * (w2_a @ w2_b), element by element (Hyeon-Woo et al. 2022);
- LoKr: the Kronecker product of w1 and w2, each of which may be a product of two (Edalati et al. 2022);

and of which DoRA (Liu et al. 2024) sets the length of each row, or column, to a trained magnitude.

PEFT has these formulas too, in layers that it first puts around the module's: on a UNet of Stable Diffusion 1 with 282
changed layers that takes 1.2 to 1.4 times as long, and its LoKr and LoHa want configs that a file does not have.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from onestill.checkpoint import Lora, ModelInfo
from onestill.checkpoint.header import read_header
from onestill.errors import CheckpointError
from onestill.networks.lora_names import Layer, Names, find_layer, layers_by_name

__all__ = ["add_loras"]

LYCORIS = (
    "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 "
    "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"
).split()
# What stands behind a layer's name -> what the tensor is.
ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".down.weight": "down",
    ".up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "row_lengths",
    ".lora_magnitude_vector.weight": "row_lengths",
    **{f".{name}": name for name in LYCORIS},
}
MOST_NAMED = 3

Change = dict[str, Tensor]  # what a file says of one layer, by the values of `ENDS`


def add_loras(parts: Mapping[str, torch.nn.Module], info: ModelInfo) -> None:
    """Add every LoRA of a model to its modules, in place and in float32.

    Args:
        parts: component -> module.
        info: the model, with its `loras`.

    Raises:
        CheckpointError: a file is no LoRA, is of a kind that is not known, or changes layers that the model does not
            have, or has in other shapes; the sentence counts and names them.
        UnsafeFormatError: it is a pickle.
    """
    names = layers_by_name(parts) if info.loras else {}
    for lora in info.loras:
        for layer, change in _read(lora, names).items():
            _add(parts[layer.component].get_submodule(layer.name), lora, layer, change)


def _read(lora: Lora, names: Names) -> dict[Layer, Change]:
    found: dict[Layer, Change] = {}
    unknown: dict[str, None] = {}
    header = read_header(lora.path)  # refuses a pickle
    with safe_open(str(lora.path), framework="pt") as file:
        for key in header.tensors:
            end = next((end for end in ENDS if key.endswith(end)), None)
            if end is None:
                raise CheckpointError(
                    f"'{lora.path}' has '{key}', which no LoRA, LoHa, LoKr or DoRA has; give a file of one of these."
                )
            name = key.removesuffix(end)
            if (layer := find_layer(name, names)) is None:
                unknown[name] = None
            else:
                found.setdefault(layer, {})[ENDS[end]] = file.get_tensor(key).float()
    if unknown:
        shown = ", ".join(f"'{name}'" for name in list(unknown)[:MOST_NAMED])
        raise CheckpointError(
            f"'{lora.path}' changes {len(unknown)} layers that this model does not have ({shown}); it is for another "
            "family."
        )
    if not found:
        raise CheckpointError(f"'{lora.path}' is no LoRA: it changes nothing.")
    return found


@torch.no_grad()
def _add(module: torch.nn.Module, lora: Lora, layer: Layer, change: Change) -> None:
    weight = module.get_parameter("weight").float()
    try:
        difference = _scaled_difference(change)
        if len(difference) != len(weight):  # `reshape` would turn rows into columns
            raise ValueError("rows")
        difference = difference.reshape(weight.shape)
        if change.keys() & {"dora_scale", "row_lengths"}:
            target = weight + difference
            difference = target * _dora_factor(target, change) - weight
    except (KeyError, ValueError, RuntimeError) as error:  # a matrix is missing, or of another shape
        shapes = {name: list(tensor.shape) for name, tensor in change.items() if name != "alpha"}
        raise CheckpointError(
            f"'{lora.path}' changes '{layer.name}', whose weight is {list(weight.shape)}, by {shapes}; it is for "
            "another family."
        ) from error
    changed = weight + lora.scale * difference
    module.register_parameter("weight", torch.nn.Parameter(changed, requires_grad=False))


def _scaled_difference(change: Change) -> Tensor:
    """alpha / rank * D of a layer's change, of as many numbers as the weight has."""
    rank: int | None
    if "hada_w1_a" in change:
        first = _product(change["hada_w1_a"], change["hada_w1_b"], change.get("hada_t1"))
        second = _product(change["hada_w2_a"], change["hada_w2_b"], change.get("hada_t2"))
        difference, rank = first * second, len(change["hada_w1_b"])
    elif "lokr_w1" in change or "lokr_w1_a" in change:
        first, second = _lokr_factor(change, "lokr_w1"), _lokr_factor(change, "lokr_w2")
        first = first.reshape(*first.shape, *(1 for _ in second.shape[2:]))
        inner = change.get("lokr_w2_b", change.get("lokr_w1_b"))
        # LyCORIS gives alpha no meaning where both factors are whole.
        difference, rank = torch.kron(first, second), None if inner is None else len(inner)
    else:
        up, mid = change["up"].flatten(1), change.get("mid")
        difference, rank = _product(up if mid is None else up.T, change["down"], mid), len(change["down"])
    alpha = change.get("alpha")
    return difference if alpha is None or rank is None else difference * (alpha / rank)


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a [out, r] @ b [r, in, ...] -> [out, in * ...]; with a Tucker core [r, r, k, k] in between -> [out, in, k, k].

    With a core, `a` is [r, out] and `b` [r, in], as LyCORIS has them.
    """
    if core is None:
        return a @ b.flatten(1)
    return torch.einsum("rskl,ro,si->oikl", core, a, b.flatten(1)).contiguous()


def _lokr_factor(change: Change, name: str) -> Tensor:
    if name in change:
        return change[name]
    return _product(change[f"{name}_a"], change[f"{name}_b"], change.get(f"{name[:-2]}t{name[-1]}"))


def _dora_factor(changed: Tensor, change: Change) -> Tensor:
    """What a changed weight [out, in, ...] is multiplied by, so that its rows or columns have the trained lengths."""
    lengths = change["row_lengths"].flatten() if "row_lengths" in change else change["dora_scale"]
    by_row = len(lengths) == len(changed)  # LyCORIS has [out, 1, ...], or [1, in, ...] for columns
    others = [axis for axis in range(changed.dim()) if axis != (0 if by_row else 1)]
    norms = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    factor: Tensor = lengths.reshape(norms.shape) / norms
    return factor
