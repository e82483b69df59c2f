# SPDX-License-Identifier: Apache-2.0
"""Published config.json fields to the values our configs take."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any


def defaults(config_class: type, *skip: str) -> dict[str, Any]:
    """The defaults of a config dataclass."""
    return {f.name: f.default for f in dataclasses.fields(config_class) if f.name not in skip}


def take(
    published: dict[str, Any], known: dict[str, Any], fixed: dict[str, Any], where: str
) -> dict[str, Any]:
    """The `known` fields, with their defaults where absent.

    Args:
      known: field -> what the published config class assumes when it is absent.
      fixed: field -> the one value that the model computes; another value is refused.
    Raises ValueError naming `where` and every field that is misspelt, mistyped or unsupported.
    """
    problems = []
    for name, value in fixed.items():
        if published.get(name, value) != value:
            problems.append(f"{name} is {published[name]!r}, only {value!r} is supported")
    unknown = [k for k in published if k not in known and k not in fixed]
    for name, default in known.items():
        if name not in published:
            # A leftover of another config class is no misspelling: only near twins are.
            for near in difflib.get_close_matches(name, unknown, n=1, cutoff=0.9):
                problems.append(f"{near} is unknown (did you mean {name}?)")
        elif not _fits(published[name], default):
            kind = type(default).__name__
            problems.append(f"{name} is {published[name]!r}, expected a {kind} like {default!r}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
    return {name: _like(published.get(name, default), default) for name, default in known.items()}


def check_fields(said: Iterable[str], known: Iterable[str], where: str) -> None:
    """ValueError naming the fields that a user says and nobody knows."""
    names = sorted(known)
    for name in said:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            guess = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"{where}: {name} is no field of the config; {guess}")


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, tuple):
        return isinstance(value, list) and len(value) == len(default)
    return isinstance(value, int | float if isinstance(default, float) else type(default))


def _like(value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        return tuple(value)
    return float(value) if isinstance(default, float) else value
