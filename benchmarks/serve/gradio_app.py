"""The rival, as its users write it: Gradio over diffusers on the same model. It takes a port.

Needs `pip install gradio` beside `onestill[torch]`.
"""

from __future__ import annotations

import sys
from typing import Any

import gradio
import torch
from diffusers import DiffusionPipeline

import onestill


def main() -> None:
    pipe = DiffusionPipeline.from_pretrained(onestill.model_path("icons"))
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str) -> Any:
        generator = torch.Generator().manual_seed(1)
        return pipe(prompt, num_inference_steps=1, guidance_scale=1.0, generator=generator).images[0]

    with gradio.Blocks(analytics_enabled=False) as demo:
        words = gradio.Textbox(label="Prompt")
        picture = gradio.Image(label="Picture", format="jpeg")
        words.input(draw, words, picture, trigger_mode="always_last", api_name="draw")
    draw("a red apple")
    demo.queue().launch(server_name="127.0.0.1", server_port=int(sys.argv[1]), quiet=True)


if __name__ == "__main__":
    main()
