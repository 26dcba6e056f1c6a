"""The engine of the base install: OpenVINO on the CPU, without torch.

Two things make a cold start short. Compiled networks are kept in the cache folder, where loading one takes a fifth of
compiling it; and the parts load side by side, each in a thread of its own. What computes in int8, and how that is made
from the float16 weights, is in `onestill.engine.openvino.int8`.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import openvino

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo, cache_folder, written_whole
from onestill.engine.device import runs_on_cpu
from onestill.engine.openvino.compile_cache import network_key
from onestill.engine.openvino.int8 import DYNAMIC, Int8, Layers, quantize, read_int8
from onestill.engine.openvino.ir import PARTS, PartFiles, read_index
from onestill.engine.protocol import Conditioning
from onestill.errors import CheckpointError, OnestillError
from onestill.pixels import to_images, to_pictures
from onestill.text.tokenize import PromptTokenizer

__all__ = ["OpenVinoEngine", "read_graph"]

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
# oneDNN's names for sets of instructions that multiply no bytes, or no bfloat16.
WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
WITHOUT_BFLOAT16 = (*WITHOUT_VNNI, "AVX2_VNNI", "AVX512_CORE_VNNI")
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
# OpenVINO writes a kernel for each chain of small operations as it loads a network: half of what loading takes. The
# text encoder is as fast without and the same. The UNet is not; int8 layers of given ranges come out wrong (26 dB).
UNCHAINED = {"SNIPPETS_MODE": "DISABLE"}
MANY = 4  # images to a call of the larger batch; each size is compiled for itself, as static shapes run fastest
WORTH_COMPILING = 8  # images asked for at once; fewer are done one by one before a larger batch would have compiled
MOST_KEPT = 24  # compiled networks in the cache, all models together
BLOB_END = b"onestill blob 1\n"

Arrays = Mapping[str, NDArray[Any]]


class OpenVinoEngine:
    """A model on OpenVINO. See `onestill.engine.Engine`.

    Args:
        info: the model; its folder must have the `openvino` form.
        device: "cpu", which None and "auto" are too.
        dtype: "float32", "bfloat16" or "int8"; None is the fastest that the CPU has instructions for, int8 where the
            model's quality in it was measured and found good. It changes pictures a little: docs/generate.md says how
            much.
        threads: how many to compute with; None lets OpenVINO choose.
        quick_start: load the UNet in half the time and run nothing yet; it then draws a quarter slower.

    Raises:
        OnestillError: another device or dtype was asked for, or the model has no int8 form.
        CheckpointError: the OpenVINO form is incomplete, or was made from other weights.
    """

    name = "openvino"

    def __init__(
        self,
        info: ModelInfo,
        *,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        quick_start: bool = False,
    ) -> None:
        if not runs_on_cpu(device):
            raise OnestillError(f"The engine 'openvino' runs on 'cpu'; for '{device}' choose the engine 'torch'.")
        known = (*PRECISIONS, "int8")
        if dtype is not None and dtype not in known:
            raise OnestillError(f"The engine 'openvino' computes in {', '.join(known)}, not '{dtype}'.")
        core = openvino.Core()
        int8 = read_int8(info.path)
        if dtype == "int8" and (int8 is None or not int8.parts):
            raise OnestillError(f"The model '{info.name}' has no int8 form; leave out the dtype, or ask for float32.")
        self.info = info
        self.device = "cpu"
        self.dtype = dtype or _fastest_dtype(core, int8)
        layers = int8.parts if int8 is not None and self.dtype == "int8" else {}
        # Beside int8 the other networks are in the fastest float type; float layers of int8 networks are exact.
        hint = PRECISIONS[_fastest_float(core) if self.dtype == "int8" else self.dtype]
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        exact, files = {"time", *layers}, read_index(info.path)
        ranged = {part for part, ranges in layers.items() if any(at is not None for at in ranges.values())}
        unchained = {"text_encoder", *(["unet"] if quick_start else [])} - ranged if _can_unchain(core) else set()
        self._parts = {
            part: _Part(
                part,
                core,
                files[part],
                config | (EXACT if part in exact else {}) | (UNCHAINED if part in unchained else {}),
                layers.get(part, {}),
            )
            for part in PARTS
        }
        self._time_states: dict[int, NDArray[np.float32]] = {}  # filled as timesteps come up; there are few
        # The largest first, as the others fit beside it. The encoder waits until there is an image to encode.
        with ThreadPoolExecutor(max_workers=3) as pool:
            first = ("unet", "decoder", "text_encoder", "time")
            loading = [pool.submit(self._parts[part].load, run=not quick_start) for part in first]
            self._tokenize = PromptTokenizer(info)
            for future in loading:
                future.result()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts."""
        tokens = self._tokenize(prompts)
        inputs: dict[str, NDArray[Any]] = {"input_ids": tokens.ids}
        if self.info.use_attention_mask:
            inputs["attention_mask"] = tokens.mask
        return Conditioning(self._parts["text_encoder"](inputs), tokens.cut, tokens.words_cut)

    def denoise(self, latents: NDArray[np.float32], timestep: int, conditioning: Conditioning) -> NDArray[np.float32]:
        """Latents [B, C, h, w] -> the network's output, of the same shape."""
        if timestep not in self._time_states:
            self._time_states[timestep] = self._parts["time"]({"timestep": np.array([timestep], dtype=np.float32)})
        inputs = {"sample": latents, "encoder_hidden_states": conditioning.states}
        return self._parts["unet"](inputs, time=self._time_states[timestep])

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures [B, H, W, 3]."""
        return to_pictures(self._parts["decoder"]({"latents": latents / np.float32(self.info.scaling_factor)}))

    def encode_image(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures [B, H, W, 3] -> latents [B, C, h, w]."""
        return self._parts["encoder"]({"image": to_images(pictures)}) * np.float32(self.info.scaling_factor)

    def warm_ups(self, most: int) -> tuple[int, ...]:
        """See `onestill.engine.Engine`; the larger batch is compiled once so many are asked for, and then used."""
        return (1, WORTH_COMPILING) if most >= MANY else (1,)


