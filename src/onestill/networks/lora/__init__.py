"""LoRA files: low-rank changes added to a model's weights once, when it is loaded, so that drawing costs no more.

A changed layer has the weight W + scale * alpha / rank * D, where D is

- LoRA: up @ down; of a convolution, LoCon, with a small convolution between the two;
- LoHa: (w1_a @ w1_b) * (w2_a @ w2_b), element by element (Hyeon-Woo et al. 2022);
- LoKr: the Kronecker product of w1 and w2, each of which may be a product of two (Edalati et al. 2022);

and of which DoRA (Liu et al. 2024) sets the length of each row, or column, to a trained magnitude. LyCORIS and ComfyUI
also keep whole differences, of norms and biases too.

PEFT has these formulas too, in layers that it first puts around the module's: on a UNet of Stable Diffusion 1 with 282
changed layers that takes 1.2 to 1.4 times as long, and its LoKr and LoHa want configs that a file does not have.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from onestill.checkpoint import Lora, ModelInfo, read_json
from onestill.checkpoint.header import read_header
from onestill.errors import CheckpointError
from onestill.networks.lora.names import Layer, Names, find_layer, layers_by_name

__all__ = ["add_loras"]

LYCORIS = (
    "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 "
    "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"
).split()
# What stands behind a layer's name, a pattern -> what the tensor is. PEFT's adapters may have names, as in "A.NAME.".
ENDS = {
    r"\.(lora_A(\.[^.]+)?|lora_down|(lora\.|lora_linear_layer\.)?down)\.weight": "down",
    r"\.(lora_B(\.[^.]+)?|lora_up|(lora\.|lora_linear_layer\.)?up)\.weight": "up",
    r"\.lora_B(\.[^.]+)?\.bias": "up_bias",
    r"\.lora_mid\.weight": "mid",
    r"\.alpha": "alpha",
    r"\.dora_scale": "dora_scale",
    r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?": "row_lengths",
    r"\.(diff|w_norm)": "difference",
    r"\.(diff_b|b_norm)": "bias",
    **{rf"\.{name}": name for name in LYCORIS},
}
# What other kinds of files have in a tensor's name, for the sentence that refuses them.
OTHERS = {
    r"\.on_input$|\.ia3_": "IA3",
    r"\.oft_|\.boft_": "OFT",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.lora_E\b": "AdaLoRA",
    r"\.vera_": "VeRA",
    r"lora_embedding_[AB]": "a LoRA of token embeddings",
    r"^bundle_emb\.": "an embedding that OneTrainer put beside a LoRA",
    r"^(emb_params|clip_[lg])$": "an embedding (give it with --embedding)",
    r"(double|single)_blocks\.|transformer_blocks\.\d+\.(attn\.add_|norm1_context)": "a LoRA for Flux or its like",
}
MOST_NAMED = 3

Change = dict[str, Tensor]  # what a file says of one layer, by the values of `ENDS`


class Adapter(NamedTuple):
    """What a PEFT config says of a file's tensors, beside them or in the file's header.

    Attributes:
        config: "lora_alpha", "use_rslora" and so on; names may start with a component's.
    """

    config: Mapping[str, Any]

    def alpha(self, layer: Layer, rank: int) -> float | None:
        """The alpha of a layer of this rank; None where the config says nothing, which is the rank itself."""
        own = {name.removeprefix(f"{layer.component}."): value for name, value in self.config.items()}
        alpha = own.get("lora_alpha", own.get("alpha"))
        name = layer.name.removeprefix("text_model.")
        for pattern, value in (own.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern.removeprefix('text_model.')})$", name):  # as PEFT matches them
                alpha = value
        if alpha is None:
            return None
        return float(alpha) * (math.sqrt(rank) if own.get("use_rslora") else 1.0)


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
    for pattern, kind in OTHERS.items():
        if key := next((key for key in header.tensors if re.search(pattern, key)), None):
            raise CheckpointError(
                f"'{lora.path}' has '{key}', which no LoRA, LoHa, LoKr or DoRA has: it is {kind}; give a file of one "
                "of these."
            )
    with safe_open(str(lora.path), framework="pt") as file:
        for key in header.tensors:
            name, kind = _taken_apart(lora.path, key)
            if (layer := find_layer(name, names)) is None:
                unknown[name] = None
                continue
            change = found.setdefault(layer, {})
            if kind in change:
                raise CheckpointError(f"'{lora.path}' changes '{layer.name}' twice; save each of its adapters alone.")
            change[kind] = file.get_tensor(key).float()
            if kind == "alpha" and change[kind].numel() != 1:
                raise CheckpointError(
                    f"'{lora.path}' has '{key}' of {change[kind].numel()} numbers, not of one; save it again."
                )
    if unknown:
        shown = ", ".join(f"'{name}'" for name in list(unknown)[:MOST_NAMED])
        raise CheckpointError(
            f"'{lora.path}' changes {len(unknown)} layers that this model does not have ({shown}); it is for another "
            "family."
        )
    if not found:
        raise CheckpointError(f"'{lora.path}' is no LoRA: it changes nothing.")
    adapter = _adapter(lora.path, header.notes)
    for layer, change in found.items():
        inner = change.get("down", change.get("hada_w1_b", change.get("lokr_w2_b", change.get("lokr_w1_b"))))
        if "alpha" not in change and inner is not None and (alpha := adapter.alpha(layer, len(inner))) is not None:
            change["alpha"] = torch.tensor(alpha)
    return found


def _taken_apart(path: Path, key: str) -> tuple[str, str]:
    """A tensor's name as a layer's and what the tensor is."""
    for end, kind in ENDS.items():
        if match := re.search(f"{end}$", key):
            return key[: match.start()], kind
    raise CheckpointError(f"'{path}' has '{key}', which no LoRA, LoHa, LoKr or DoRA has; give a file of one of these.")


def _adapter(path: Path, notes: Mapping[str, str]) -> Adapter:
    """A file's PEFT config: `lora_adapter_metadata` in the header, or `adapter_config.json` beside PEFT's own name."""
    if (text := notes.get("lora_adapter_metadata")) is not None:
        try:
            config = json.loads(text)
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise CheckpointError(f"'{path}' has a lora_adapter_metadata that is no JSON object; save it again.")
        return Adapter(config)
    is_pefts = path.name == "adapter_model.safetensors" and (path.parent / "adapter_config.json").is_file()
    return Adapter(read_json(path.parent, "adapter_config.json") if is_pefts else {})


@torch.no_grad()
def _add(module: torch.nn.Module, lora: Lora, layer: Layer, change: Change) -> None:
    parameters = dict(module.named_parameters(recurse=False))
    try:
        for name, difference in _differences(parameters, change).items():
            # A bias may be new: PEFT trains those of layers without one.
            own = parameters[name].float() if name in parameters else 0.0
            changed = own + lora.scale * difference
            module.register_parameter(name, torch.nn.Parameter(changed, requires_grad=False))
    except (KeyError, ValueError, RuntimeError) as error:  # a matrix is missing, or of another shape
        shapes = {name: list(tensor.shape) for name, tensor in change.items() if name != "alpha"}
        raise CheckpointError(
            f"'{lora.path}' changes '{layer.name}', whose weight is {list(parameters['weight'].shape)}, by {shapes}; "
            "it is for another family."
        ) from error


def _differences(parameters: Mapping[str, Tensor], change: Change) -> dict[str, Tensor]:
    """What is added to a layer's parameters at a scale of 1, by their names and in their shapes."""
    found = {}
    if change.keys() - {"bias", "alpha"}:
        weight = parameters["weight"].float()
        difference = change["difference"] if "difference" in change else _scaled_difference(change)
        if len(difference) != len(weight):  # `reshape` would turn rows into columns
            raise ValueError("rows")
        difference = difference.reshape(weight.shape)
        if change.keys() & {"dora_scale", "row_lengths"}:
            target = weight + difference
            difference = target * _dora_factor(target, change) - weight
        found["weight"] = difference
    if "up_bias" in change:
        found["bias"] = change["up_bias"] * (change["alpha"] / len(change["down"]) if "alpha" in change else 1.0)
    if "bias" in change:
        found["bias"] = change["bias"]
    if "bias" in found:
        found["bias"] = found["bias"].reshape(len(parameters["weight"]))
    return found


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
        difference, rank = _product(up if mid is None else up.T, change["down"], mid), up.shape[1]
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
