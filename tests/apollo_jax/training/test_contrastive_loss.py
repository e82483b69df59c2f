# SPDX-License-Identifier: Apache-2.0
"""The ring's losses and gradients are those of the full matrix of scores, in flat memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_jax import sharding
from apollo_jax.sharding import MeshConfig
from apollo_jax.training.contrastive_loss import retrieved, sigmoid_loss, softmax_loss

ROOT = Path(__file__).parents[3]
WIDTH = 24
BOTH = 0, 1, 2, 3  # x, y, scale, bias
# The compiler as users have it: hurried, it multiplies and adds in two roundings instead of one.
USUAL = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def sigmoid_matrix(x, y, scale, bias):
    z = 2 * jnp.eye(len(x)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(z * (scale * x @ y.T + bias))) / len(x)


def softmax_matrix(x, y, scale, bias):
    del bias
    both = (jax.nn.log_softmax(scale * x @ y.T, axis=axis) for axis in (0, 1))
    return -sum(jnp.mean(jnp.diag(log_p)) for log_p in both) / 2


def sigmoid_ring(*arguments):
    return sigmoid_loss(*arguments).mean


def softmax_ring(x, y, scale, bias):
    del bias
    return softmax_loss(x, y, scale).mean


LOSSES = {"sigmoid": (sigmoid_ring, sigmoid_matrix), "softmax": (softmax_ring, softmax_matrix)}


def rows(count, dtype="float32"):
    x, y = np.random.default_rng(0).standard_normal((2, count, WIDTH))
    y = y + 0.5 * x  # pairs resemble each other
    return tuple(jnp.asarray(v / np.linalg.norm(v, axis=1, keepdims=True), dtype) for v in (x, y))


def scalars(scale=10.0, bias=-3.0):
    return jnp.float32(scale), jnp.float32(bias)


def mesh(devices=8, **axes):
    return sharding.make_mesh(MeshConfig(**axes), jax.devices()[:devices])


def on_ring(name, arguments, where, compiler_options=None):
    ring = jax.value_and_grad(LOSSES[name][0], BOTH)
    with jax.set_mesh(where):
        return jax.jit(ring, compiler_options=compiler_options)(*arguments)


def exactly(name, arguments):
    """(value, gradients) of the full matrix in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in arguments]
        found = jax.value_and_grad(LOSSES[name][1], BOTH)(*wide)
        return jax.tree.map(np.asarray, found)


