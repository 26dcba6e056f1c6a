"""Sentences on what was not done to the letter, which come with the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from onestill.engine.protocol import GenerationResult
from onestill.pipeline.checks import shortened
from onestill.pipeline.plan import Plan


def notes_on(plan: Plan, prompts: Sequence[str], drawn: GenerationResult, *, has_negative: bool) -> list[str]:
    """All of a call's; `has_negative` where a negative prompt was given."""
    notes = _on_prompts(prompts, drawn.tokens_cut, drawn.words_cut)
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
    return notes


def _on_prompts(prompts: Sequence[str], tokens_cut: Sequence[int], words_cut: Sequence[str]) -> list[str]:
    """On prompts that did not fit, each once: how many tokens were cut, and from which words on."""
    cut = dict(zip(prompts, zip(tokens_cut, words_cut, strict=True), strict=True))
    return [
        f"The prompt '{shortened(text)}' is too long: its last {count} tokens were cut"
        f"{f', from {shortened(words)!r}' if words else ''}."
        for text, (count, words) in cut.items()
        if count
    ]
