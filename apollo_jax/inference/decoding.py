# SPDX-License-Identifier: Apache-2.0
"""Batches of prompts through the decoder: prefill and cached decoding in one compiled loop; scores.

B rows, L padded prompt positions, M visual tokens of a row, T new tokens, N clips, F frames per
clip, I encoder image side, Q visual tokens per clip, D stream, V vocabulary.

Functions compile once per shape; `collate` keeps the shapes few. Rows are padded on the right:
causality hides the padding from the tokens before it, and the cache never stores it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from apollo_jax.inference.sampling import sample
from apollo_jax.models.apollo import Apollo
from apollo_jax.models.qwen2 import KVCache, append, empty_cache

CLIPS_AT_A_TIME = 16  # encoded together, which bounds the memory a long video takes
PREFILL = 1024  # positions fed together: attention scores grow with their number times the prompt's
PADDING = -1  # in generated tokens, after a row's end


class Prompts(NamedTuple):
    """A batch of prompts, in the order the functions below take them."""

    tokens: Any  # i32[B, L]
    visual_tokens: Any  # f[B, M, D], None if no row shows anything
    visual_index: Any  # i32[B, L], -1 on text
    lengths: Any  # i32[B], real tokens of each row


# ---- batches


def bucket(length: int) -> int:
    """The first of 64, 128, 256, ... that is at least `length`."""
    return max(64, 1 << (length - 1).bit_length())


def collate(
    rows: Sequence[tuple[np.ndarray, np.ndarray | None, np.ndarray]], length: int = 0
) -> Prompts:
    """Pad rows of (tokens i32[n], visual tokens f[N, Q, D] or None, visual index i32[n]).

    Args:
      length: positions of the batch; default the bucket of its longest row.
    """
    lengths = np.array([len(tokens) for tokens, _, _ in rows], np.int32)
    length = length or bucket(int(lengths.max()))
    tokens = np.stack([_pad(t, length, 0) for t, _, _ in rows])
    shown = [None if v is None else v.reshape(-1, v.shape[-1]) for _, v, _ in rows]
    example = next((v for v in shown if v is not None), None)
    if example is None:
        return Prompts(tokens, None, None, lengths)
    nothing = np.zeros((0, example.shape[1]), example.dtype)
    # No row has more visual tokens than positions, so the one bucket serves both.
    visual = np.stack([_pad(nothing if v is None else v, length, 0) for v in shown])
    return Prompts(tokens, visual, np.stack([_pad(i, length, -1) for _, _, i in rows]), lengths)


def _pad(x: np.ndarray, length: int, value: int) -> np.ndarray:
    if len(x) > length:
        raise ValueError(f"a row of {len(x)} does not fit a batch of {length} positions")
    return np.pad(x, [(0, length - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=value)


def encode(
    model: Apollo, pixels: Mapping[str, Float[np.ndarray, "N F I I 3"]]
) -> Float[np.ndarray, "N Q D"]:
    """Visual tokens of normalised clips, on the host: a few clips at a time, any number of them."""
    graphdef, state = nnx.split(model)
    count = len(next(iter(pixels.values())))
    group = min(CLIPS_AT_A_TIME, 1 << (count - 1).bit_length())
    encoded = []
    for start in range(0, count, group):
        clips = {name: _pad(x[start : start + group], group, 0) for name, x in pixels.items()}
        encoded.append(np.asarray(_encode(graphdef, state, clips)))
    return np.concatenate(encoded)[:count]


@partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, state: nnx.State, pixels: dict[str, Array]) -> Array:
    model = nnx.merge(graphdef, state)
    return model.connector(model.vision_tower(pixels))


# ---- decoding


def generate_tokens(
    model: Apollo,
    tokens: Int[Any, "B L"],
    visual_tokens: Float[Any, "B M D"] | None,
    visual_index: Int[Any, "B L"] | None,
    lengths: Int[Any, " B"],
    *,
    stop: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> Int[Array, "B T"]:
    """Up to max_new_tokens = T ids per row, its stop token included, -1 after it.

    A row also ends where the model's positions do; raises ValueError if its prompt already does.
    """
    prompts = Prompts(tokens, visual_tokens, visual_index, lengths)
    limits = new_token_limits(model, lengths, max_new_tokens)
    draw = Draw.new(temperature, top_p, seed)
    graphdef, state = nnx.split(model)
    stops = np.asarray(stop, np.int32)
    return decode(graphdef, state, None, prompts, draw, limits, stops, budget=max_new_tokens)[0]


class Draw(NamedTuple):
    """How tokens are drawn (see `sampling.sample`)."""

    key: Any
    temperature: Any
    top_p: Any

    @classmethod
    def new(cls, temperature: float, top_p: float, seed: int) -> "Draw":
        """Raises ValueError for a negative temperature or a top_p outside (0, 1]."""
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}, must be 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}, must be in (0, 1]")
        return cls(jax.random.key(seed), np.float32(temperature), np.float32(top_p))


def new_token_limits(model: Apollo, lengths: Any, max_new_tokens: int) -> Int[np.ndarray, " B"]:
    """How many tokens may follow each row of `lengths` tokens; ValueError if none."""
    context = model.config.llm.max_position_embeddings
    room = context - np.asarray(lengths)
    if max_new_tokens < 1 or room.min() < 1:
        raise ValueError(
            f"no room to answer: prompts of up to {context - room.min()} tokens, "
            f"max_new_tokens {max_new_tokens}, the model has {context} positions"
        )
    return np.minimum(room, max_new_tokens).astype(np.int32)


@partial(jax.jit, static_argnames=("graphdef", "budget"))
def decode(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: KVCache | None,
    prompts: Prompts,
    draw: Draw,
    limits: Int[Array, " B"],
    stop: Int[Array, " stops"],
    *,
    budget: int,
) -> tuple[Int[Array, "B {budget}"], KVCache]:
    """Feed the prompts (after the cached tokens, if any), then at most `budget` new tokens.

    The returned cache holds everything but each row's last token, which nothing has followed yet.
    """
    model = nnx.merge(graphdef, state)
    if cache is None:
        logits, cache = prefill(model, prompts, prompts.tokens.shape[1] + budget)
    else:
        logits, cache = extend(model, cache, *prompts)

    def choose(i: Array, logits: Array, done: Array, out: Array) -> tuple[Array, Array]:
        token = sample(jax.random.fold_in(draw.key, i), logits, draw.temperature, draw.top_p)
        token = jnp.where(done, PADDING, token)
        ended = done | jnp.isin(token, stop) | (i + 1 >= limits)
        return ended, out.at[:, i].set(token)

    def unfinished(carry: tuple) -> Array:
        return ~jnp.all(carry[1])

    def step(carry: tuple) -> tuple:
        i, done, out, cache = carry
        token = jax.lax.dynamic_slice_in_dim(out, i - 1, 1, axis=1)
        logits, cache = extend(model, cache, token, None, None, (~done).astype(jnp.int32))
        return i + 1, *choose(i, logits, done, out), cache

    out = jnp.full((len(prompts.tokens), budget), PADDING, jnp.int32)
    none_done = jnp.zeros(len(prompts.tokens), bool)
    first = choose(jnp.int32(0), logits, none_done, out)
    _, _, out, cache = jax.lax.while_loop(unfinished, step, (jnp.int32(1), *first, cache))
    return out, cache


def prefill(model: Apollo, prompts: Prompts, size: int) -> tuple[Float[Array, "B V"], KVCache]:
    """The logits that follow each prompt, and a cache of `size` positions that holds it."""
    tokens, visual_tokens, visual_index, lengths = prompts
    rows, length = tokens.shape
    cache = empty_cache(model.config.llm, rows, size, model.llm.dtype)
    if length <= PREFILL:
        return extend(model, cache, *prompts, fresh=True)

    def step(i: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        logits, cache = carry
        start = i * PREFILL

        def part(x: Any) -> Any:
            return x if x is None else jax.lax.dynamic_slice_in_dim(x, start, PREFILL, axis=1)

        count = jnp.clip(lengths - start, 0, PREFILL)
        new, cache = extend(model, cache, part(tokens), visual_tokens, part(visual_index), count)
        return jnp.where(count[:, None] > 0, new, logits), cache

    logits = jnp.zeros((rows, model.config.llm.vocab_size), jnp.float32)
    parts = (jnp.max(lengths) + PREFILL - 1) // PREFILL  # padding behind all rows costs nothing
    return jax.lax.fori_loop(0, parts, step, (logits, cache))


def extend(
    model: Apollo,
    cache: KVCache,
    tokens: Int[Array, "B L"],
    visual_tokens: Float[Array, "B M D"] | None,
    visual_index: Int[Array, "B L"] | None,
    lengths: Int[Array, " B"],
    *,
    fresh: bool = False,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Feed each row's first `lengths` tokens after its cached ones.

    Returns the logits that follow the last of them, and the longer cache. `fresh`: the cache is
    empty, so attention need not look at it.
    """
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    x = model.splice(tokens, visual_tokens, visual_index)
    x, new = model.llm(x, positions=positions, cache=None if fresh else cache)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    logits = model.llm.unembed(jnp.take_along_axis(x, last, axis=1))[:, 0]
    return logits, append(cache, new, lengths)


