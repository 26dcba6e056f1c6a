"""Which layers of a model compute in int8, and how well that draws: measured, and written as `openvino/int8.json`.

    ranges      the float32 graphs draw CALIBRATION pictures in one, two and four steps; a layer's range is what its
                input's extremes stay within in all but OUTLIERS of the calls
    text        no ranges, see `onestill.engine.openvino.int8`; layers whose rounding alone moves the states by more
                than MOST_MOVED of their norm stay in float32; the smaller figure is tried where the larger draws badly
    quality     each network in turn draws MEASURED other pictures in int8, the rest in float32; it passes where they
                are near enough to float32's, and then all that passed draw together

The UNet is left in float: in a graph that rounds, OpenVINO gives up its kernel for group norms, and what int8 gains is
lost again. B batch, C latent channels, h w latent size, H W pixels.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from onestill.engine.openvino.runtime import openvino, opset13, shared_core

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo
from onestill.engine.openvino.engine import OpenVinoEngine
from onestill.engine.openvino.int8 import DYNAMIC, Layers, layer_nodes, quantize
from onestill.engine.openvino.shared_weights import EXACT, FOLDER, INT8, INT8_FORMAT, Int8, read_index, read_int8
from onestill.engine.protocol import Conditioning
from onestill.pipeline import Pipeline
from onestill.text.tokenize import PromptTokenizer

CALIBRATION, MEASURED = 64, 64
STEPS = (1, 2, 4)  # one in all calibration pictures; the others in a quarter of them
OUTLIERS = 0.03
MOST_MOVED = (0.02, 0.01)
PROBES = 8  # prompts that a layer's rounding is measured on
# Decibels against float32. 35 is a difference nobody sees; 30 of the worst is the contract of an engine.
LEAST_MEAN_DB, LEAST_WORST_DB = 35.0, 30.0

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "pink", "brown")
THINGS = (
    "apple", "bicycle", "heart", "house", "star", "cat", "key", "cloud", "boat", "book", "bell", "tree", "dog", "sun",
    "fish", "flower", "moon", "clock", "cup", "smiling face", "car", "arrow pointing left", "musical note", "umbrella",
)  # fmt: skip
STYLES = ("fluent 3d emoji", "flat emoji", "outline icon", "solid icon", "pixel art icon", "noto emoji", "line art")

Arrays = dict[str, NDArray[Any]]


def write_int8(info: ModelInfo) -> Int8:
    """Measure the model's int8 form and write it where its float form is. What was there before is replaced.

    Returns:
        What was written: networks that int8 draws too badly have no layers in it, and it may have no network at all.
    """
    exact = _Recorder(info)
    captions = _captions(CALIBRATION + MEASURED)
    for i, caption in enumerate(captions[:CALIBRATION]):
        for steps in STEPS if i % 4 == 0 else STEPS[:1]:
            _draw(exact, caption, seed=i, steps=steps)
    calls = exact.calls
    moved = _moved(info, calls["text_encoder"][:: len(calls["text_encoder"]) // PROBES])
    candidates: list[tuple[str, Layers]] = [
        *(("text_encoder", {name: None for name in moved if moved[name] <= most}) for most in MOST_MOVED),
        ("decoder", _ranges(info, "decoder", calls["decoder"])),
    ]
    measured = captions[-MEASURED:]
    expected = [_draw(exact, caption, seed=1000 + i) for i, caption in enumerate(measured)]
    tried: dict[str, Layers] = {}
    near: dict[str, tuple[float, float]] = {}
    for part, layers in candidates:
        if layers and not (part in near and _good(*near[part])):
            tried[part] = layers
            _write(info, Int8({part: layers}))
            near[part] = _quality(info, measured, expected)
    passed = [part for part in sorted(near, key=lambda part: near[part][1]) if _good(*near[part])]
    while passed:
        _write(info, Int8({part: layers for part, layers in tried.items() if part in passed}))
        mean, worst = _quality(info, measured, expected)
        if _good(mean, worst):
            break
        passed.pop(0)  # the one whose worst picture is worst
    parts = {part: layers for part, layers in tried.items() if part in passed}
    together = {"mean": round(mean, 2), "worst": round(worst, 2)} if passed else {}
    each = {part: {"mean": round(near[part][0], 2), "worst": round(near[part][1], 2)} for part in near}
    return _write(info, Int8(parts, together, len(measured)), each)


def _write(info: ModelInfo, int8: Int8, each: Mapping[str, Mapping[str, float]] | None = None) -> Int8:
    parts = {
        part: {name: None if at is None else [float(f"{value:.4g}") for value in at] for name, at in layers.items()}
        for part, layers in int8.parts.items()
    }
    found = {"format": INT8_FORMAT, "psnr_db": int8.psnr_db, "pictures": int8.pictures, "alone_psnr_db": each or {}}
    (info.path / FOLDER / INT8).write_text(json.dumps(found | {"parts": parts}, indent=1) + "\n")
    written = read_int8(info.path)
    assert written is not None
    return written


# --- drawing --------------------------------------------------------------------------------------------------------


def _captions(count: int) -> list[str]:
    """Different captions, every thing, colour and style among them."""
    every = [f"a {colour} {thing}, {style}" for style, thing, colour in itertools.product(STYLES, THINGS, COLOURS)]
    every += [f"{thing}, {style}" for style, thing in itertools.product(STYLES, THINGS)] + list(THINGS)
    order = np.random.RandomState(0).permutation(len(every))  # the same on every version of NumPy
    return [every[i] for i in order[:count]]


class _Recorder(OpenVinoEngine):
    """The float32 engine, which records the inputs of its networks."""

    def __init__(self, info: ModelInfo) -> None:
        self.calls: dict[str, list[Arrays]] = {"text_encoder": [], "decoder": []}
        super().__init__(info, dtype="float32")
        self._tokenizer = PromptTokenizer(info)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self._tokenizer(prompts)
        mask = {"attention_mask": tokens.mask} if self.info.use_attention_mask else {}
        self.calls["text_encoder"].append({"input_ids": tokens.ids, **mask})
        return super().encode(prompts)

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        self.calls["decoder"].append({"latents": latents / np.float32(self.info.scaling_factor)})
        return super().decode(latents)


def _draw(engine: OpenVinoEngine, caption: str, seed: int, steps: int = 1) -> NDArray[np.uint8]:
    """A picture [H, W, 3] of the model's own size, by its own sampler, without guidance."""
    # A new pipeline each time, as a pipeline remembers prompts, and each drawing must reach the engine's encoder.
    drawn = Pipeline(engine)(caption, seed=seed, num_inference_steps=steps, guidance_scale=1.0)
    return np.asarray(drawn.images[0])


