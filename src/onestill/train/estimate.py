"""What a distillation will cost, before it costs anything: parameters, memory and operations, from configs alone.

Networks are built on torch's `meta` device, which has shapes and no numbers, so that models of any size are counted in
seconds, and without their weights. Operations are counted by torch (two for a multiplication with an addition) in one
forward pass of each network; how often a step uses each, forward and backward, is the table in `_uses`.

Shapes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from onestill.errors import CheckpointError
from onestill.networks.condition import Condition
from onestill.networks.denoiser import unet_folder
from onestill.networks.libraries import quiet_libraries
from onestill.train.discriminator.cnn import CNNFeatures
from onestill.train.discriminator.features import TeacherFeatures, tower_widths
from onestill.train.discriminator.heads import Discriminator
from onestill.train.discriminator.inputs import IN_PIXELS, NOISED, THROUGH_CNN, FeatureOptions
from onestill.train.export import add_lora
from onestill.train.methods.distiller import RANDOM
from onestill.train.recipe import Recipe

H200_TFLOPS = 790.0  # bf16, measured on the card that the project could borrow
UTILISATION = 0.35  # of it that training reaches; an assumption, not a measurement
TOKENS = 77


@dataclass(frozen=True)
class Use:
    """How often a network runs for one sample of a step, and what of that is saved for the backward pass."""

    name: str
    parameters: int
    forwards: float
    backwards: float  # a pass back to inputs counts 1, to weights 1 more
    operations: float  # of one forward pass
    saved_bytes: float = 0.0  # activations of one sample that wait for the backward pass


def estimate(recipe: Recipe, beside: Path, world: int = 1) -> dict[str, Any]:
    """Parameters, FLOPs of a step, gigabytes on each of `world` devices, and how many steps a second to expect.

    Args:
        beside: a folder of configs (`unet/`, `student/`, `vae/`, `dinov2-small/`...) that stands in where the recipe's
            own folders are not on this machine. A tower that is not there is left out, and `left_out` says so.
    """
    options = recipe.options
    features: FeatureOptions | None = getattr(options, "features", None)  # consistency distillation has none
    towers = features is None or features.network not in ("tower", "both") or _tower_config(features)
    with quiet_libraries(), torch.device("meta"):
        uses, trained = _uses(options, beside)
    batch = recipe.loop.batch_size
    rows = batch / (world * recipe.loop.accumulate)
    # With accumulation each optimizer has passes of its own; there are two, so nearly all forwards come twice.
    again = 2 if recipe.loop.accumulate > 1 and recipe.method != "lcm" else 1
    flops = batch * sum(use.operations * (use.forwards * again + use.backwards) for use in uses)
    memory = _memory(recipe, uses, trained, rows, world)
    tflops = H200_TFLOPS * UTILISATION * world
    return {
        "parameters": {use.name: use.parameters for use in uses} | {"trained": sum(trained.values())},
        "flops_per_step": flops,
        "gigabytes_per_device": {key: float(f"{value / 1e9:.3g}") for key, value in memory.items()},
        "assumed": {"devices": world, "tflops": H200_TFLOPS, "utilisation": UTILISATION},
        "steps_per_s": float(f"{tflops * 1e12 / flops:.3g}"),
        **({} if towers else {"left_out": f"the tower and its heads, as {options.features.tower} holds none yet"}),
    }


def _uses(options: Any, beside: Path) -> tuple[list[Use], dict[str, int]]:
    """What one sample of a step costs in each network; and how many weights of each role train."""
    unet = _unet(_config(unet_folder(options.teacher), beside / "unet"))
    same = options.student in ("", RANDOM)
    student = _unet(unet.config if same else _config(unet_folder(options.student), beside / "student"))
    x, conditioning = _inputs(unet, options.sample_size or student.config["sample_size"])
    t = torch.zeros(1, dtype=torch.long)
    forward = _operations(lambda: unet.requires_grad_(False)(x, t, conditioning.text, **conditioning.added))
    once = forward if same else _operations(lambda: student(x, t, conditioning.text, **conditioning.added))
    size, own = _size(unet), _size(student)
    student = add_lora(student, options.lora_rank) if options.lora_rank else student
    if options.gradient_checkpointing:
        student.train().enable_gradient_checkpointing()
    saved = _saved_bytes(lambda: student(x, t, conditioning.text, **conditioning.added).sample, student)
    trained = {"student": sum(p.numel() for p in student.parameters() if p.requires_grad)}
    recompute = 1.0 if options.gradient_checkpointing else 0.0
    uses = [Use("student", own, 1, (1 if options.lora_rank else 2) + recompute, once, saved)]
    if not hasattr(options, "features"):  # consistency distillation: a guided teacher step, and f further down
        return [*uses, Use("teacher", size, 2, 0, forward), Use("target", 0, 1, 0, once)], trained
    distil, heads = options.distillation, options.heads
    asks = {"nfsd": 3.0}.get(distil.weighting, distil.teacher_steps * (2.0 if distil.teacher_guidance > 1 else 1.0))
    uses.append(Use("teacher", size, asks if distil.lambda_distill else 0, 0, forward))
    seen, widths = _features(options, unet, x, conditioning, beside, recompute)
    discriminator = Discriminator(widths, heads.width, unet.config["cross_attention_dim"], 0, blocks=heads.blocks)
    trained["discriminator"] = _size(discriminator)
    return [*uses, *seen, Use("discriminator", _size(discriminator), 0, 0, 0)], trained


def _features(
    options: Any, unet: Any, x: Tensor, conditioning: Condition, beside: Path, recompute: float
) -> tuple[list[Use], list[int]]:
    """What the heads look through, real and made, and back from the made one."""
    uses, widths = list[Use](), list[int]()
    features, seen = options.features, options.discriminator_input
    t = torch.zeros(1, dtype=torch.long)
    if features.network in NOISED:
        teacher = TeacherFeatures(SimpleNamespace(unet=unet))

        def look() -> Any:
            return teacher.encode(x.detach().requires_grad_(), t, conditioning)

        uses.append(Use("teacher features", 0, 2, 1 + recompute, _operations(look), _saved_bytes(look, unet)))
        widths += teacher.widths
    if features.latents_too:
        widths.append(x.shape[1])
    in_pixels = seen.space == "pixels" or features.network in IN_PIXELS
    window = min(seen.crop or x.shape[-1], x.shape[-1])
    shown = z = torch.empty(1, x.shape[1], window, window, dtype=torch.bfloat16).requires_grad_()
    if in_pixels or options.distillation.in_pixels:
        vae = _vae(
            _config(Path(options.decoder or options.autoencoder or Path(options.teacher) / "vae"), beside / "vae")
        )
        if recompute:
            vae.enable_gradient_checkpointing()

        def decode() -> Any:
            return vae.decode(z).sample

        times = 3 if options.distillation.in_pixels else 2
        uses.append(Use("decoder", _size(vae), times, 1 + recompute, _operations(decode), _saved_bytes(decode, vae)))
        shown = decode() if in_pixels else z
    if features.network == "vit":
        config = AutoConfig.for_model(**_config(Path(features.vit), beside / Path(features.vit).name))
        vit = AutoModel.from_config(config).to(torch.bfloat16).requires_grad_(False).eval()
        uses.append(_seen(vit, (1, 3, features.vit_size, features.vit_size), options))
        widths += [config.hidden_size] * len(features.vit_layers)
    if features.network in THROUGH_CNN:
        with torch.device("cpu"):  # its widths are found by running it once
            cnn = CNNFeatures(features.cnn, features.cnn_stages, features.cnn_size)
        side = features.cnn_size or shown.shape[-1]
        uses.append(_seen(cnn.network.to("meta", torch.bfloat16), (1, 3, side, side), options))
        widths += cnn.widths
    if features.network in ("tower", "both") and (found := _tower_config(features)):
        config = AutoConfig.for_model(**found)
        tower = AutoModel.from_config(config).to(torch.bfloat16).requires_grad_(False).eval()
        side = getattr(config, "image_size", shown.shape[-1])
        uses.append(_seen(tower, (1, config.num_channels, side, side), options))
        widths += tower_widths(config, features.tower_layers, features.tower)
    return uses, widths


def _seen(network: Any, shape: tuple[int, ...], options: Any) -> Use:
    """A network that is shown the real and the made, and the real once more for its embedding."""
    picture = torch.empty(shape, dtype=torch.bfloat16).requires_grad_()

    def see() -> Any:
        output = network(picture)
        return getattr(output, "last_hidden_state", output)

    forwards = 2 + options.heads.condition_on_image
    return Use("feature network", _size(network), forwards, 1, _operations(see), _saved_bytes(see, network))


def _tower_config(features: FeatureOptions) -> dict[str, Any]:
    """The config of the recipe's image tower; nothing where there is none yet."""
    folder = Path(features.tower) / "image_tower"
    return _config(folder, folder) if (folder / "config.json").is_file() else {}


