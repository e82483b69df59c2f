# SPDX-License-Identifier: Apache-2.0
"""Qwen2: causality, segments and the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apollo_jax.models import apollo, qwen2

CONFIG = apollo.Config.debug(vocab_size=32).llm


@pytest.fixture(scope="module")
def decoder(build):
    return build(lambda: qwen2.Qwen2(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def inputs():
    return jax.random.normal(jax.random.key(0), (2, 12, CONFIG.hidden_size))


def positions(start: int, stop: int):
    return jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))


def whole(decoder, x, remat="none"):
    return decoder(x, positions=positions(0, x.shape[1]), remat=remat)[0]


def extend(decoder, x, positions, cache, lengths):
    """Hidden states of x [B, L, D] after the cached tokens; the cache grown by `lengths`."""
    out, new = decoder(x, positions=positions, cache=cache)
    return out, qwen2.append(cache, new, lengths)


def test_no_position_sees_a_later_one(decoder, inputs, run):
    plain = run(whole, decoder, inputs)
    changed = run(whole, decoder, inputs.at[:, 7:].add(1.0))
    np.testing.assert_array_equal(plain[:, :7], changed[:, :7])
    assert np.abs(plain[:, 7:] - changed[:, 7:]).max(axis=-1).min() > 0


def test_cached_equals_uncached_with_rows_of_different_length(decoder, inputs, run):
    expected = run(whole, decoder, inputs)
    lengths = jnp.array([5, 8])
    cache = qwen2.empty_cache(CONFIG, 2, 14)
    out, cache = run(extend, decoder, inputs[:, :8], positions(0, 8), cache, lengths)
    for row, length in enumerate((5, 8)):
        np.testing.assert_allclose(out[row, :length], expected[row, :length], atol=1e-5)
    for now in (lengths, lengths + 1, lengths + 2, lengths + 3):
        np.testing.assert_array_equal(cache.length, now)
        x = jnp.take_along_axis(inputs, now[:, None, None], axis=1)
        out, cache = run(extend, decoder, x, now[:, None], cache, jnp.array([1, 1]))
        for row in range(2):
            np.testing.assert_allclose(out[row, 0], expected[row, now[row]], atol=1e-5)


def test_remat_changes_nothing(decoder, inputs, run):
    plain = run(whole, decoder, inputs)
    for remat in ("dots", "full"):
        again = run(lambda decoder, x, r=remat: whole(decoder, x, r), decoder, inputs)
        np.testing.assert_array_equal(again, plain)
    with pytest.raises(ValueError, match="unknown remat 'half'; known: none, dots, save_qkv"):
        whole(decoder, inputs, "half")


def test_an_untied_head_is_its_own_table(inputs, build):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    untied = build(lambda: qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
    logits = untied.unembed(inputs)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, inputs @ untied.lm_head[...].T, atol=1e-5)


# Tensor elements as the model pages count them.
PUBLISHED = {
    "qwen2p5_0p5b": 494_032_768,
    "qwen2p5_1p5b": 1_543_714_304,
    "qwen2p5_3b": 3_085_938_688,
    "qwen2p5_7b": 7_615_616_512,
    "qwen2p5_14b": 14_770_033_664,
    "qwen2p5_32b": 32_763_876_352,
    "qwen2p5_72b": 72_706_203_648,
    "qwen2_0p5b": 494_032_768,
    "qwen2_1p5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen2_72b": 72_706_203_648,
    "qwen1p5_4b": 3_950_369_280,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    config = getattr(qwen2.Config, size)()
    abstract = nnx.eval_shape(lambda: qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract))) == PUBLISHED[size]
    assert config.head_dim * config.num_attention_heads == config.hidden_size
