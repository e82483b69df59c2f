# SPDX-License-Identifier: Apache-2.0
"""Checkpoints made of others: an Apollo assembled from its parts, one part alone, another head."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from apollo_jax.checkpoints import companions
from apollo_jax.checkpoints.checkpoint import (
    Checkpoint,
    Part,
    fresh_files,
    part_of_weights,
    published_part,
    same_bits,
    tower_place,
)
from apollo_jax.checkpoints.opening import open_checkpoint
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.rules import connector as rules
from apollo_jax.checkpoints.rules import qwen2 as decoder
from apollo_jax.checkpoints.rules.fields import check_fields
from apollo_jax.checkpoints.rules.table import parameters
from apollo_jax.checkpoints.translate import Arrays, Padded, Renamed
from apollo_jax.models import apollo, connectors, qwen2
from apollo_jax.models.vision_tower import common_grid

FRESH = "fresh"  # in place of a connector's path
CONNECTOR, LLM = "connector", "llm"
TABLES: tuple[str, ...] = (decoder.EMBEDDING, decoder.HEAD)  # rows by token


# ---- assembling and splitting


def assemble(
    source: str | os.PathLike | None,
    given: Mapping[str, str],
    *,
    connector: dict[str, Any] | None = None,
    seed: int = 0,
) -> Checkpoint:
    """An Apollo of parts: those of `source` if there is one, replaced by those `given`.

    Args:
      given: {"llm" | "connector" | a tower's name: path of a checkpoint}; connector may be "fresh".
      connector: published fields of a fresh connector beside those that the other parts determine.
      seed: of a fresh connector's weights.
    Raises ValueError if a part is missing or does not fit the others.
    """
    base = None if source is None else open_checkpoint(source)
    if base is not None and not isinstance(base.config, apollo.Config):
        raise ValueError(f"{source} is one part; parts are replaced in a whole Apollo")
    parts = _named(base)
    layout.check_names(given, "--part")
    for name, path in given.items():
        if path == FRESH and name != CONNECTOR:
            raise ValueError(f"--part {name}=fresh: only the connector can be fresh")
        if not (name == CONNECTOR and path == FRESH):
            parts[name] = _only_part(name, path)
    towers: dict[str, Any] = {
        name: p.config for name, p in parts.items() if name not in (CONNECTOR, LLM)
    }
    wanting = [LLM] * (LLM not in parts) + ["a tower"] * (not towers)
    if wanting:
        raise ValueError(f"an Apollo needs {' and '.join(wanting)} too: --part NAME=PATH")
    if CONNECTOR not in parts or given.get(CONNECTOR) == FRESH:
        parts[CONNECTOR] = fresh_connector(towers, parts[LLM].config, connector or {}, seed)
    about: dict[str, Any] = {}
    if base is not None:
        about = {f: getattr(base.config, f) for f in ("clip_duration", "frames_per_clip")}
    frames = [t.num_frames for t in towers.values() if hasattr(t, "num_frames")]
    if frames:
        about["frames_per_clip"] = max(frames)
    ends: Any = dict(connector=parts[CONNECTOR].config, llm=parts[LLM].config)
    config = apollo.Config(towers=towers, **ends, **about)
    placed = {tower_place(i): parts[name] for i, name in enumerate(towers)}
    placed |= {CONNECTOR: parts[CONNECTOR], LLM: parts[LLM]}
    return Checkpoint(config, placed)


def _named(base: Checkpoint | None) -> dict[str, Part]:
    if base is None:
        return {}
    assert isinstance(base.config, apollo.Config)
    return dict(zip([*base.config.towers, CONNECTOR, LLM], base.parts.values(), strict=True))


def _only_part(name: str, path: str) -> Part:
    opened = open_checkpoint(path)
    if isinstance(opened.config, apollo.Config):
        return one(opened, name).parts[""]
    is_llm, is_connector = (isinstance(opened.config, c) for c in (qwen2.Config, connectors.Config))
    if is_llm != (name == LLM) or is_connector != (name == CONNECTOR):
        kind = type(opened.config).__module__.rpartition(".")[2]
        raise ValueError(f"--part {name}={path}: {path} holds a {kind}")
    return opened.parts[""]


def fresh_connector(towers: Mapping[str, Any], llm: Any, fields: dict[str, Any], seed: int) -> Part:
    """A connector with random weights between `towers` and `llm`."""
    check_fields(fields, rules.KNOWN, "--connector")
    fitting = dict(
        vision_hidden_size=sum(t.hidden_size for t in towers.values()),
        text_hidden_size=llm.hidden_size,
        token_input_shape=list(common_grid(dict(towers))),
    )
    config = rules.config({companions.CONFIG: fitting | fields}, "--connector")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        module = connectors.Connector(config, rngs=nnx.Rngs(seed))
    weights = Arrays({path: np.asarray(leaf) for path, leaf in parameters(module).items()})
    return part_of_weights(config, fresh_files(config, weights), weights, Arrays({}), {})


def one(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """One part of an Apollo alone: a tower by its name, "connector" or "llm"."""
    parts = _named(checkpoint) if isinstance(checkpoint.config, apollo.Config) else {}
    if name not in parts:
        raise ValueError(f"there is no part {name!r}; known: {', '.join(parts) or 'none'}")
    return Checkpoint(parts[name].config, {"": parts[name]})


# ---- changes to the decoder


@dataclass(frozen=True)
class Changes:
    """What becomes of the vocabulary and the head.

    vocab_size: pad embedding and head with zeros up to this many rows; 0 keeps them.
    head: "tied" drops a head that equals the embedding, "untied" adds a copy of it; "" keeps.
    """

    vocab_size: int = 0
    head: str = ""

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with them. ValueError if there is no decoder, or it cannot be done."""
        if not (self.vocab_size or self.head):
            return checkpoint
        place = LLM if isinstance(checkpoint.config, apollo.Config) else ""
        part = checkpoint.parts[place]
        if not isinstance(part.config, qwen2.Config):
            raise ValueError("--vocab-size and --head change a decoder; there is none")
        changed = self._decoder(part)
        parts = {**checkpoint.parts, place: changed}
        if place == "":
            return Checkpoint(changed.config, parts)
        config = dataclasses.replace(checkpoint.config, llm=changed.config)
        files = dict(checkpoint.files)
        if files:
            root = companions.parse(files, companions.CONFIG, Path())
            llm = changed.published_config
            root |= dict(vocab_size=llm["vocab_size"], llm_cfg=llm)
            files[companions.CONFIG] = companions.dump(root)
        return Checkpoint(config, parts, files)

    def _decoder(self, part: Part) -> Part:
        c: Any = part.config
        fields = part.published_config
        names = {name: name for name in part.tensors.stored}
        if self.head == "untied" and c.tie_word_embeddings:
            names[decoder.HEAD] = decoder.EMBEDDING
            fields["tie_word_embeddings"] = False
        elif self.head == "tied":
            names.pop(decoder.HEAD, None)
            fields["tie_word_embeddings"] = True
            if not c.tie_word_embeddings:
                _check_equal(part)
        if self.vocab_size and self.vocab_size < c.vocab_size:
            raise ValueError(
                f"--vocab-size {self.vocab_size} cuts the {c.vocab_size} rows there are"
            )
        fields["vocab_size"] = self.vocab_size or c.vocab_size
        rows: dict[str, int] = dict.fromkeys(TABLES, fields["vocab_size"])
        tensors = Padded(Renamed(part.tensors, names), rows)
        files = {**part.files, companions.CONFIG: companions.dump(fields)}
        config = decoder.config({companions.CONFIG: fields}, "the changed decoder")
        changed = published_part(config, files, tensors, "the changed decoder")
        return dataclasses.replace(changed, names={}, stored={}, uses=part.uses)

    def said(self) -> dict[str, Any]:
        """For the report."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


def _check_equal(part: Part) -> None:
    if not same_bits(part.tensors, decoder.HEAD, decoder.EMBEDDING):
        raise ValueError("--head tied: lm_head differs from the embedding, tying would lose it")
