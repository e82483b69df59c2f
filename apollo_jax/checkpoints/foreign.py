# SPDX-License-Identifier: Apache-2.0
"""Tensors under other than their published names: authors' files, big_vision's, LoRA, pickles.

Which layout a file has, its tensors tell; a config.json beside it says what the model is, and
without one the tensors tell that too.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from apollo_jax.checkpoints import adapters, companions, safetensors
from apollo_jax.checkpoints.checkpoint import Part, Use, published_part, shapes
from apollo_jax.checkpoints.pickles import open_torch
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.rules import lora
from apollo_jax.checkpoints.rules.dialect import Dialect
from apollo_jax.checkpoints.rules.fields import check_fields
from apollo_jax.checkpoints.rules.table import misfit, slots
from apollo_jax.checkpoints.sources import Source, Stored, open_npz
from apollo_jax.checkpoints.translate import Arrays, Joined, Renamed, from_dialect, to_dialect

PICKLES = (".bin", ".pt", ".pth", ".tar")
PICKLED_WEIGHTS = ("pytorch_model.bin", "model.pth.tar")


def described_part(
    config: layout.PartConfig,
    files: companions.Files,
    tensors: Source,
    where: Path,
    *,
    compare: bool = True,
) -> Part:
    """The part that a config.json describes, whose tensors have their published names or others."""
    if adapters.has_updates(tensors) or _in_dialect(config, files, tensors, where):
        return translated_part(config, files, tensors, {}, where)
    return published_part(config, files, tensors, str(where), compare=compare)


def _in_dialect(
    config: layout.PartConfig, files: companions.Files, tensors: Source, where: Path
) -> bool:
    """Whether a dialect explains more names than the published ones and their other spellings."""
    rules = layout.RULES_BY_CONFIG[type(config)]
    said = companions.parse(files, companions.CONFIG, where)
    dialects = getattr(rules, "dialects", lambda *_: ())(config, said)
    dialect, names = closest(dialects, tensors.stored)
    if dialect is None:
        return False
    known = slots(rules.table(config, said), shapes(config))
    published = {*known, *(slot.alias for slot in known.values())}
    found = tensors.stored.keys()
    return len(found & {*names.values()}) > len(found & published)


def foreign_part(path: Path, key: str, said: Mapping[str, Any]) -> Part:
    """A file, or a folder with a single one, whose model and layout its tensors tell."""
    path, _, subtree = _split(path)
    source, passed = open_file(_only_file(path), key or subtree)
    found = {name: stored.shape for name, stored in source.stored.items()}
    for rules in dict.fromkeys(layout.PARTS.values()):
        recognise = getattr(rules, "recognise", None)
        try:
            published = recognise(found, dict(said)) if recognise else None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if published is not None:
            files = {name: companions.dump(content) for name, content in published.items()}
            config = layout.checked(rules.config(published, str(path)), str(path))
            check_fields(said, _fields(rules, config), "--config")
            return translated_part(config, files, source, passed, path)
    some = ", ".join(sorted(found)[:5])
    raise ValueError(
        f"{path}: its tensors ({some}, ...) are of no known layout; a folder with the published "
        "config.json beside the weights says what they are"
    )


def _fields(rules: Any, config: Any) -> set[str]:
    """What may be said of a part in its published JSON files."""
    files = rules.published(config).values()
    inner = [f for content in files for f in content.values() if isinstance(f, dict)]
    return {*rules.KNOWN, *rules.FIXED}.union(*files, *inner)


def translated_part(
    config: layout.PartConfig,
    files: companions.Files,
    source: Source,
    passed: Mapping[str, str],
    where: Path,
) -> Part:
    """The part in a file whose tensors may have other names than the published ones."""
    rules = layout.RULES_BY_CONFIG[type(config)]
    published_config = companions.parse(files, companions.CONFIG, where)
    if adapters.has_updates(source):
        source = adapters.Merged(source, published_config)
        published_config = lora.without(published_config)
        files = {**files, companions.CONFIG: companions.dump(published_config)}
    dialects = getattr(rules, "dialects", lambda *_: ())(config, published_config)
    ignored = [Use(name, ignored=reason) for name, reason in passed.items()]
    dialect, names = closest(dialects, source.stored)
    if dialect is None:
        part = published_part(config, files, source, str(where))
        stored = {n: replace(s, file=safetensors.SINGLE) for n, s in part.stored.items()}
        return replace(part, stored=stored, uses=(*part.uses, *ignored))
    expected = slots(rules.table(config, published_config), shapes(config))
    zeros = {name: Stored("", slot.shape, "float32") for name, slot in expected.items()}
    wanted = to_dialect(Arrays({}, zeros), dialect).stored
    _check(f"{where} ({dialect.name})", dialect, names, wanted, source.stored, ignored)
    tensors: Source = from_dialect(Renamed(source, names), dialect)
    if dialect.absent:
        tensors = Joined(Arrays({}, {name: zeros[name] for name in dialect.absent}), tensors)
    part = published_part(config, files, tensors, str(where))
    goes = {name: link.published for link in dialect.links for name in link.foreign}
    uses = [Use(names[name], goes_to=", ".join(to)) for name, to in goes.items()]
    rest: Any = dict(uses=(*uses, *ignored), made_up=tuple(dialect.absent))
    return replace(part, names={}, stored={}, **rest)


def closest(
    dialects: Iterable[Dialect], found: Mapping[str, Any]
) -> tuple[Dialect | None, dict[str, str]]:
    """The dialect that explains most of the names found, and {its name: the name found}.

    None if fewer than half of a dialect's tensors are there: the names are the published ones.
    """
    best, best_names, share = None, {}, 0.5
    for dialect in dialects:
        wanted = {name for link in dialect.links for name in link.foreign}
        names = {
            name: short if short in found and name not in found else name
            for name in wanted
            for short in [name.removeprefix(dialect.prefix)]
        }
        there = sum(name in found for name in names.values()) / max(1, len(wanted))
        if there > share:
            best, best_names, share = dialect, names, there
    return best, best_names


def _check(
    where: str,
    dialect: Dialect,
    names: Mapping[str, str],
    wanted: Mapping[str, Stored],
    found: Mapping[str, Stored],
    ignored: list[Use],
) -> None:
    """Every wanted tensor is there in its shape, and nothing else but what the dialect ignores."""
    rest = [name for name in found if name not in set(names.values())]
    for name in rest:
        for pattern, reason in dialect.ignored.items():
            if fnmatch.fnmatchcase(name, pattern):
                ignored.append(Use(name, ignored=reason))
                break
    passed = {use.tensor for use in ignored}
    misfit(
        where,
        unknown=[name for name in rest if name not in passed],
        missing=[name for name in names.values() if name not in found],
        misshaped=[
            f"{names[name]} {found[names[name]].shape}, the config gives {tensor.shape}"
            for name, tensor in wanted.items()
            if names[name] in found and found[names[name]].shape != tensor.shape
        ],
    )


def open_pickled(
    folder: Path, config: layout.PartConfig, files: companions.Files, key: str
) -> Part:
    """A folder with a published config.json and pickled weights."""
    for name in PICKLED_WEIGHTS:
        if (folder / name).is_file():
            source, passed = open_torch(folder / name, key)
            return translated_part(config, files, source, passed, folder)
    here = ", ".join(sorted(p.name for p in folder.iterdir()))
    known = ", ".join((safetensors.SINGLE, safetensors.INDEX, *PICKLED_WEIGHTS))
    raise FileNotFoundError(f"{folder} holds none of {known} (it holds {here})")


def open_file(path: Path, key: str = "") -> tuple[Source, dict[str, str]]:
    """The tensors of one file, and what else it holds with the reason it is passed over."""
    if path.suffix == ".npz":
        return open_npz(path, key), {}
    if path.suffix == ".safetensors":
        check_no_key(path, key)
        return safetensors.open_file(path), {}
    if path.suffix in PICKLES:
        return open_torch(path, key)
    raise ValueError(f"{path}: .npz, .safetensors, {', '.join(PICKLES)} and folders are read")


def _split(path: Path) -> tuple[Path, str, str]:
    """big_vision's `file.npz:subtree`."""
    name, colon, subtree = str(path).partition(".npz:")
    return (Path(f"{name}.npz"), colon, subtree) if colon else (path, "", "")


def _only_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    files = [p for p in sorted(path.iterdir()) if p.suffix in (".npz", ".safetensors", *PICKLES)]
    if len(files) != 1:
        here = ", ".join(p.name for p in sorted(path.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{path} has no {companions.CONFIG} and not one file of weights (it holds {here})"
        )
    return files[0]


def check_no_key(path: Path, key: str) -> None:
    if key:
        raise ValueError(f"--key {key}: {path} is no pickle and no .npz with several parts")