# --- layers ---------------------------------------------------------------------------------------------------------


def _compiled(model: Any, config: Mapping[str, Any] | None = None) -> Any:
    return shared_core().compile_model(model, "CPU", {**EXACT, **(config or {})}).create_infer_request()


def _ranges(info: ModelInfo, part: str, calls: Sequence[Arrays]) -> Layers:
    """The range of every layer's input."""
    model, _space = read_index(info.path)[part].read(shared_core(), (1, *info.latent_shape))
    nodes = layer_nodes(model)
    watched = openvino.Model([opset13.result(node.input_value(0)) for node in nodes.values()], model.get_parameters())
    request = _compiled(watched)
    extremes = np.empty((len(calls), len(nodes), 2))
    for i, inputs in enumerate(calls):
        request.infer(inputs)
        for j in range(len(nodes)):
            value = request.get_output_tensor(j).data
            extremes[i, j] = value.min(), value.max()
    lows = np.quantile(extremes[:, :, 0], OUTLIERS, axis=0)
    highs = np.quantile(extremes[:, :, 1], 1 - OUTLIERS, axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(nodes, lows, highs, strict=True)}


def _moved(info: ModelInfo, calls: Sequence[Arrays]) -> dict[str, float]:
    """How far the rounding of each layer of the text encoder, alone, moves its states, as a part of their norm."""
    files, shape = read_index(info.path)["text_encoder"], (1, info.max_tokens)

    def states(layers: Layers) -> NDArray[np.float32]:
        model, _space = files.read(shared_core(), shape)
        quantize(model, layers)
        request = _compiled(model, DYNAMIC)
        return np.concatenate([np.array(request.infer(inputs)[0]) for inputs in calls])

    exact = states({})
    names = layer_nodes(files.read(shared_core(), shape)[0])
    whole = np.linalg.norm(exact).item()
    return {name: np.linalg.norm(states({name: None}) - exact).item() / whole for name in names}


# --- quality --------------------------------------------------------------------------------------------------------


def _quality(info: ModelInfo, captions: Sequence[str], expected: Sequence[NDArray[np.uint8]]) -> tuple[float, float]:
    """Mean and worst PSNR, in decibels, of what the written form draws."""
    engine = OpenVinoEngine(info, dtype="int8")
    found = [_draw(engine, caption, seed=1000 + i) for i, caption in enumerate(captions)]
    each = [_psnr(one, other) for one, other in zip(found, expected, strict=True)]
    return float(np.mean(each)), float(np.min(each))


def _psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return float(10 * np.log10(255**2 / max(error, 0.01)))  # equal pictures count 68 dB, not infinity


def _good(mean: float, worst: float) -> bool:
    return mean >= LEAST_MEAN_DB and worst >= LEAST_WORST_DB
