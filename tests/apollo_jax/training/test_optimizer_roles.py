# SPDX-License-Identifier: Apache-2.0
"""Roles and stacks are told by names; here the logical axes of every model's parameters agree.

And what follows from roles: factors of rate and decay, where moments lie.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_jax import sharding
from apollo_jax.config import LearningRates, OptimizerConfig
from apollo_jax.models.apollo import Apollo
from apollo_jax.models.apollo import Config as ApolloConfig
from apollo_jax.models.clip import CLIP
from apollo_jax.models.clip import Config as CLIPConfig
from apollo_jax.models.dinov2 import Config as DINOv2Config
from apollo_jax.models.dinov2 import DINOv2
from apollo_jax.models.languagebind import Config as LanguageBindConfig
from apollo_jax.models.languagebind import LanguageBindVideo
from apollo_jax.models.siglip2 import Config as SigLIP2Config
from apollo_jax.models.siglip2 import SigLIP2
from apollo_jax.models.videomae import Config as VideoMAEConfig
from apollo_jax.models.videomae import VideoMAE
from apollo_jax.models.vjepa import VJEPA
from apollo_jax.models.vjepa import Config as VJEPAConfig
from apollo_jax.models.vjepa2 import VJEPA2
from apollo_jax.models.vjepa2 import Config as VJEPA2Config
from apollo_jax.sharding import MeshConfig
from apollo_jax.training.optimizer import make_optimizer, make_schedules
from apollo_jax.training.optimizers import options
from apollo_jax.training.optimizers.roles import is_stacked, role_of
from apollo_jax.training.state import flatten, moment_sharding

MODELS = {
    Apollo: ApolloConfig.apollo_7b(),  # with SigLIP and InternVideo2
    CLIP: CLIPConfig.large_336(),
    DINOv2: DINOv2Config.large_with_registers(),
    LanguageBindVideo: LanguageBindConfig.video_v1(),
    SigLIP2: SigLIP2Config.base(),
    VideoMAE: VideoMAEConfig.base(),
    VJEPA: VJEPAConfig.vitl16(),
    VJEPA2: VJEPA2Config.vitl_256(),
}


def roles_of_axes(axes: tuple[str | None, ...]) -> set[str]:
    """Which roles a parameter with these logical axes, of one layer, may have."""
    if axes == ("norm",):
        return {"norm", "bias"}
    if len(axes) < 2:
        return {"bias", "embedding"}  # a class token
    first = {
        "vocab": {"embedding", "head"},
        "patch": {"embedding", "matrix"},
        "position": {"embedding"},
        "latents": {"embedding"},
    }
    return first.get(axes[0] or "", {"matrix"})


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_names_say_what_axes_say(model):
    params = flatten(nnx.state(nnx.eval_shape(lambda: model(MODELS[model], rngs=nnx.Rngs(0)))))
    assert len(params) > 10
    for name, leaf in params.items():
        axes = leaf.get_metadata().get("out_sharding")
        assert is_stacked(name) == (axes[0] == "layers"), name
        own = axes[1:] if is_stacked(name) else axes
        assert role_of(name, leaf.ndim) in roles_of_axes(own), (name, axes)


def test_roles_of_some_names():
    shapes = {
        "llm/layers/q/kernel": 3, "llm/embedding": 2, "llm/lm_head": 2, "llm/norm/scale": 1,
        "llm/layers/q/bias": 2, "vision_tower/towers/1/layers/ls1": 2,
        "vision_tower/towers/0/patch_embed/kernel": 2, "connector/proj/linears/0/kernel": 2,
        "connector/resampler/norm/gain": 1, "connector/resampler/latents": 2, "new/scalar": 0,
    }  # fmt: skip
    assert [role_of(n, d) for n, d in shapes.items()] == [
        "matrix", "embedding", "head", "norm", "bias", "norm", "embedding", "matrix", "norm",
        "embedding", "bias",
    ]  # fmt: skip


PARAMS: Any = {
    "llm/layers/q/kernel": jnp.ones((2, 3, 4)),
    "llm/lm_head": jnp.ones((5, 3)),
    "llm/norm/scale": jnp.ones(3),
    "connector/q/kernel": jnp.ones((3, 3)),
}


def moved(config: OptimizerConfig) -> dict[str, float]:
    """By how much each parameter falls from 1, its gradient being 0: by its decay alone."""
    tx = make_optimizer(config, make_schedules(config, 10))
    with jax.numpy_dtype_promotion("standard"):
        updates: Any = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)[0]
    return {n: -float(u.ravel()[0]) for n, u in updates.items()}


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion", "apollo"])
def test_decay_and_rate_by_component_and_role(name):
    config = OptimizerConfig(
        LearningRates(connector=1.0, llm=0.1),
        "constant",
        0.0,
        weight_decay=0.5,
        name=name,
        rate_by_role=options.ByRole(head=3.0),
        decay_by_component=options.ByComponent(connector=0.2),
        apollo=options.Apollo(rank=2),
    )
    expected = {
        "llm/layers/q/kernel": 0.05,
        "llm/lm_head": 0.15,
        "llm/norm/scale": 0.0,
        "connector/q/kernel": 0.1,
    }
    assert moved(config) == pytest.approx(expected, rel=1e-6)


def test_norms_decay_where_they_are_told_to():
    config = OptimizerConfig(
        LearningRates(connector=1.0, llm=1.0),
        "constant",
        0.0,
        weight_decay=0.5,
        decay_by_role=options.ByRole(matrix=0.0, head=0.0),
    )
    decayed = {n for n, change in moved(config).items() if change}
    assert decayed == {"llm/norm/scale"}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((28, 64, 96), P(None, "fsdp", "tensor")),  # a moment
        ((28, 64), P(None, ("fsdp", "tensor"))),  # means over the last axis
        ((28, 96), P(None, ("tensor", "fsdp"))),
        ((28, 8, 96), P(None, None, ("tensor", "fsdp"))),  # low rank
        ((28, 64, 3), P(None, ("fsdp", "tensor"), None)),
        ((28, 5, 9), P("fsdp", None, None)),  # what divides only
        ((28,), P(None)),
        ((), P()),
    ],
)
def test_where_moments_of_another_shape_lie(shape, expected):
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    place = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    param = jax.ShapeDtypeStruct((28, 64, 96), np.float32, sharding=place)
    assert moment_sharding(shape, param).spec == expected
