"""The three stages of drawing as functions of tensors, which CUDA graphs are made of. `[torch]`

A graph is recorded once and replayed with other numbers in the same memory. So no function here may depend on the value
of a tensor, or move one to or from the host: no `.item()`, no tensor on the CPU, no index by a condition. What differs
from call to call is a tensor argument on the device; a graph is made for the shapes of these arguments alone. Without
graphs the functions are called as they are.

Shapes: B images, G 2 with classifier-free guidance, else 1, S calls of the network, N noises, T terms of a step table,
K tokens, D width of a token's state, P of a pooled prompt, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onestill.engine.torch.step_table import SETTINGS
from onestill.networks.inference import Networks
from onestill.networks.latents import to_uint8
from onestill.sampling import blend, classifier_free_guidance
from onestill.schedule import add_noise


def encode_prompts(
    networks: Networks, ids: Tensor, second_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, K] for each text encoder -> states [B, K, D], and pooled [B, P] where the model has it."""
    return networks.text_encoder.states([ids] if second_ids is None else [ids, second_ids], mask)


def take_steps(
    networks: Networks,
    call: Callable[..., Tensor],
    table: Tensor,
    guidance: Tensor,
    noise: Tensor,
    start: Tensor | None,
    states: Tensor,
    pooled: Tensor | None,
    time_ids: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor:
    """The whole sampling loop, from noise to latents [B, C, h, w] float32.

    Args:
        networks: the model.
        call: its UNet, compiled or not, as `Networks.output`.
        table: [S, 5 + T] float32, from `onestill.engine.torch.step_table.step_table`.
        guidance: [] float32, the scale.
        noise: [N, B, C, h, w] float32.
        start: [1, C, h, w] float32, latents of an image to start from, or None.
        states: [G B, K, D], those that guidance steers away from behind the others.
        pooled: [G B, P], or None.
        time_ids: [G B, 6] float32, or None. In float32, as to bfloat16 a size of 999 px is 1000.
        mask: [1, 1, h, w] float32, 1 where to draw and 0 where to keep `start`, as `onestill.sampling.inpainting` does.
    """
    dtype, is_guided = networks.dtype, len(states) > noise.shape[1]
    states, pooled = states.to(dtype), None if pooled is None else pooled.to(dtype)
    terms = noise.new_empty((table.shape[1] - SETTINGS, *noise.shape[1:]))
    first = 0 if start is None else 1
    if start is not None:
        terms[0] = start
    terms[first : first + len(noise)] = noise
    # The sums and x0 stay in float32: in half precision, rounding would add up from step to step.
    for step in range(len(table)):
        timestep = table[step, 0].clone()  # compiled code requires that its inputs are at aligned addresses
        of_x, of_output, alpha, sigma = table[step, 1:SETTINGS]
        known = first + len(noise) + step
        x = (table[step, SETTINGS : SETTINGS + known].view(-1, 1, 1, 1, 1) * terms[:known]).sum(0)
        if mask is not None:
            x = blend(mask, x, add_noise(start, noise[0], alpha, sigma))
        inputs = (torch.cat([x, x]) if is_guided else x).to(dtype)
        output = call(inputs, timestep, states, pooled, time_ids, guidance).float()
        if is_guided:
            cond, uncond = output.chunk(2)
            output = classifier_free_guidance(cond, uncond, guidance)  # type: ignore[arg-type] # a number all the same
        x0 = of_x * x + of_output * output
        terms[known] = x0 if mask is None else blend(mask, x0, start)
    return terms[-1]


def decode_latents(networks: Networks, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [B, C, h, w] -> pictures uint8 [B, H, W, 3], and whether every number was finite, [] bool."""
    image = networks.latent_space.decode(latents)
    return to_uint8(image), torch.isfinite(image).all() & torch.isfinite(latents).all()
