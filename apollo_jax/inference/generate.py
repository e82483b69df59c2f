# SPDX-License-Identifier: Apache-2.0
"""Answer a question about a video or an image."""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from apollo_jax.checkpoints.pretrained import from_pretrained
from apollo_jax.inference.decoding import collate, encode, generate_tokens
from apollo_jax.inference.processor import Example, Processor
from apollo_jax.models.apollo import Apollo


def generate(
    model: Apollo,
    processor: Processor,
    video: Any = None,
    image: Any = None,
    *,
    prompt: str,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> str:
    """The model's answer to `prompt` about a video or image file, or about neither.

    Raises ValueError or FileNotFoundError for what cannot be read, or does not fit the context.
    """
    example = processor(video=video, image=image, prompt=prompt)
    return answer(
        model,
        processor,
        example,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )


def answer(model: Apollo, processor: Processor, example: Example, **sampling: Any) -> str:
    """The model's answer to one processed example; `sampling` as in `generate_tokens`."""
    visual = encode(model, example.pixels) if example.pixels else None
    prompts = collate([(example.tokens, visual, example.visual_index)])
    tokens = generate_tokens(model, *prompts, stop=processor.stop, **sampling)
    return processor.tokenizer.decode(np.asarray(tokens)[0]).strip()


# ---- command line


def load(checkpoint: str) -> tuple[Apollo, Processor]:
    """The model in a folder and its processor."""
    processor = Processor.from_pretrained(checkpoint)  # first: it refuses what is no whole model
    return load_model(checkpoint), processor


def load_model(checkpoint: str) -> Apollo:
    """The model in a folder, in bfloat16; in float32 on a CPU, which is slow at anything else."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return from_pretrained(checkpoint, dtype=dtype, param_dtype=dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `generate` and `chat` share."""
    parser.add_argument("--checkpoint", required=True, help="official Apollo folder, or a run's")
    about = parser.add_mutually_exclusive_group()
    about.add_argument("--video", help="video file to talk about")
    about.add_argument("--image", help="image file to talk about")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from this share of the mass")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="length of an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def main(argv: Sequence[str] | None = None) -> None:
    """`apollo-jax generate`."""
    parser = argparse.ArgumentParser("apollo-jax generate", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--json", action="store_true", help="print the prompt, clips and times too")
    args = parser.parse_args(argv)
    status = Console(stderr=True)
    processor = Processor.from_pretrained(args.checkpoint)
    start = time.perf_counter()
    with status.status("watching"):  # before the weights are read, which may take minutes
        example = processor(args.video, image=args.image, prompt=args.prompt)
    seconds = time.perf_counter() - start
    with status.status(f"loading {args.checkpoint}"):
        model = load_model(args.checkpoint)
    start = time.perf_counter()
    with status.status("answering (the first answer of a length compiles)"):
        text = answer(
            model,
            processor,
            example,
            temperature=args.temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
            seed=args.seed,
        )
    if not args.json:
        print(text)
        return
    record = {
        "prompt": example.prompt,
        "clip_indices": example.clip_indices.tolist(),
        "timestamps": example.timestamps.tolist(),
        "text": text,
        "seconds": round(seconds + time.perf_counter() - start, 3),
    }
    print(json.dumps(record, ensure_ascii=False, indent=2))
