# SPDX-License-Identifier: Apache-2.0
"""Products are counted where they run: in loops, branches, gradients."""

import jax
import jax.numpy as jnp
import pytest

from apollo_jax.planning import flops


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_in_loops_and_gradients():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0].sum()

    product = 2 * 3 * 8 * 8
    args = shape(3, 8), shape(5, 8, 8)
    assert flops.count(loop, *args) == 5 * product
    assert flops.count(jax.grad(loop, 1), *args) == 5 * 3 * product
    assert flops.count(jax.jit(jax.grad(loop)), *args) == 5 * 2 * product  # w is not trained


def test_recomputation_and_branches_and_batches():
    def step(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    args = shape(4, 8), shape(8, 8)
    whole = flops.count(jax.grad(step, 1), *args)
    assert flops.count(jax.grad(jax.checkpoint(step), 1), *args) > whole

    def branches(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops.count(branches, *args) == 2 * 2 * 4 * 8 * 8
    assert (
        flops.count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shape(7, 2, 3), shape(7, 3, 5))
        == 7 * 2 * 30
    )


@pytest.mark.parametrize(("stride", "out"), [(1, 6), (2, 3)])
def test_convolutions(stride, out):
    def convolve(x, w):
        return jax.lax.conv(x, w, (stride, stride), "VALID")

    assert flops.count(convolve, shape(2, 3, 8, 8), shape(5, 3, 3, 3)) == 2 * 2 * 5 * out**2 * 27