def assert_close(got, expected, atol=1e-6, relative=0.0):
    """Within `atol`, or `relative` of an array's largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        limit = max(atol, relative * np.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=limit)


RINGS = [(8, 6), (8, 1), (7, 3), (3, 1), (2, 5), (1, 9)]  # devices, rows of each


@pytest.mark.parametrize(("devices", "local"), RINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_full_matrix(name, devices, local):
    arguments = (*rows(devices * local), *scalars())
    assert_close(on_ring(name, arguments, mesh(devices)), exactly(name, arguments))


@pytest.mark.parametrize(("devices", "local"), [(8, 6), (7, 3)])
@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_rows(name, devices, local):
    """Slopes are rounded to 8 bits for the products, gradients once more at the end; sums are not.

    The value, the slope in the scale and that in the bias do not see either rounding.
    """
    arguments = (*rows(devices * local, "bfloat16"), *scalars())
    (value, (dx, dy, *rest)), expected = (
        on_ring(name, arguments, mesh(devices)),
        exactly(name, arguments),
    )
    assert dx.dtype == dy.dtype == jnp.bfloat16
    assert_close((value, rest), (expected[0], list(expected[1][2:])))
    assert_close((dx, dy), expected[1][:2], relative=2**-8)


@pytest.mark.parametrize("name", LOSSES)
def test_every_layout_of_the_mesh_gives_the_same_bits(name):
    arguments = (*rows(16), *scalars())
    plain = on_ring(name, arguments, mesh())
    other = on_ring(name, arguments, mesh(data=2, fsdp=2, tensor=2))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_the_value_alone_is_the_value_beside_gradients(name):
    arguments = (*rows(24), *scalars())
    with jax.set_mesh(mesh()):
        alone = jax.jit(LOSSES[name][0])(*arguments)
    np.testing.assert_allclose(alone, on_ring(name, arguments, mesh())[0], rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_large_scores(name):
    """Scores of thousands overflow a softmax that is not shifted, and a naive log of a sigmoid.

    float32 holds such scores to 2e-4; so far slopes may be off, here times scale / rows.
    """
    scale, count = 3000.0, 16
    arguments = (*rows(count), *scalars(scale))
    value, gradients = on_ring(name, arguments, mesh(), USUAL)
    expected, slopes = exactly(name, arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_close(gradients, slopes, atol=scale / count * scale * 2.0**-23)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_follow_the_cotangent(name):
    arguments = (*rows(8), *scalars())
    once = on_ring(name, arguments, mesh())[1]
    with jax.set_mesh(mesh()):
        thrice = jax.jit(jax.grad(lambda *a: 3.0 * LOSSES[name][0](*a), BOTH))(*arguments)
    assert_close(thrice, [3.0 * np.asarray(d, np.float64) for d in once])


def test_losses_of_rows():
    """Of a row of `x` alone, or with that of its partner by the softmax; in both passes."""
    x, y, scale, bias = (np.asarray(a, np.float64) for a in (*rows(24), *scalars()))
    scores = scale * x @ y.T
    z = 2 * np.eye(24) - 1
    found = {"sigmoid": (sigmoid_loss, 4), "softmax": (softmax_loss, 3)}
    both = [np.log(np.exp(scores).sum(axis=axis)) - np.diag(scores) for axis in (0, 1)]
    expected = {"sigmoid": np.log1p(np.exp(-z * (scores + bias))).sum(axis=1)}
    expected["softmax"] = sum(both) / 2
    for name, (loss, count) in found.items():
        arguments = (*rows(24), *scalars())[:count]

        def beside(*a, loss=loss):
            told = loss(*a)
            return told.mean, told.rows

        with jax.set_mesh(mesh()):
            alone = jax.jit(loss)(*arguments)
            (_, kept), _ = jax.jit(jax.value_and_grad(beside, 0, has_aux=True))(*arguments)
        for told in (alone.rows, kept):
            assert_close(told, expected[name], relative=1e-6)
        assert_close(alone.mean, expected[name].mean())


def test_retrieval_is_counted_in_both_directions():
    x, y = rows(24)
    scores = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T
    best = [np.argmax(scores, axis=axis) == np.arange(24) for axis in (0, 1)]
    assert not np.array_equal(*best)
    with jax.set_mesh(mesh()):
        assert jax.jit(retrieved)(x, y) == np.mean(best) * 24


def test_rows_that_do_not_divide_are_named():
    with jax.set_mesh(mesh()), pytest.raises(ValueError, match=r"12 rows .* 8 devices .*: 16"):
        sigmoid_loss(*rows(12), *scalars())


CHIPS = {"v5e": "v5e:4x4,v5e:8x8,v5e:16x16", "v5p": "v5p:8x8x16"}


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("loss", "kind", "local", "limit"),
    [
        ("sigmoid", "v5e", 512, 1.0),
        ("softmax", "v5e", 512, 1.0),
        ("sigmoid", "v5p", 1024, 17.8),  # a global batch of 1,048,576
    ],
)
def test_memory_is_flat_in_the_number_of_chips(tmp_path, loss, kind, local, limit):
    """MiB of temporaries of the value and all gradients, at width 1,152; what a chip sends."""
    command = [sys.executable, "benchmarks/contrastive.py", "--ways", "ours", "--losses", loss]
    command += ["--topologies", CHIPS[kind], "--local", str(local), "--json", tmp_path / "rows"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows").read_text())
    used = [row["temporaries"] / 2**20 for row in found]
    assert max(used) <= limit, used
    assert used[-1] <= used[0] + 0.1, used
    rounds = [row["collective_bytes"] / (row["chips"] - 1) / local / 1152 for row in found]
    # Two bytes per number: both towers' rows once, for the softmax one of them twice.
    np.testing.assert_allclose(rounds, {"sigmoid": 4, "softmax": 6}[loss], rtol=0.06)