class _Part:
    """One network, compiled for each batch size when that is first needed. Safe to call from many threads."""

    def __init__(self, name: str, core: Any, files: PartFiles, config: Mapping[str, Any], layers: Layers) -> None:
        self._name = name
        self._core = core
        self._files = files
        self._layers = layers
        self._config = {**config, **DYNAMIC} if None in layers.values() else dict(config)
        self._lock = threading.Lock()  # held while compiling
        self._compiled: dict[int, Any] = {}
        self._memory: list[NDArray[np.uint8]] = []  # what compiled networks may point into; OpenVINO does not own it
        self._idle: dict[int, list[Any]] = {1: [], MANY: []}  # infer requests that no thread is using

    def load(self, *, run: bool) -> None:
        """Load the network for one image and, where asked, run it once, as the first run also prepares its kernels."""
        compiled = self._for_batch(1)
        if not run:
            return
        with self._request(1) as request:
            request.infer({port.any_name: np.zeros(list(port.shape), _dtype(port)) for port in compiled.inputs})

    def __call__(self, inputs: Arrays, **shared: NDArray[Any]) -> NDArray[np.float32]:
        """Run B images in batches of the sizes there are.

        Args:
            inputs: arrays whose first axis is B.
            shared: arrays that are the same for every image.
        """
        total = len(next(iter(inputs.values())))
        has_many = MANY in self._compiled or total >= WORTH_COMPILING
        outputs = []
        start = 0
        while start < total:
            size = MANY if has_many and total - start >= MANY else 1
            chunk = {name: np.ascontiguousarray(value[start : start + size]) for name, value in inputs.items()}
            self._for_batch(size)
            with self._request(size) as request:
                request.infer({**chunk, **shared})
                outputs.append(np.array(request.get_output_tensor(0).data, dtype=np.float32))  # its memory is reused
            start += size
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    @contextmanager
    def _request(self, size: int) -> Iterator[Any]:
        idle = self._idle[size]
        try:
            request = idle.pop()
        except IndexError:
            request = self._compiled[size].create_infer_request()
        yield request
        idle.append(request)

    def _for_batch(self, size: int) -> Any:
        with self._lock:
            if size not in self._compiled:
                self._compiled[size] = self._load(size)
            return self._compiled[size]

    def _load(self, size: int) -> Any:
        layers, files = repr(sorted(self._layers.items())), self._files.fingerprint()
        key = network_key(self._core, self._config, layers, str(size), files)
        path = cache_folder() / "openvino" / f"{self._name}-{key}.blob"
        return self._import(path) or self._compile(path, size)

    def _import(self, path: Path) -> Any:
        with suppress(OSError, ValueError, RuntimeError):
            blob = np.memmap(path, dtype=np.uint8, mode="c")  # half of it is a table of words, of which few are read
            if blob[-len(BLOB_END) :].tobytes() == BLOB_END:
                path.touch()  # the ones longest unused go first
                self._memory.append(blob)
                tensor = openvino.Tensor(blob[: -len(BLOB_END)], shared_memory=True)
                return self._core.import_model(tensor, "CPU", self._config)
        return None

    def _compile(self, path: Path, size: int) -> Any:
        try:
            model, space = read_graph(self._core, self._files, size)
            self._memory.append(space)
            quantize(model, self._layers)
            compiled = self._core.compile_model(model, "CPU", self._config)
        except RuntimeError as error:
            raise CheckpointError(f"OpenVINO cannot load '{self._files.graph}'; copy the model again.") from error
        # Only a speed-up: a cache that cannot be written, or a full disk, must not stop anyone from drawing.
        with suppress(OSError, RuntimeError), written_whole(path) as unfinished:
            unfinished.write_bytes(compiled.export_model().getvalue() + BLOB_END)
            _forget_oldest(path.parent)
        return compiled


