# SPDX-License-Identifier: Apache-2.0
"""Cached decoding against the plain model: the same logits, the same tokens, the same scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apollo_jax.checkpoints.pretrained import from_pretrained
from apollo_jax.inference import decoding
from apollo_jax.inference.decoding import (
    Prompts,
    bucket,
    collate,
    encode,
    extend,
    generate_tokens,
    log_likelihood,
    next_token_logits,
    prefill,
)
from apollo_jax.models.qwen2 import empty_cache

NEVER = (10_000,)  # a stop token outside the vocabulary


def assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def rows(model, official):
    """Three prompts: the official one with its two clips, its last part with one, text only."""
    ids = official["prompt_ids"].astype(np.int32)
    seen = ids == -200
    index = np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32)
    visual = official["connector_out"]
    half = len(ids) // 2 + 2
    other = np.arange(9, dtype=np.int32) * 7
    part = np.where(index[half:] >= 0, index[half:] - 8, -1).astype(np.int32)
    return [
        (np.maximum(ids, 0), visual, index),
        (np.maximum(ids[half:], 0), visual[1:], part),
        (other, None, np.full(9, -1, np.int32)),
    ]


@pytest.fixture(scope="module")
def plain(model):
    """All logits of padded rows, without cache or bucket."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def logits(tokens, visual_tokens, visual_index):
        whole = nnx.merge(graphdef, state)
        return whole(tokens, visual_tokens=visual_tokens, visual_index=visual_index)

    return lambda batch: np.asarray(logits(*batch[:3]))


def naive(plain, rows, count: int) -> list[list[int]]:
    """Greedy tokens by running the whole model again for each."""
    batch = collate(rows, length=128)
    new = []
    for _ in range(count):
        last = plain(batch)[range(len(rows)), batch.lengths - 1]
        new.append(last.argmax(-1))
        batch.tokens[range(len(rows)), batch.lengths] = new[-1]
        batch = batch._replace(lengths=batch.lengths + 1)
    return np.stack(new, axis=1).tolist()


def test_greedy_tokens_are_those_of_the_official_code(model, rows, official):
    wanted = official["greedy_new_tokens"]
    out = generate_tokens(model, *collate(rows[:1]), stop=NEVER, max_new_tokens=8)
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("pieces", [(112,), (1, 40, 71), (110, 1, 1)])
def test_cached_logits_are_the_uncached_ones(model, rows, official, plain, pieces):
    tokens, _, index = rows[0]
    batch = collate(rows[:1])
    whole = plain(batch)[0]
    assert_close(whole[:112], official["logits"][0, :112])
    step = jax.jit(lambda *args: extend(model, *args))
    cache = empty_cache(model.config.llm, 1, 128)
    end = 0
    for count in pieces:
        start, end = end, end + count
        part = (tokens[None, start:end], batch.visual_tokens, index[None, start:end])
        logits, cache = step(cache, *part, np.array([count], np.int32))
        assert_close(logits[0], whole[end - 1])


def test_long_prompts_are_fed_in_parts(model, rows, plain, monkeypatch):
    monkeypatch.setattr(decoding, "PREFILL", 32)
    batch = collate(rows)
    logits, cache = jax.jit(lambda batch: prefill(model, batch, 128))(batch)
    assert_close(logits, plain(batch)[range(3), batch.lengths - 1])
    assert cache.length.tolist() == batch.lengths.tolist()


def test_a_ragged_batch_decodes_as_its_rows_without_a_cache(model, rows, plain):
    out = generate_tokens(model, *collate(rows), stop=NEVER, max_new_tokens=6)
    assert out.tolist() == naive(plain, rows, 6)
    alone = generate_tokens(model, *collate(rows[2:]), stop=NEVER, max_new_tokens=6)
    assert alone.tolist() == out[2:].tolist()


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(model, rows):
    free = generate_tokens(model, *collate(rows), stop=NEVER, max_new_tokens=6).tolist()
    stop = free[1][2]
    assert all(stop not in free[i] for i in (0, 2))  # or this test would show nothing
    out = generate_tokens(model, *collate(rows), stop=(stop,), max_new_tokens=6).tolist()
    end = free[1].index(stop) + 1
    assert out == [free[0], free[1][:end] + [-1] * (6 - end), free[2]]


