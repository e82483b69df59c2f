# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of a traced function: those of its matrix products, loops included.

The model's FLOPs of a train step are counted on the gradient of its loss, traced without
rematerialisation and with all logits at once: what any implementation must compute. A product
[M, K] x [K, N] counts 2 M N K; causal attention counts whole, as XLA computes it.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.extend import core

from apollo_jax import sharding
from apollo_jax.config import Experiment
from apollo_jax.planning.ahead_of_time import abstract_batch
from apollo_jax.training import losses, stages
from apollo_jax.training.state import abstract_model, merge, split
from apollo_jax.training.step import batch_sums
from data_pipeline.batch import Batch


def model_flops(experiment: Experiment) -> float:
    """FLOPs that a microbatch of this experiment needs: products of its loss's gradient.

    Counted without rematerialisation, of logits too; the decoder's causal attention by half.
    """
    train = replace(experiment.train, remat="none", loss_chunk=0, loss_cut="positions")
    trained = stages.trained_components(experiment.optimizer.learning_rates)
    llm, length = experiment.model.llm, experiment.data.length
    products = 4.0 * length**2 * llm.hidden_size * llm.num_hidden_layers
    passes = 3  # the gradient passes through the decoder in every stage
    row = flops_of_a_row(experiment, trained, partial(batch_sums, train=train))
    return (row - passes * products / 2) * experiment.data.batch_size


def flops_of_a_row(
    experiment: Any, trained: tuple[str, ...], sums: Callable[..., losses.Sums]
) -> int:
    """FLOPs of the gradient of a batch of one row, of any kind of experiment.

    Args:
      trained: components with a gradient.
      sums: (model, batch) -> loss sums.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices(backend="cpu")[:1])
    graphdef, shapes = abstract_model(experiment.model, experiment.train, trained, mesh)
    plain = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in shapes.items()}
    params, frozen = split(plain, trained)
    one_row = replace(experiment, data=replace(experiment.data, batch_size=1))
    batch = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), abstract_batch(one_row, mesh)
    )

    def loss(params: Any, frozen: Any, batch: Batch) -> jax.Array:
        return losses.mean(sums(merge(graphdef, params, frozen), batch))[0]

    with jax.set_mesh(mesh):  # a CPU's, so that attention is no kernel wherever this runs
        return count(jax.grad(loss), params, frozen, batch)


def count(function: Callable, *args: Any) -> int:
    """FLOPs of function(*args); arguments may be shapes."""
    return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr(jaxpr: core.Jaxpr) -> int:
    return sum(_equation(e) for e in jaxpr.eqns)


def _equation(eqn: core.JaxprEqn) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        ((contracted, _), _) = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        kernel = _shape(eqn.invars[1])
        per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return 2 * math.prod(_shape(eqn.outvars[0])) * per_output
    inner = sum(_jaxpr(j) for j in _inner(eqn.params))
    if name == "scan":
        return inner * eqn.params["length"]
    return inner


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs among an equation's parameters; of a cond's branches the dearest."""
    if "branches" in params:
        return [max((b.jaxpr for b in params["branches"]), key=_jaxpr)]
    found = []
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
    return found
