# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk as published tensors and as our parameters, described but not yet read.

A `Part` is one tower, connector or decoder; a `Checkpoint` is one part alone or a whole Apollo.
Everything that loads, converts or proves begins with one (see `opening`).
"""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from apollo_jax.checkpoints import companions, safetensors
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.rules.table import Slot, parameters, present, slots, spellings
from apollo_jax.checkpoints.sources import Source, Stored, row_blocks
from apollo_jax.checkpoints.translate import Arrays, Joined, Renamed, Translated, is_float
from apollo_jax.checkpoints.translate import to_ours as seen_as_ours
from apollo_jax.checkpoints.translate import to_published as seen_as_published
from apollo_jax.models import apollo
from data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True)
class Use:
    """What becomes of one tensor of a file: a parameter, a published tensor, or nothing (why)."""

    tensor: str
    goes_to: str = ""
    ignored: str = ""


@dataclass(frozen=True)
class Part:
    """One tower, connector or decoder; names are canonical unless said otherwise."""

    config: layout.PartConfig
    files: companions.Files  # beside the weights
    slots: Mapping[str, Slot]  # every published tensor
    tensors: Source  # all of them
    copies: Mapping[str, str] = field(default_factory=dict)  # stored copy -> what it equals
    names: Mapping[str, str] = field(default_factory=dict)  # -> as the folder spells it
    stored: Mapping[str, Stored] = field(default_factory=dict)  # in the folder, by its spelling
    uses: tuple[Use, ...] = ()
    made_up: tuple[str, ...] = ()  # tensors that no source holds: zeros

    @cached_property
    def ours(self) -> Translated:
        """Our parameters by dotted path."""
        return seen_as_ours(self.tensors, self.slots)

    @property
    def published_config(self) -> dict[str, Any]:
        """Its config.json."""
        return companions.parse(self.files, companions.CONFIG, Path())

    @property
    def unused(self) -> Renamed:
        """The published tensors that no parameter holds."""
        names = {name: name for name, slot in self.slots.items() if not slot.path}
        return Renamed(self.tensors, names)


@dataclass(frozen=True)
class Checkpoint:
    """A whole Apollo, or one part under the name ""."""

    config: apollo.Config | layout.PartConfig
    parts: Mapping[str, Part]  # by where the model has them: "vision_tower/towers/0", "llm"
    files: companions.Files = field(default_factory=dict)  # of an Apollo, outside its parts

    @cached_property
    def ours(self) -> Joined:
        """Our parameters as a training run names them: "llm/layers/q/kernel"."""
        return Joined(
            *(
                Renamed(part.ours, {weight_name(at, path): path for path in part.ours.stored})
                for at, part in self.parts.items()
            )
        )


def weight_name(part: str, path: str) -> str:
    """The name of a parameter in a run: of part "llm" and "layers.q.kernel" both."""
    return "/".join([*([part] if part else []), *path.split(".")])


def tower_place(index: int) -> str:
    """Where the model has its tower `index`."""
    return f"vision_tower/towers/{index}"


def apollo_places(config: apollo.Config) -> dict[str, layout.PartConfig]:
    """Where an Apollo's model has its parts -> their configs."""
    towers = {tower_place(i): t for i, t in enumerate(config.towers.values())}
    return {**towers, "connector": config.connector, "llm": config.llm}


def published_part(
    config: layout.PartConfig,
    files: companions.Files,
    tensors: Source,
    where: str,
    *,
    compare: bool = True,
) -> Part:
    """A part whose tensors have their published names, or known other spellings of them.

    compare: read stored copies to see that they are copies.
    """
    rules = layout.RULES_BY_CONFIG[type(config)]
    table = rules.table(config, companions.parse(files, companions.CONFIG, Path(where)))
    table = present(table, tensors.stored)
    expected = slots(table, shapes(config))
    found = {name: stored.shape for name, stored in tensors.stored.items()}
    names = spellings(table, expected, found, where)
    for copy, of in table.copies.items():
        if compare and copy in names and not same_bits(tensors, names[copy], names[of]):
            raise ValueError(
                f"{where}: {copy} differs from {of}, to which the config ties it; "
                "set tie_word_embeddings to false to keep both"
            )
    copies = {copy: of for copy, of in table.copies.items() if copy in names}
    return Part(
        config,
        files,
        expected,
        Renamed(tensors, names),
        copies,
        names,
        {spelling: tensors.stored[spelling] for spelling in names.values()},
        tuple(uses(expected, names, copies)),
    )


def uses(
    expected: Mapping[str, Slot], names: Mapping[str, str], copies: Mapping[str, str]
) -> Iterator[Use]:
    """What becomes of every tensor of a published file."""
    for name, spelling in names.items():
        if name in copies:
            yield Use(spelling, ignored=f"a copy of {copies[name]}, compared bit for bit")
        elif expected[name].path:
            layer = "" if expected[name].layer is None else f"[{expected[name].layer}]"
            yield Use(spelling, goes_to=expected[name].path + layer)
        else:
            yield Use(spelling, ignored=expected[name].reason)


