# SPDX-License-Identifier: Apache-2.0
"""transformers' own classes: which one a published folder is for, and what it computes.

N clips, F frames, I image side (pixels), B sequences, L tokens, V vocabulary.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from apollo_jax.models import dinov2, qwen2, siglip2, videomae, vjepa2
from apollo_jax.models.siglip import patchify

# model_type in config.json -> the class, unless `architectures` names another one in HEADED
CLASSES = {
    "siglip_vision_model": "SiglipVisionModel",
    "siglip": "SiglipModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "siglip2": "Siglip2Model",
    "clip_vision_model": "CLIPVisionModel",
    "clip": "CLIPModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "videomae": "VideoMAEModel",
    "vjepa2": "VJEPA2Model",
    "qwen2": "Qwen2ForCausalLM",
}
HEADED = (
    "CLIPVisionModelWithProjection",
    "VideoMAEForPreTraining",
    "VideoMAEForVideoClassification",
)
OTHERWISE = {"vit": "vjepa", "mm_connector": "the connector"}  # what others call themselves
ENCODERS = ("vision_model", "videomae")  # where a model with heads has the tower
TOKENS = 64


def class_name(config: Mapping[str, Any]) -> str:
    """The class in transformers that a published config.json is for, "" if there is none."""
    kind, [named, *_] = config.get("model_type"), [*(config.get("architectures") or []), ""]
    if kind not in (None, *CLASSES):
        return ""
    return named if named in (*CLASSES.values(), *HEADED) else CLASSES.get(str(kind), "")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers prints as it loads: `run` looks at all that matters of it."""
    from transformers.utils import logging  # pyright: ignore[reportMissingImports]

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def fixed_input(c: Any) -> np.ndarray:
    """Tokens [1, L] of a decoder; pixels [1, F, I, I, 3] of a tower."""
    rng = np.random.default_rng(0)
    if isinstance(c, qwen2.Config):
        return rng.integers(0, c.vocab_size, (1, min(TOKENS, c.max_position_embeddings)), np.int32)
    frames, side = 1, c.image_size
    match c:
        case videomae.Config():
            frames = c.num_frames
        case vjepa2.Config():  # takes any number
            frames = 2 * c.tubelet_size
        case dinov2.Config() if c.interpolation == "scale_offset":
            side = c.table_size  # later versions of transformers interpolate by another rule
    return rng.standard_normal((1, frames, side, side, 3), np.float32)


def run(
    name: str, folder: Path, c: Any, x: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The first layer's input and the output of every layer; logits or last features.

    ValueError if the folder does not fit the class to the last tensor, or the class fails.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    try:
        model, info = getattr(transformers, name).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # of many kinds, all about this folder
        raise ValueError(f"{name} of transformers cannot load it: {_first(error)}") from error
    if problems := [f"{kind}: {_few(keys)}" for kind, keys in info.items() if keys]:
        raise ValueError(f"{name} of transformers does not load all of it: {'; '.join(problems)}")
    encoder = next((getattr(model, e) for e in ENCODERS if hasattr(model, e)), model).eval()
    lists = (m for m in encoder.modules() if isinstance(m, torch.nn.ModuleList))
    blocks: Any = next((m for m in lists if len(m) == c.num_hidden_layers), None)
    if blocks is None:
        raise ValueError(f"{name} of transformers has no {c.num_hidden_layers} layers")
    states: list[np.ndarray] = []

    def keep(state: Any) -> None:
        states.append((state[0] if isinstance(state, tuple) else state).numpy())

    blocks[0].register_forward_pre_hook(lambda _, inputs: keep(inputs))
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, output: keep(output))
    args, options = _asked(c, x)
    try:
        with torch.no_grad():
            out = encoder(*map(torch.tensor, args), **options)
    except Exception as error:
        raise ValueError(
            f"{name} of transformers fails on a fixed input: {_first(error)}"
        ) from error
    match c:
        case qwen2.Config():
            return states, out.logits.numpy()
        case vjepa2.Config():
            return states, out.last_hidden_state.numpy()
    return states, None


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _few(keys: Any) -> str:
    names = sorted(map(str, keys)) if not isinstance(keys, str) else [keys]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _asked(c: Any, x: np.ndarray) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """The input as transformers takes it."""
    match c:
        case qwen2.Config():
            return (x.astype(np.int64),), dict(use_cache=False)
        case siglip2.Config():
            patches = np.asarray(patchify(jnp.asarray(x[0]), c.patch_size))
            n, rows, columns, k = patches.shape
            mask, shape = np.ones((n, rows * columns), np.int32), np.array([[rows, columns]])
            return (patches.reshape(n, -1, k), mask, shape), {}
        case vjepa2.Config():
            return (x.transpose(0, 1, 4, 2, 3),), dict(skip_predictor=True)
        case videomae.Config():
            return (x.transpose(0, 1, 4, 2, 3),), {}
    return (x[0].transpose(0, 3, 1, 2),), {}
