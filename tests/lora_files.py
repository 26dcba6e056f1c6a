"""LoRA files that tests put on top of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK, ALPHA = 4, 2.0


def lora_pairs(parts: dict[str, Any]) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Small random matrices for some layers: (component, layer) -> (down, up). One layer is a convolution."""
    generator = torch.Generator().manual_seed(1)
    wanted = {
        "unet": ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "resnets.0.conv1", "proj_in"),
        "text_encoder": ("self_attn.q_proj",),
        "text_encoder_2": ("mlp.fc1",),
    }
    found = {}
    for component, ends in wanted.items():
        for name, module in parts[component].named_modules() if component in parts else ():
            if name.endswith(ends) and hasattr(module, "weight"):
                shape = module.weight.shape
                down = torch.randn((RANK, *shape[1:]), generator=generator) * 0.2
                up = torch.randn((shape[0], RANK, *(1 for _ in shape[2:])), generator=generator) * 0.2
                found[component, name] = (down, up)
    return found


def write_lora(path: Path, pairs: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]], naming: str) -> Path:
    """Write a LoRA as diffusers ("peft") or as kohya's trainer ("kohya") names it, the latter with its alpha."""
    found: dict[str, torch.Tensor] = {}
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for (component, layer), (down, up) in pairs.items():
        is_text = component.startswith("text")
        long = f"text_model.{layer}" if is_text and not layer.startswith("text_model.") else layer
        if naming == "peft":
            found[f"{component}.{long}.lora_A.weight"], found[f"{component}.{long}.lora_B.weight"] = down, up
        else:
            name = starts[component] + long.replace(".", "_")
            found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            found[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file({name: value.contiguous() for name, value in found.items()}, path)
    return path