def _memory(recipe: Recipe, uses: list[Use], trained: dict[str, int], rows: float, world: int) -> dict[str, float]:
    """Bytes on one device: what trains with its gradient, moments and average; what is frozen; activations.

    Activations are those that wait for the backward pass; under checkpointing, those of the block that is being
    recomputed come on top, as does what the allocator loses.
    """
    options = recipe.options
    sharded = world if recipe.loop.parallel == "fsdp" else 1
    frozen_bytes = 2 if options.frozen_dtype == "bfloat16" else 4
    sizes = {use.name: use.parameters for use in uses}
    base = sizes["student"] - trained["student"] if options.lora_rank else 0
    # float32: the weight, its gradient, Adam's two moments, and the student's running mean.
    players = 20 * trained["student"] + 16 * trained.get("discriminator", 0)
    frozen = sum(size for name, size in sizes.items() if name not in ("student", "teacher", "discriminator"))
    teacher = frozen_bytes * sizes["teacher"] / (sharded if options.shard_teacher else 1)
    held = {
        "players": players / sharded,
        "base of the LoRA": float((4 if recipe.loop.parallel == "fsdp" else frozen_bytes) * max(base, 0)) / sharded,
        "teacher": teacher,
        "other frozen": float(frozen_bytes * frozen),
        "activations": rows * sum(use.saved_bytes for use in uses),
    }
    return held | {"total": sum(held.values())}