def read_graph(core: Any, files: PartFiles, size: int) -> tuple[Any, NDArray[np.uint8]]:
    """A network for batches of `size`, and the memory that its constants point into, which must outlive it."""
    graph, space = files.read()
    model = core.read_model(graph, openvino.Tensor(space, shared_memory=True))
    model.reshape({port.any_name: _static(port.partial_shape, size) for port in model.inputs})
    return model, space


def _fastest_dtype(core: Any, int8: Int8 | None) -> str:
    number = _fastest_float(core)
    return "int8" if int8 is not None and int8.parts and _multiplies_bytes(number == "bfloat16") else number


def _can_unchain(core: Any) -> bool:
    """Whether this OpenVINO has the option, which its documentation does not promise."""
    with suppress(RuntimeError):
        core.set_property("CPU", dict.fromkeys(UNCHAINED, "ENABLE"))  # what it is anyway
        return True
    return False


def _fastest_float(core: Any) -> str:
    has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bfloat16" if has_bfloat16 and _onednn_limit() not in WITHOUT_BFLOAT16 else "float32"


def _onednn_limit() -> str:
    """The instructions that the environment limits oneDNN to, "" without a limit. OpenVINO asks the CPU alone."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


def _multiplies_bytes(has_bfloat16: bool) -> bool:
    """Whether int8 pays: OpenVINO names it on any CPU, but without VNNI it gains little, and on Arm it loses.

    An x86 CPU with bfloat16 has VNNI too. Of the others only Linux says; elsewhere the answer is no.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or _onednn_limit() in WITHOUT_VNNI:
        return False
    with suppress(OSError):
        return has_bfloat16 or "vnni" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return False


def _static(shape: Any, size: int) -> list[int]:
    return [size if dimension.is_dynamic else dimension.get_length() for dimension in shape]


def _dtype(port: Any) -> Any:
    return port.element_type.to_dtype()


def _forget_oldest(folder: Path) -> None:
    last_used: Callable[[Path], float] = lambda path: path.stat().st_mtime  # noqa: E731
    for path in sorted(folder.glob("*.blob"), key=last_used, reverse=True)[MOST_KEPT - 1 :]:
        with suppress(OSError):
            os.unlink(path)
