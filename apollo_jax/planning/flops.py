# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of a traced function: those of its matrix products, loops included.

The model's FLOPs of a train step are counted on the gradient of its loss, traced without
rematerialisation and with all logits at once: what any implementation must compute. A product
[M, K] x [K, N] counts 2 M N K; causal attention counts whole, as XLA computes it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


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
