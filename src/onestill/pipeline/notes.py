"""Sentences on what was not done to the letter, which come with the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from onestill.engine.protocol import GenerationResult
from onestill.pipeline.checks import shortened
from onestill.pipeline.masks import Start
from onestill.pipeline.plan import Plan


def notes_on(plan: Plan, start: Start | None, *, has_negative: bool, partial_images: tuple[int, int]) -> list[str]:
    """A call's, but for those on its prompts.

    Args:
        plan: its settings.
        start: what it started from.
        has_negative: whether a negative prompt was given.
        partial_images: how many were asked for, and how many were shown.
    """
    notes = []
    if has_negative and not plan.guides:
        notes.append("The negative prompt did nothing: it acts only at a guidance scale above 1.")
    if plan.strength is not None and round(plan.num_inference_steps * plan.strength, 6) < 1:
        notes.append(
            f"A strength of {plan.strength:g} is less than one of {plan.num_inference_steps} steps; one was taken, "
            f"from timestep {plan.timesteps[0]}."
        )
    own = plan.info.sampler
    if plan.info.scheduler and plan.sampler != own:
        spacing = plan.info.schedule.timestep_spacing
        notes.append(f"The model's own {own} was left out: '{plan.sampler}' drew at {spacing} timesteps.")
    if (plan.height, plan.width) not in plan.info.sizes:
        known = ", ".join(f"{width}x{height}" for height, width in plan.info.sizes)
        notes.append(f"The model was trained to draw {known}; other sizes may repeat or cut what is asked for.")
    if start is not None and start.weights is not None and not start.weights.any():
        notes.append(
            "The mask keeps the whole image: make transparent, or white where it has no transparency, what to draw."
        )
    wanted, shown = partial_images
    if shown < wanted:
        found = "none" if not shown else "one" if shown == 1 else str(shown)
        why = "diffusers' schedulers have none" if plan.scheduler else "one comes after each step but the last"
        notes.append(f"{wanted} partial images were asked for and {found} shown: {why}.")
    return notes


def notes_on_prompts(prompts: Sequence[str], drawn: GenerationResult) -> dict[str, str]:
    """On each prompt that did not fit: how many tokens were cut, and from which words on."""
    cut = dict(zip(prompts, zip(drawn.tokens_cut, drawn.words_cut, strict=True), strict=True))
    return {
        text: f"The prompt '{shortened(text)}' is too long: its last {count} tokens were cut"
        f"{f', from {shortened(words)!r}' if words else ''}."
        for text, (count, words) in cut.items()
        if count
    }
