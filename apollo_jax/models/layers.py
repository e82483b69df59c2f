# SPDX-License-Identifier: Apache-2.0
"""Layers that every model shares, and the two verbs for stacked layers: `stack` and `fold`.

B batch, L positions, D stream.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from apollo_jax import sharding
from apollo_jax.models.pieces import gained

Initializer = Callable[..., jax.Array]  # (key, shape, dtype)

M = TypeVar("M", bound=nnx.Module)
LECUN = jax.nn.initializers.lecun_normal()
SHALLOW = 4  # layers that compile as fast without a loop, and run faster

_policies = jax.checkpoint_policies
# What the backward pass keeps of each layer; the rest it computes again. The names stand in `fold`
# (the input) and in models/attention.py. Least memory last; what they cost: docs in `fold`.
REMAT_POLICIES = {
    "none": None,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names("attention"),
    ),
    "save_qkv": _policies.save_only_these_names("qkv", "attention"),
    "save_attention": _policies.save_only_these_names("attention"),
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "nested": _policies.nothing_saveable,
}


def axes(*names: str | None) -> dict[str, Any]:
    """Metadata that names a parameter's logical axes (see `apollo_jax.sharding.RULES`)."""
    return {"out_sharding": names, "eager_sharding": False}


def param(
    shape: Sequence[int],
    names: tuple[str | None, ...],
    init: Initializer,
    *,
    dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Param:
    """A parameter of `shape` with logical axis `names`."""
    return nnx.Param(init(rngs.params(), tuple(shape), dtype), **axes(*names))


class Linear(nnx.Linear):
    """x W + b, and the low-rank update of one that `lora.attach` gave it."""

    lora: Any = None

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        y = super().__call__(inputs, out_sharding)
        return y if self.lora is None else y + self.lora(inputs)


def linear(
    din: int,
    dout: int,
    names: tuple[str | None, str | None],
    *,
    bias: bool,
    init: Initializer = LECUN,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
) -> "Linear":
    """Linear [..., din] -> [..., dout] with named kernel axes."""
    return Linear(
        din,
        dout,
        use_bias=bias,
        kernel_init=init,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        kernel_metadata=axes(*names),
        bias_metadata=axes(names[1]),
        dot_general=dot_of_matrices,
    )


def dot_of_matrices(x: Array, kernel: Array, dimensions: Any, **kw: Any) -> Array:
    """[..., din] x [din, dout]; on CPU with one leading axis.

    With more of them, XLA's CPU backend transposes a copy of x for the gradient of the kernel,
    which takes as long as the gradient itself. Rows and positions that are both cut over a mesh do
    not merge without an exchange.
    """
    del dimensions  # a linear's are always these
    merge = sharding.platform() == "cpu" and sharding.ways("length") == 1
    flat = x.reshape(-1, x.shape[-1]) if merge else x
    y = jax.lax.dot_general(flat, kernel, (((flat.ndim - 1,), (0,)), ((), ())), **kw)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias over the last axis, in float32, returned in `dtype`."""

    def __init__(self, dim: int, eps: float, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kw = dict(dtype=param_dtype, rngs=rngs)
        self.scale = param((dim,), ("norm",), nnx.initializers.ones, **kw)
        self.bias = param((dim,), ("norm",), nnx.initializers.zeros, **kw)
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (y * scale + bias).astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32, returned in `dtype`."""

    def __init__(self, dim: int, eps: float, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.scale = param((dim,), ("norm",), nnx.initializers.ones, dtype=param_dtype, rngs=rngs)
        self.eps, self.dtype = eps, dtype

    def __call__(
        self,
        x: Float[Array, "*b D"],
        index: Int[Array, "B L"] | None = None,
        probe: Float[Array, "B P D"] | None = None,
    ) -> Float[Array, "*b D"]:
        """Given `index` and `probe`, gradients of the scale are told by piece: see pieces.py."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        y = y * scale if index is None or probe is None else gained(y, scale, index, probe)
        return y.astype(self.dtype)


def stack(make: Callable[[nnx.Rngs], M], depth: int, rngs: nnx.Rngs) -> M:
    """`depth` layers as one module whose parameters have a leading `layers` axis."""
    build = nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    return build(rngs.split(depth))


def fold(
    layers: nnx.Module,
    x: Array,
    *args: Any,
    per_layer: Any = (),
    axes: tuple[str, ...] = ("clips",),
    remat: str = "none",
    unroll: int = 0,
) -> tuple[Array, Any]:
    """Run stacked layers in order: x, y = layer(x, *args, *per_layer[i]); y is stacked.

    Args:
      layers: a module made by `stack`; each layer returns (x, y), y may be None.
      per_layer: pytree of arrays with a leading `layers` axis, one slice for each layer.
      axes: logical axes of x between layers; without them parameters that are cut along `embed`
        would have the compiler cut x likewise, and back, in every layer.
      remat: what the backward pass keeps, a name in REMAT_POLICIES: "none" everything; "dots" the
        results of all products; "save_qkv" queries, keys, values and what attention gives;
        "save_attention" the latter alone; "full" each layer's input; "offload" that in the host's
        memory; "nested" the inputs of every so many layers, about the root of the depth, which
        costs another forward pass.
      unroll: layers per loop iteration; default one, but all of a stack of at most SHALLOW.
    Returns the last x and the stacked y.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"unknown remat {remat!r}; known: {', '.join(REMAT_POLICIES)}")
    graphdef, state = nnx.split(layers)
    names = (*axes, *[None] * (x.ndim - len(axes)))

    def body(x: Array, inputs: tuple) -> tuple[Array, Any]:
        layer_state, extra = inputs
        x = checkpoint_name(x, "layer_input")
        x, y = nnx.merge(graphdef, layer_state)(x, *args, *extra)
        return sharding.constrain(x, *names), y

    depth = jax.tree.leaves(state)[0].shape[0]
    unroll = unroll or (depth if depth <= SHALLOW else 1)
    # Within a loop nothing is shared between the passes anyway; outside of one the compiler would
    # find what is computed twice, and keep it.
    keep = partial(jax.checkpoint, policy=REMAT_POLICIES[remat], prevent_cse=unroll >= depth)
    if remat != "none":
        body = keep(body)
    x = sharding.constrain(x, *names)
    run = partial(jax.lax.scan, body, unroll=unroll)
    if remat != "nested":
        return run(x, (state, per_layer))
    groups = next(n for n in range(math.isqrt(depth), 0, -1) if depth % n == 0)
    grouped = jax.tree.map(
        lambda a: a.reshape(groups, depth // groups, *a.shape[1:]), (state, per_layer)
    )
    x, y = jax.lax.scan(keep(run), x, grouped)
    return x, jax.tree.map(lambda a: a.reshape(depth, *a.shape[2:]), y)
