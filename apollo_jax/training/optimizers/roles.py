# SPDX-License-Identifier: Apache-2.0
"""What a parameter is for, told by its name, and transformations that treat roles or layers apart.

Parameters come as flat dicts by name. Names with a part `layers` have a leading axis of layers
(`models.layers.stack`): whatever is computed from a whole array is computed for each of them.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

Role = Literal["matrix", "embedding", "head", "norm", "bias"]

_NAMES: dict[str, Role] = {
    "bias": "bias",
    "scale": "norm",
    "gain": "norm",
    "ls1": "norm",
    "ls2": "norm",
    "embedding": "embedding",
    "time_embedding": "embedding",
    "positions": "embedding",
    "cls_token": "embedding",
    "registers": "embedding",
    "latents": "embedding",
    "lm_head": "head",
}


def is_stacked(name: str) -> bool:
    """Whether the first axis of this parameter counts layers."""
    return "layers" in name.split("/")


def role_of(name: str, ndim: int) -> Role:
    """The role of a parameter with `ndim` axes.

    Patch kernels, positions, class tokens and latents are embeddings, since they start the stream;
    an unknown name is a matrix or, with one axis or none, a bias.
    """
    *parents, last = name.split("/")
    if last in _NAMES:
        return _NAMES[last]
    if "patch_embed" in parents:
        return "embedding"
    return "matrix" if ndim - is_stacked(name) >= 2 else "bias"


def by_role(
    special: optax.GradientTransformation,
    rest: optax.GradientTransformation,
    roles: tuple[Role, ...] = ("matrix",),
    above: int = 0,
) -> optax.GradientTransformation:
    """`special` for the parameters of these roles with two axes, `rest` for the others.

    Args:
      above: `special` is only for those of which both axes are longer than this.
    """

    def is_special(name: str, x: jax.Array) -> bool:
        shape = x.shape[is_stacked(name) :]
        return role_of(name, x.ndim) in roles and len(shape) == 2 and min(shape) > above

    def parts(tree: dict) -> tuple[dict, dict]:
        one = {n: x for n, x in tree.items() if is_special(n, x)}
        return one, {n: x for n, x in tree.items() if n not in one}

    def init(params: Any) -> Any:
        return tuple(tx.init(p) for tx, p in zip((special, rest), parts(params), strict=True))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        given = zip((special, rest), parts(updates), state, parts(params), strict=True)
        done: Any = [tx.update(u, s, p) for tx, u, s, p in given]
        both = done[0][0] | done[1][0]
        return {n: both[n] for n in updates}, tuple(s for _, s in done)

    return optax.GradientTransformation(init, update)


def per_layer(
    tx: optax.GradientTransformation, skip: tuple[Role, ...] = ()
) -> optax.GradientTransformation:
    """`tx`, which is for one array, for every array and every layer of a stack by itself.

    Its state is a dict by name, with a leading axis of layers where the parameter has one. Updates
    of the roles in `skip` pass unchanged.
    """

    def over(name: str, function: Callable) -> Callable:
        return jax.vmap(function) if is_stacked(name) else function

    def init(params: Any) -> Any:
        kept = {n: p for n, p in params.items() if role_of(n, p.ndim) not in skip}
        return {n: over(n, tx.init)(p) for n, p in kept.items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        done = {n: over(n, tx.update)(updates[n], s, params[n]) for n, s in state.items()}
        out = {n: done[n][0] if n in done else u for n, u in updates.items()}
        return out, {n: done[n][1] for n in state}

    return optax.GradientTransformation(init, update)
