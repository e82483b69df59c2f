# SPDX-License-Identifier: Apache-2.0
"""APOLLO and APOLLO-Mini move weights as the authors' PyTorch package does, given its projections.

Its random matrices are replaced by ours, which are drawn elsewhere. The package is not for
commercial use (CC BY-NC), so `make parity` does not bring it and this is skipped; to run it:
.venv/bin/pip install apollo-torch==1.0.3
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apollo_jax.config import LearningRates, OptimizerConfig
from apollo_jax.training.optimizer import make_optimizer, make_schedules
from apollo_jax.training.optimizers import apollo

RATE, EVERY, STEPS = 1e-2, 3, 10  # four projections
SHAPES = {"llm/up/kernel": (24, 40), "llm/down/kernel": (32, 16), "llm/q/kernel": (20, 20)}


@pytest.mark.parity
@pytest.mark.parametrize(("name", "tolerance"), [("apollo", 5e-7), ("apollo_mini", 2e-6)])
def test_the_authors_package_moves_weights_alike(name: Any, tolerance: float, monkeypatch):
    torch = pytest.importorskip("torch")
    authors = pytest.importorskip("apollo_torch", reason="pip install apollo-torch, see above")
    projectors = pytest.importorskip("apollo_torch.random_projector")

    low = getattr(OptimizerConfig(), name)
    low = dataclasses.replace(low, rank=min(low.rank, 4), every=EVERY)
    config = OptimizerConfig(
        LearningRates(llm=RATE), "constant", 0.0, 0.0, name=name, **{name: low}
    )
    drawn = dict.fromkeys(SHAPES, 0)

    def ours(self, gradient, rank, type, seed):  # of a kernel [out, in]
        param = next(n for n, shape in SHAPES.items() if shape == tuple(gradient.shape)[::-1])
        key = apollo.projection_key(low.seed, param, drawn[param])
        drawn[param] += 1
        p = torch.tensor(np.asarray(apollo.projection(key, rank, min(gradient.shape), jnp.float32)))
        return p.T if type == "left" else p

    monkeypatch.setattr(projectors.GradientProjector, "get_orthogonal_matrix", ours)
    rng = np.random.default_rng(0)
    draw = lambda: {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}  # noqa: E731
    start, grads = {n: w / 10 for n, w in draw().items()}, [draw() for _ in range(STEPS)]

    theirs = {n: torch.nn.Parameter(torch.tensor(w.T.copy())) for n, w in start.items()}
    how = dict(rank=low.rank, update_proj_gap=EVERY, scale=low.alpha**2, scale_type=low.each)
    group = dict(params=list(theirs.values()), proj="random", proj_type="std", **how)
    step = authors.APOLLOAdamW([group], lr=RATE, betas=(config.b1, config.b2), eps=config.eps)
    params: Any = jax.tree.map(jnp.asarray, start)
    tx = make_optimizer(config, make_schedules(config, STEPS))
    state = tx.init(params)
    for grad in grads:
        for n, param in theirs.items():
            param.grad = torch.tensor(grad[n].T.copy())
        step.step()
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jax.tree.map(jnp.asarray, grad), state, params)
        params = optax.apply_updates(params, updates)
    assert set(drawn.values()) == {4}
    for n, param in theirs.items():
        assert np.abs(params[n] - start[n]).mean() > RATE / 2, n
        np.testing.assert_allclose(params[n], param.detach().numpy().T, 0, tolerance, err_msg=n)
