# SPDX-License-Identifier: Apache-2.0
"""Connector <-> the authors' MMConnector (its projector and resampler)."""

from typing import Any

from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Rule, Table, conv, norm, weight
from apollo_jax.models.connectors import Config, Connector

MODEL = Connector
KNOWN = defaults(Config)
FIXED = dict(hidden_act="silu")
LAYER = "resampler.layers.{i}"


def config(files: dict[str, Any], where: str) -> Config:
    """Config from config.json."""
    place = f"{where}/config.json"
    fields = take(files["config.json"], KNOWN, FIXED, place)
    try:
        return Config(**fields)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def published(c: Config) -> dict[str, Any]:
    """The published JSON file of a fresh connector."""
    fields = {name: getattr(c, name) for name in KNOWN}
    grid = list(c.token_input_shape)
    output = {}
    if c.resampler_type == "avg":
        output = dict(token_output_shape=[grid[0], c.pooled_side, c.pooled_side])
    return {
        "config.json": dict(
            architectures=["Connector"],
            attention_dropout=0.0,
            auto_map=dict(AutoConfig="configuration_connector.ConnectorConfig"),
            hidden_act="silu",
            model_type="mm_connector",
            num_patches=24,
            rms_norm_eps=1e-6,
            **(fields | dict(token_input_shape=grid)),
            **output,
        )
    }


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """The rules of this projector and this resampler."""
    del published_config  # a connector has no unused tensors
    if c.projector_type.startswith("conv2d"):
        kernel = int(c.projector_type.rpartition("x")[2])
        projector = [
            *weight("proj.layer1", "proj.conv1", how=conv(kernel, kernel)),
            *weight("proj.layer2", "proj.conv2", how=conv(kernel, kernel)),
        ]
    elif c.projector_type == "perceiver_mlp":
        projector = gated("proj", "proj")
    else:  # the activations between the linears take the odd indices
        projector = [
            rule
            for i in range(int(c.projector_type[3]))
            for rule in weight(f"proj.{2 * i}", f"proj.linears.{i}", bias=True)
        ]
    if c.resampler_type == "avg":
        return Table(tuple(projector))
    resampler = [
        Rule("resampler.latents", "resampler.latents"),
        *weighted_norm(f"{LAYER}.input_latents_norm", "resampler.layers.latents_norm"),
        *weighted_norm(f"{LAYER}.input_context_norm", "resampler.layers.context_norm"),
        *weight(f"{LAYER}.self_attn.q_proj", "resampler.layers.q"),
        *weight(f"{LAYER}.self_attn.k_proj", "resampler.layers.k"),
        *weight(f"{LAYER}.self_attn.v_proj", "resampler.layers.v"),
        *weight(f"{LAYER}.self_attn.o_proj", "resampler.layers.out"),
        *weighted_norm(f"{LAYER}.post_attention_layernorm", "resampler.layers.mlp_norm"),
        *gated(f"{LAYER}.mlp", "resampler.layers.mlp"),
        *weighted_norm("resampler.norm", "resampler.norm"),
    ]
    return Table((*projector, *resampler), c.resampler_depth)


def gated(name: str, path: str) -> list[Rule]:
    """A gated MLP."""
    parts = ("gate", "up", "down")
    return [r for part in parts for r in weight(f"{name}.{part}_proj", f"{path}.{part}")]


def weighted_norm(name: str, path: str) -> list[Rule]:
    """A LayerNorm and its second gain, published as `wheight`."""
    inner = norm(f"{name}.norm", f"{path}.norm", bias=True)
    return [*inner, Rule(f"{name}.wheight", f"{path}.gain")]