# ---- scores


def next_token_logits(
    model: Apollo,
    tokens: Int[Any, "B L"],
    visual_tokens: Float[Any, "B M D"] | None,
    visual_index: Int[Any, "B L"] | None,
    lengths: Int[Any, " B"],
) -> Float[Array, "B V"]:
    """Logits of the token after each prompt."""
    prompts = Prompts(tokens, visual_tokens, visual_index, lengths)
    return _next_logits(*nnx.split(model), prompts)


def log_likelihood(
    model: Apollo,
    tokens: Int[Any, "B L"],
    visual_tokens: Float[Any, "B M D"] | None,
    visual_index: Int[Any, "B L"] | None,
    lengths: Int[Any, " B"],
    *,
    starts: Int[Any, " B"],
) -> Float[Array, " B"]:
    """log p(tokens[start:length] | tokens[:start]) of each row, summed; 0 < start < length."""
    span = int(np.max(np.asarray(lengths) - starts))
    prompts = Prompts(tokens, visual_tokens, visual_index, lengths)
    return _log_likelihood(*nnx.split(model), prompts, starts, span=1 << (span - 1).bit_length())


@partial(jax.jit, static_argnums=0)
def _next_logits(graphdef: nnx.GraphDef, state: nnx.State, prompts: Prompts) -> Array:
    return prefill(nnx.merge(graphdef, state), prompts, prompts.tokens.shape[1])[0]


@partial(jax.jit, static_argnums=0, static_argnames="span")
def _log_likelihood(
    graphdef: nnx.GraphDef, state: nnx.State, prompts: Prompts, starts: Array, *, span: int
) -> Array:
    at = starts[:, None] + jnp.arange(span, dtype=jnp.int32)
    scored = at < prompts.lengths[:, None]
    at = jnp.where(scored, at, 1)
    log_probs = jax.nn.log_softmax(_logits_at(graphdef, state, prompts, at - 1))
    targets = jnp.take_along_axis(prompts.tokens, at, axis=1)
    log_probs = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(scored, log_probs, 0.0), axis=1)


def _logits_at(
    graphdef: nnx.GraphDef, state: nnx.State, prompts: Prompts, at: Int[Array, "B P"]
) -> Float[Array, "B P V"]:
    """Logits of a few positions: those of all would be the largest array by far."""
    model = nnx.merge(graphdef, state)
    tokens, visual_tokens, visual_index, _ = prompts
    hidden = model.hidden(tokens, visual_tokens=visual_tokens, visual_index=visual_index)
    return model.llm.unembed(jnp.take_along_axis(hidden, at[..., None], axis=1))
