# SPDX-License-Identifier: Apache-2.0
"""The training state: flat dicts of arrays by name, split into what trains and what does not.

A name is the path in the model, "llm/layers/q/kernel"; its first part is the component.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_jax import sharding
from apollo_jax.config import TrainConfig
from apollo_jax.models import apollo, lora, two_towers

HOST, DEVICE = "pinned_host", "device"  # kinds of memory, as jax calls them

ModelConfig = apollo.Config | two_towers.Config
Arrays = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]


class TrainState(NamedTuple):
    """Everything a step reads and (but for `frozen`) replaces."""

    step: Any  # i32[], optimizer updates so far
    params: dict[str, Any]  # arrays (or their shapes) that train
    frozen: dict[str, Any]  # that do not: outside the gradient, its clipping and the optimizer
    opt_state: optax.OptState  # moments of `params` alone


def component_of(name: str) -> str:
    """`llm` of `llm/norm/scale`."""
    return name.partition("/")[0]


def flatten(state: nnx.State) -> dict[str, Any]:
    """{"connector/latents": variable, ...} of a model's state."""
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def merge(graphdef: nnx.GraphDef, *parts: Mapping[str, Any]) -> Any:
    """The model whose weights are `parts`; inverse of `nnx.split` and `flatten`."""
    tree: dict[str | int, Any] = {}
    for part in parts:
        for name, value in part.items():
            *parents, last = (int(k) if k.isdigit() else k for k in name.split("/"))
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = value
    return nnx.merge(graphdef, tree)


def abstract_model(
    config: ModelConfig, train: TrainConfig, trained: tuple[str, ...], mesh: Mesh
) -> tuple[nnx.GraphDef, Shapes]:
    """The model's graph and, by name, every weight's shape, stored dtype and sharding."""
    graphdef, state = jax.eval_shape(lambda: nnx.split(_build(config, train, seed=0)))
    shardings, leaves = flatten(sharding.param_shardings(state, mesh)), flatten(state)
    params, _ = split(leaves, trained)

    def shape(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = jnp.dtype(train.param_dtype if name in params else train.frozen_dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[name].get_value())

    return graphdef, {name: shape(name, leaf) for name, leaf in leaves.items()}


def random_weights(config: ModelConfig, train: TrainConfig, shapes: Shapes, seed: int) -> Arrays:
    """Fresh weights, made where they will live; the same on any mesh."""

    @partial(jax.jit, out_shardings={name: s.sharding for name, s in shapes.items()})
    def init() -> Arrays:
        weights = flatten(nnx.state(_build(config, train, seed)))
        return {name: weights[name][...].astype(s.dtype) for name, s in shapes.items()}

    return init()


def _build(config: ModelConfig, train: TrainConfig, seed: int) -> nnx.Module:
    make: Any = apollo.Apollo if isinstance(config, apollo.Config) else two_towers.TwoTowers
    rngs = nnx.Rngs(seed)
    model = make(config, rngs=rngs, dtype=jnp.dtype(train.dtype))
    lora.attach(model, train.lora, rngs)
    return model


def split(weights: Mapping[str, Any], trained: tuple[str, ...]) -> tuple[dict, dict]:
    """(params, frozen): the weights of the trained components, and the others.

    Of a component with low-rank updates these alone are its params.
    """
    low = {component_of(n) for n in weights if lora.is_update(n)}

    def trains(name: str) -> bool:
        component = component_of(name)
        return component in trained and (component not in low or lora.is_update(name))

    params = {n: w for n, w in weights.items() if trains(n)}
    return params, {n: w for n, w in weights.items() if n not in params}


def abstract_state(
    shapes: Shapes,
    trained: tuple[str, ...],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    offload: bool = False,
) -> TrainState:
    """The TrainState as shapes with shardings: to compile against and to restore into.

    With `offload` the moments lie in the host's memory; see `on_device`.
    """
    params, frozen = split(shapes, trained)
    everywhere = NamedSharding(mesh, P())

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        param = next((params[n] for n in names if n in params), None)
        where = everywhere if param is None else moment_sharding(leaf.shape, param)
        if offload and leaf.ndim:  # not the counts
            where = where.with_memory_kind(HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    opt_state = jax.eval_shape(tx.init, params)
    opt_state = jax.tree_util.tree_map_with_path(place, opt_state)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return TrainState(step, params, frozen, opt_state)


def moment_sharding(shape: tuple[int, ...], param: jax.ShapeDtypeStruct) -> NamedSharding:
    """Where what an optimizer keeps of a parameter lies: as the parameter, if it has its shape.

    Otherwise (factors, low-rank moments) axes of the parameter's sizes are cut as they are there,
    and mesh axes that remain cut the longest axis that they divide.
    """
    assert isinstance(param.sharding, NamedSharding)
    if shape == param.shape:
        return param.sharding
    mesh, axes = param.sharding.mesh, list(zip(param.shape, param.sharding.spec, strict=True))
    parts: list[tuple[str, ...]] = []
    for size in shape:
        at = next((i for i, (other, _) in enumerate(axes) if other == size), None)
        parts.append(() if at is None else _names(axes[at][1]))
        axes = axes if at is None else axes[at + 1 :]
    used = {name for part in parts for name in part}
    for name in (n for part in param.sharding.spec for n in _names(part) if n not in used):
        ways = [math.prod(mesh.shape[n] for n in (*part, name)) for part in parts]
        fits = [i for i, size in enumerate(shape) if size % ways[i] == 0 and len(shape) > 1]
        if fits:
            longest = max(fits, key=lambda i: shape[i])
            parts[longest] = (*parts[longest], name)
    return NamedSharding(mesh, P(*(part or None for part in parts)))


def _names(part: Any) -> tuple[str, ...]:
    """The mesh axes in one place of a PartitionSpec."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def on_device(tree: Any, shapes: Any) -> Any:
    """Within a step: what `abstract_state` laid out in the host's memory, in the devices' own."""

    def move(leaf: Any, shape: Any) -> Any:
        away = shape.sharding.memory_kind == HOST
        return jax.device_put(leaf, shape.sharding.with_memory_kind(DEVICE)) if away else leaf

    return jax.tree.map(move, tree, shapes)


def create(weights: Arrays, abstract: TrainState, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step, around `weights`."""
    places = jax.tree.map(lambda s: s.sharding, (abstract.step, abstract.opt_state))
    params, frozen = ({n: weights[n] for n in part} for part in (abstract.params, abstract.frozen))
    init = jax.jit(lambda p: (jnp.zeros((), jnp.int32), tx.init(p)), out_shardings=places)
    step, opt_state = init(params)
    return TrainState(step, params, frozen, opt_state)