def test_the_loop_ends_with_the_last_row(model, rows, monkeypatch):
    first = int(generate_tokens(model, *collate(rows[:1]), stop=NEVER, max_new_tokens=1)[0, 0])
    steps = []
    real = decoding.extend

    def counted(*args, **kw):
        jax.debug.callback(lambda: steps.append(1))
        return real(*args, **kw)

    monkeypatch.setattr(decoding, "extend", counted)
    out = generate_tokens(
        model, *collate(rows[:1]), stop=(first,), max_new_tokens=9
    )  # a shape of its own
    jax.effects_barrier()
    assert out[0].tolist() == [first] + [-1] * 8
    assert len(steps) == 1  # the prefill


def test_a_row_ends_where_the_positions_do(rows, model):
    context = model.config.llm.max_position_embeddings
    tokens = np.arange(context - 3, dtype=np.int32) % 300
    row = (tokens, None, np.full(len(tokens), -1, np.int32))
    out = generate_tokens(model, *collate([row, rows[2]]), stop=NEVER, max_new_tokens=5)
    assert (np.asarray(out) >= 0).sum(axis=1).tolist() == [3, 5]
    tokens = np.zeros(context, np.int32)
    row = (tokens, None, np.full(context, -1, np.int32))
    with pytest.raises(ValueError, match=f"no room.*{context} tokens.*{context} positions"):
        generate_tokens(model, *collate([row]), stop=NEVER)


def test_sampling_is_a_function_of_the_seed(model, rows):
    def draw(seed: int, temperature: float = 1.0, top_p: float = 1.0):
        kw = dict[str, Any](seed=seed, temperature=temperature, top_p=top_p)
        out = generate_tokens(model, *collate(rows), stop=NEVER, max_new_tokens=6, **kw)
        return out.tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0, top_p=1e-6) == draw(1, temperature=0.0)


def test_one_compilation_serves_a_bucket(model, rows):
    decode: Any = decoding.decode
    tokens, _, index = rows[2]
    generate_tokens(model, *collate([(tokens, None, index)]), stop=NEVER, max_new_tokens=6)
    compiled = decode._cache_size()
    other = collate([(tokens[:4], None, index[:4])])
    generate_tokens(model, *other, stop=(5,), max_new_tokens=6, temperature=1, top_p=0.5, seed=5)
    assert decode._cache_size() == compiled


def test_scores_are_those_of_the_plain_model(model, rows, plain):
    batch = collate(rows)
    logits = plain(batch)
    last = logits[range(3), batch.lengths - 1]
    assert_close(next_token_logits(model, *batch), last)

    log_p = np.asarray(jax.nn.log_softmax(logits))
    starts = batch.lengths - np.array([5, 1, 8], np.int32)
    wanted = [
        sum(log_p[row, t - 1, batch.tokens[row, t]] for t in range(start, end))
        for row, (start, end) in enumerate(zip(starts, batch.lengths, strict=True))
    ]
    scores = log_likelihood(model, *batch, starts=starts)
    np.testing.assert_allclose(scores, wanted, rtol=2e-5)


@pytest.mark.parametrize("count", [1, 3, 21])
def test_clips_are_encoded_in_groups(model, official, count):
    clips = np.arange(count) % 3 % 2  # 0 1 0 0 1 0 ...
    siglip = official["pixel_values_siglip"].transpose(0, 1, 3, 4, 2)[clips]
    internvideo2 = official["pixel_values_internvideo2"].transpose(0, 2, 3, 4, 1)[clips]
    visual = encode(model, {"siglip-so400m-patch14-384": siglip, "internvideo2": internvideo2})
    assert_close(visual, official["connector_out"][clips])


def test_bfloat16(checkpoint, rows):
    model = from_pretrained(checkpoint, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    tokens, visual, index = rows[0]
    batch = collate([(tokens, visual.astype(jnp.bfloat16), index)])
    out = generate_tokens(model, *batch, stop=NEVER, max_new_tokens=4)
    assert out.shape == (1, 4)
    assert next_token_logits(model, *batch).dtype == jnp.float32


@pytest.mark.parametrize(("length", "wanted"), [(1, 64), (64, 64), (65, 128), (1000, 1024)])
def test_bucket(length, wanted):
    assert bucket(length) == wanted


def test_rows_must_fit():
    row = (np.zeros(70, np.int32), None, np.full(70, -1, np.int32))
    assert isinstance(collate([row]), Prompts)
    with pytest.raises(ValueError, match="a row of 70 does not fit a batch of 64"):
        collate([row], length=64)


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_settings_are_checked(model, rows, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        generate_tokens(model, *collate(rows), stop=NEVER, **wrong)
