"""A tiny random model in diffusers' format, made of the real classes. It draws 32 x 32 px noise, quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import BertConfig, BertModel, BertTokenizerFast

from onestill.export.folder import save_folder, write_manifest
from onestill.export.shared_weights import export_openvino
from onestill.schedule import NoiseSchedule, rescale_zero_terminal_snr, scaled_linear_alphas_cumprod

WORDS = "a an and apple arrow blue circle emoji fluent green heart icon line of on purple red round square star yellow"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-!?'"
MAX_TOKENS = 16
WIDTH = 32  # of the cross-attention


def tiny_model(folder: Path, *, autoencoder: str = "kl", openvino: bool = True) -> Path:
    """Write the model into `folder`, which must not exist. `autoencoder` is "kl" or "tiny"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_folder(
            unet=tiny_unet(),
            vae=tiny_kl() if autoencoder == "kl" else tiny_autoencoder(),
            text_encoder=tiny_text_encoder(),
            tokenizer=tiny_tokenizer(),
            schedule=tiny_schedule(),
            folder=folder,
        )
    if openvino:
        export_openvino(folder)
    write_manifest(
        folder, name="tiny", version="1", licence="Apache-2.0", num_inference_steps=1, made={"by": "tests/tiny.py"}
    )
    return folder


def tiny_schedule() -> NoiseSchedule:
    return NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_alphas_cumprod()), prediction_type="v_prediction")


def tiny_vocabulary() -> dict[str, int]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *WORDS.split(), *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def tiny_tokenizer() -> Any:
    return BertTokenizerFast(vocab=tiny_vocabulary(), model_max_length=MAX_TOKENS)


def tiny_text_encoder() -> Any:
    config = BertConfig(
        vocab_size=len(tiny_vocabulary()),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=MAX_TOKENS,
    )
    return BertModel(config)


def tiny_unet() -> Any:
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    with torch.no_grad():
        unet.conv_out.weight *= 4  # outputs near unit variance, so that pictures differ
    return unet


def tiny_kl() -> Any:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.5,
        force_upcast=False,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 4
    return vae


def tiny_autoencoder(latent_channels: int = 4) -> Any:
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=latent_channels,
        scaling_factor=0.5,
    )
    with torch.no_grad():
        vae.decoder.layers[-1].weight *= 8
    return vae
