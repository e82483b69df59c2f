# SPDX-License-Identifier: Apache-2.0
"""Qwen2 / Qwen2.5 decoder <-> transformers' Qwen2ForCausalLM."""

from typing import Any

from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Rule, Table, norm, weight
from apollo_jax.models.qwen2 import Config, Qwen2

MODEL = Qwen2
# What Qwen2Config assumes where config.json is silent.
KNOWN = defaults(Config) | dict(
    hidden_size=4096,
    intermediate_size=22_016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
FIXED = dict(hidden_act="silu", rope_scaling=None, use_sliding_window=False)
BLOCK = "model.layers.{i}"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def config(files: dict[str, Any], where: str) -> Config:
    """Config from config.json."""
    json, place = files["config.json"], f"{where}/config.json"
    rope = json.get("rope_parameters") or {}  # transformers 5 nests what used to be flat
    take(rope, {}, dict(rope_type="default"), f"{place}: rope_parameters")
    if "rope_theta" in rope:
        json = json | dict(rope_theta=rope["rope_theta"])
    length = json.get("max_position_embeddings", KNOWN["max_position_embeddings"])
    return Config(**take(json, KNOWN | dict(model_max_length=length), FIXED, place))


def published(c: Config) -> dict[str, Any]:
    """The published JSON files of a fresh decoder; token ids come with a tokenizer."""
    return {
        "config.json": dict(
            architectures=["Qwen2ForCausalLM"],
            attention_dropout=0.0,
            hidden_act="silu",
            max_window_layers=c.num_hidden_layers,
            model_type="qwen2",
            sliding_window=None,
            tokenizer_model_max_length=c.model_max_length,
            tokenizer_padding_side="right",
            use_cache=True,
            use_sliding_window=False,
            **{name: getattr(c, name) for name in KNOWN},
        ),
        "generation_config.json": {"_from_model_config": True},
    }


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """The rules; a tied head may be stored as a copy of the embedding."""
    del published_config  # a decoder has no unused tensors
    tied = c.tie_word_embeddings
    rules = [
        Rule(EMBEDDING, "embedding"),
        *norm(f"{BLOCK}.input_layernorm", "layers.norm1"),
        *weight(f"{BLOCK}.self_attn.q_proj", "layers.q", bias=True),
        *weight(f"{BLOCK}.self_attn.k_proj", "layers.k", bias=True),
        *weight(f"{BLOCK}.self_attn.v_proj", "layers.v", bias=True),
        *weight(f"{BLOCK}.self_attn.o_proj", "layers.out"),
        *norm(f"{BLOCK}.post_attention_layernorm", "layers.norm2"),
        *weight(f"{BLOCK}.mlp.gate_proj", "layers.gate"),
        *weight(f"{BLOCK}.mlp.up_proj", "layers.up"),
        *weight(f"{BLOCK}.mlp.down_proj", "layers.down"),
        *norm("model.norm", "norm"),
        *([] if tied else [Rule(HEAD, "lm_head")]),
    ]
    return Table(tuple(rules), c.num_hidden_layers, copies={HEAD: EMBEDDING} if tied else {})