def _inputs(unet: Any, side: int) -> tuple[Tensor, Condition]:
    """One sample's latents and condition for a UNet."""
    config = unet.config
    text, mask = torch.empty(1, TOKENS, config["cross_attention_dim"]), torch.ones(1, TOKENS, dtype=torch.bool)
    conditioning = Condition(text, mask).cast(torch.bfloat16)
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        conditioning = Condition(text, mask, torch.empty(1, pooled), torch.empty(1, 6)).cast(torch.bfloat16)
    return torch.empty(1, config["in_channels"], side, side, dtype=torch.bfloat16), conditioning


def _operations(run: Callable[[], Any]) -> float:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _saved_bytes(run: Callable[[], Any], network: nn.Module) -> float:
    """Bytes of what a call saves for its backward pass, the network's own weights left out."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            alive.append(storage)  # so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return float(sum(saved.values()))


def _unet(config: Any) -> Any:
    return UNet2DConditionModel.from_config(dict(config)).to(torch.bfloat16)


def _vae(config: dict[str, Any]) -> Any:
    kind = AutoencoderTiny if config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
    return kind.from_config(config).to(torch.bfloat16).requires_grad_(False).eval()


def _size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _config(folder: Path, beside: Path) -> dict[str, Any]:
    """config.json of a network's folder, or of its stand-in."""
    for one in (folder, beside):
        file = one / "config.json"
        if file.is_file():
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return config
    raise CheckpointError(f"{folder} holds no config.json, and neither does {beside}: put the model there.")