def shapes(config: layout.PartConfig) -> dict[str, Any]:
    """Our parameters of a part by dotted path, as shapes."""
    module = layout.RULES_BY_CONFIG[type(config)].MODEL
    # nnx.eval_shape would look for the axes' names in the mesh of a run
    split = jax.eval_shape(lambda: nnx.split(module(config, rngs=nnx.Rngs(0), **_FLOAT32)))
    return parameters(nnx.merge(*split))


_FLOAT32 = dict(dtype=np.float32, param_dtype=np.float32)


def part_of_weights(
    config: layout.PartConfig,
    files: companions.Files,
    weights: Source,
    unused: Source,
    names: Mapping[str, str],
) -> Part:
    """A part from our parameters by dotted path; published tensors without one are zeros, except
    those in `unused`.

    names: which published tensors to hold, and their spelling; default all, but of the optional
      groups only those in `unused`.
    """
    rules = layout.RULES_BY_CONFIG[type(config)]
    table = rules.table(config, companions.parse(files, companions.CONFIG, Path()))
    expected = slots(present(table, names or unused.stored), weights.stored)
    dtype = next(iter(weights.stored.values())).dtype
    zeros = {n: Stored("", s.shape, dtype) for n, s in expected.items() if not s.path}
    copies = {c: of for c, of in table.copies.items() if not names or c in names}
    tensors = Joined(Arrays({}, zeros), unused, seen_as_published(weights, expected))
    tensors = Renamed(tensors, {n: n for n in expected} | copies)
    return Part(
        config,
        files,
        expected,
        tensors,
        copies,
        names,
        uses=tuple(weight_uses(expected, unused.stored)),
        made_up=tuple(name for name in zeros if name not in unused.stored),
    )


def weight_uses(expected: Mapping[str, Slot], unused: Collection[str]) -> Iterator[Use]:
    """What becomes of our parameters, and of the tensors kept for the way back."""
    goes: dict[str, list[str]] = {}
    for name, slot in expected.items():
        if slot.path:
            goes.setdefault(slot.path, []).append(name)
    for path, [first, *more] in goes.items():
        yield Use(path, goes_to=f"{first} ... {more[-1]}" if more else first)
    for name in unused:
        yield Use(name, ignored=expected[name].reason)


def same_bits(source: Source, a: str, b: str) -> bool:
    """Whether two tensors hold the same bytes."""
    if source.stored[a].shape != source.stored[b].shape:
        return False
    pairs = zip(row_blocks(source, a), row_blocks(source, b), strict=True)
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in pairs)


def below(weights: Source, place: str) -> Renamed:
    """A part's parameters by dotted path, out of those of a run."""
    prefix = f"{place}/" if place else ""
    own = [name for name in weights.stored if name.startswith(prefix)]
    return Renamed(weights, {name.removeprefix(prefix).replace("/", "."): name for name in own})


def fresh_files(
    config: layout.PartConfig, weights: Source, tokenizer: Tokenizer | None = None
) -> companions.Files:
    """The published files of a part that came from no folder; a decoder's with its tokenizer."""
    content = layout.RULES_BY_CONFIG[type(config)].published(config)
    extra: dict[str, dict[str, Any]] = {}
    beside: companions.Files = {}
    if tokenizer is not None:
        pad, eos = tokenizer.pad_id, tokenizer.eos_id
        ids = dict(bos_token_id=pad, eos_token_id=eos, pad_token_id=pad)
        extra = {companions.CONFIG: ids, "generation_config.json": ids}
        beside = tokenizer_files(tokenizer)
    dtype = next(iter(weights.stored.values())).dtype
    extra[companions.CONFIG] = extra.get(companions.CONFIG, {}) | dict(torch_dtype=dtype)
    return beside | {n: companions.dump(c | extra.get(n, {})) for n, c in content.items()}


def tokenizer_files(tokenizer: Tokenizer) -> companions.Files:
    """What a tokenizer writes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return companions.below(Path(folder), skip=())


def write_part(
    folder: Path,
    part: Part,
    *,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
) -> None:
    """Write the published folder of one part, tensor by tensor."""
    names = dict(part.names) or {name: name for name in part.tensors.stored}
    laid = {}
    for name, spelling in names.items():
        was = part.stored.get(spelling) or replace(
            part.tensors.stored[name], file=safetensors.SINGLE
        )
        to = dtype if dtype and is_float(was.dtype) else was.dtype
        laid[spelling] = replace(was, shape=part.tensors.stored[name].shape, dtype=to)
    files = dict(part.files)
    if dtype or max_shard_size or not part.stored:
        laid = safetensors.shard(laid, max_shard_size or safetensors.MAX_SHARD_SIZE)
        files.pop(safetensors.INDEX, None)
        if len({stored.file for stored in laid.values()}) > 1:
            files[safetensors.INDEX] = safetensors.index(laid)
    companions.write(folder, files if dtype is None else companions.state_dtype(files, dtype))
    spelled = {spelling: name for name, spelling in names.items()}
    safetensors.write(folder, Renamed(part.tensors, spelled, laid))
