# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses <-> locked ConfigDict (files, command line) <-> plain values (JSON).

Of any dataclasses; those of a run are in config.py.
"""

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict, config_dict

T = TypeVar("T")


def to_config(value: Any) -> ConfigDict:
    """A locked ConfigDict with the fields of a dataclass; None becomes a typed placeholder."""
    return _plain(value).lock()


def _plain(value: Any, hint: Any = None) -> Any:
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value))
        items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _plain(items, hints)
    if isinstance(value, dict):
        hints = hint if isinstance(hint, dict) else {}
        items = {k: _plain(v, hints.get(k)) for k, v in value.items()}
        return ConfigDict(items, sort_keys=False)  # the order of the towers has meaning
    if value is None:
        return config_dict.placeholder(next(t for t in get_args(hint) if t is not type(None)))
    return value


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Build the dataclass `cls` from plain values (JSON, a ConfigDict's, or command-line text).

    Raises ValueError naming the field, its type and the known fields.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    unknown = [k for k in values if k not in fields]
    if unknown:
        raise ValueError(f"{path}: {_unknown_field(unknown[0], list(fields))}")
    required = (f for f in fields.values() if f.default is f.default_factory)  # both MISSING
    missing = [f.name for f in required if f.name not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return cls(**{k: _read(hints[k], v, f"{path}.{k}") for k, v in values.items()})


def _read(hint: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, _mapping(value, path), path)  # pyright: ignore[reportArgumentType]
    if origin in (Union, types.UnionType):
        return _read_union(args, value, path)
    if origin is dict:
        return {k: _read(args[1], v, f"{path}.{k}") for k, v in _mapping(value, path).items()}
    if origin is tuple:
        return _read_tuple(args, value, path)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{path} is {value!r}; known: {', '.join(map(repr, args))}")
        return value
    return _read_scalar(hint, value, path)


def _read_union(options: tuple, value: Any, path: str) -> Any:
    """`T | None`, or dataclasses told apart by their literal `kind` field."""
    if type(None) in options:
        (inner,) = (o for o in options if o is not type(None))
        return None if value in (None, "none", "None") else _read(inner, value, path)
    kinds = {get_args(get_type_hints(o)["kind"])[0]: o for o in options}
    kind = _mapping(value, path).get("kind")
    if kind not in kinds:
        raise ValueError(f"{path}.kind is {kind!r}; known: {', '.join(kinds)}")
    return from_dict(kinds[kind], value, path)


def _read_tuple(args: tuple, value: Any, path: str) -> tuple:
    if isinstance(value, str):
        inner = ":" if args[1:] != (...,) and ":" in value else ","  # of a list of pairs: 0:1,9:2
        items = [s.strip() for s in value.split(inner) if s.strip()]
    else:
        items = value
    if not isinstance(items, list | tuple):
        raise ValueError(f"{path} is {value!r}, must be a list (text: a,b,c)")
    types_ = args[:1] * len(items) if args[1:] == (...,) else args
    if len(types_) != len(items):
        form = " (text: 0:1, in a list 0:1,1000:2)" * isinstance(value, str)
        raise ValueError(f"{path} has {len(items)} values, takes {len(types_)}: {value!r}{form}")
    pairs = zip(types_, items, strict=True)
    return tuple(_read(t, v, f"{path}[{i}]") for i, (t, v) in enumerate(pairs))


def _read_scalar(hint: type, value: Any, path: str) -> Any:
    if type(value) is hint or (hint is float and type(value) is int):
        return hint(value)
    if isinstance(value, str):
        words = {"true": True, "false": False}
        try:
            return words[value.lower()] if hint is bool else hint(value)
        except (KeyError, ValueError):
            pass
    raise ValueError(f"{path} is {value!r}, must be of type {hint.__name__}")


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} is {value!r}, must be a group of fields")
    return value


# ---- command line


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`["--config.a.b=c", "--config.d", "e"]` to `{"a.b": "c", "d": "e"}`."""
    found, rest = {}, list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--config."):
            raise ValueError(f"unknown argument {flag!r}; config fields are --config.a.b=c")
        if not equals and not rest:
            raise ValueError(f"{flag} has no value; write {flag}=VALUE")
        found[flag.removeprefix("--config.")] = value if equals else rest.pop(0)
    return found


def override(config: ConfigDict, name: str, text: str) -> None:
    """Set the existing field `a.b` of `config` to `text`, which `from_dict` reads by its type."""
    *parents, last = name.split(".")
    node: Any = config
    for key in parents:
        node = node[key] if isinstance(node, ConfigDict) and key in node else None
    if not isinstance(node, ConfigDict) or last not in node:
        known = [f"config.{leaf}" for leaf in leaves(config.to_dict())]
        raise ValueError(_unknown_field(f"config.{name}", known))
    group = node[last]
    if isinstance(group, ConfigDict):
        raise ValueError(f"config.{name} is a group with the fields {', '.join(list(group))}")
    with node.ignore_type():
        node[last] = text


def _unknown_field(name: str, known: Sequence[str]) -> str:
    last = {k: k.rpartition(".")[2] for k in known}
    near = difflib.get_close_matches(name.rpartition(".")[2], set(last.values()), n=1)
    guess = difflib.get_close_matches(name, [k for k in known if last[k] in near], cutoff=0.0)
    hint = f"did you mean {' or '.join(guess)}?" if guess else f"known: {', '.join(known)}"
    return f"{name} is not a field; {hint}"


# ---- all leaves of a tree


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`a.b` -> value of all that nested mappings hold; an empty one is a value."""
    found = {}
    for key, value in values.items():
        inner = leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        found |= inner or {prefix + key: value}
    return found


def differences(old: Any, new: Any) -> list[str]:
    """`a.b: old -> new` for every leaf in which two dataclasses differ; order counts (towers)."""
    before, after = (leaves(dataclasses.asdict(x)) for x in (old, new))
    names = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    moved = not names and list(before) != list(after)
    order = [f"order: {', '.join(before)} -> {', '.join(after)}"] if moved else []
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in names] + order
