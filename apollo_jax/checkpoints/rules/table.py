# SPDX-License-Identifier: Apache-2.0
"""Two-way tables between published tensors and our parameters.

One `Rule` serves both directions: `name` is the published tensor, `path` the parameter (dotted),
`{i}` in a name a layer of a stacked parameter. A table also knows the published tensors that no
parameter takes, so that a folder can be checked to the last key and written back complete.
"""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

Shape = tuple[int, ...]
UNBUILT = "features are taken below this layer"
MAX_LISTED = 30  # names of one kind in an error message


@dataclass(frozen=True)
class Transform:
    """`inward` turns a tensor of a file into our layout, `outward` turns it back.

    swap: an index of either side -> the same elements on the other, if that is an index too.
    """

    inward: Callable[[Any], Any]
    outward: Callable[[Any], Any]
    swap: Callable[[tuple[slice, ...]], tuple[slice, ...]] | None = None


def _same(x: Any) -> Any:
    return x


def _transpose(x: Any) -> Any:
    return x.T


SAME = Transform(_same, _same, lambda index: index)
# [out, in] <-> [in, out]
TRANSPOSE = Transform(_transpose, _transpose, lambda index: index[::-1])


def squeeze(axes: int) -> Transform:
    """Drop leading axes of size one."""
    return Transform(
        lambda x: x.reshape(x.shape[axes:]), lambda x: x.reshape((1,) * axes + x.shape)
    )


def conv(*kernel: int) -> Transform:
    """[out, in, *kernel] <-> [(*kernel, in), out]: a convolution whose stride is its kernel."""
    n = len(kernel)
    return Transform(
        lambda x: x.transpose(*range(2, n + 2), 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(*kernel, -1, x.shape[-1]).transpose(n + 1, n, *range(n)),
    )


class Rule(NamedTuple):
    """One published name, one parameter; `alias` is a second spelling found in the wild."""

    name: str
    path: str
    transform: Transform = SAME
    alias: str = ""


class Unused(NamedTuple):
    """Published tensors without a parameter, and why; an optional group may be absent as a whole.

    A fresh model is published without its optional groups.
    """

    reason: str
    shapes: dict[str, Shape]
    optional: bool = False


@dataclass(frozen=True)
class Table:
    """A model's rules; `depth` published layers `{i}`, of which ours may be the first few."""

    rules: tuple[Rule, ...]
    depth: int = 0
    unused: tuple[Unused, ...] = ()
    copies: dict[str, str] = field(default_factory=dict)  # optional tensor -> the one it equals
    prefix: str = ""  # of the names, which some files leave out


class Slot(NamedTuple):
    """Where a published tensor lives: a parameter, a layer of one, or nowhere for a reason."""

    shape: Shape
    path: str = ""
    layer: int | None = None
    transform: Transform = SAME
    alias: str = ""
    reason: str = ""


def weight(name: str, path: str, *, bias: bool = False, how: Transform = TRANSPOSE) -> list[Rule]:
    """A linear or convolution: weight <-> kernel, bias <-> bias."""
    rules = [Rule(f"{name}.weight", f"{path}.kernel", how)]
    return [*rules, Rule(f"{name}.bias", f"{path}.bias")] if bias else rules


def norm(name: str, path: str, *, bias: bool = False) -> list[Rule]:
    """A norm: weight <-> scale, bias <-> bias."""
    rules = [Rule(f"{name}.weight", f"{path}.scale")]
    return [*rules, Rule(f"{name}.bias", f"{path}.bias")] if bias else rules


def parameters(module: nnx.Module) -> dict[str, Any]:
    """Dotted path -> array, or its shape if the module is abstract."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def present(table: Table, found: Collection[str]) -> Table:
    """The table without the optional groups of which `found` has no tensor."""

    def there(group: Unused) -> bool:
        names = [*group.shapes, *(name.removeprefix(table.prefix) for name in group.shapes)]
        return any(name in found for name in names)

    unused = tuple(group for group in table.unused if not group.optional or there(group))
    return replace(table, unused=unused)


def slots(table: Table, leaves: Mapping[str, Any]) -> dict[str, Slot]:
    """Every published tensor of a model whose parameters are `leaves` (path -> shaped value)."""
    out: dict[str, Slot] = {}
    for name, path, transform, alias in table.rules:
        stacked, shape = "{i}" in name, leaves[path].shape
        one = jax.ShapeDtypeStruct(shape[1:] if stacked else shape, np.float32)
        published = jax.eval_shape(transform.outward, one).shape
        for i in range(table.depth) if stacked else (None,):
            used = i is None or i < shape[0]
            key = name.format(i=i)
            assert key not in out, f"two rules for {key}"
            reason = "" if used else UNBUILT
            out[key] = Slot(
                published, path if used else "", i, transform, alias.format(i=i), reason
            )
    for group in table.unused:
        out |= {name: Slot(shape, reason=group.reason) for name, shape in group.shapes.items()}
    for name, slot in out.items():
        if table.prefix and not slot.alias:
            out[name] = slot._replace(alias=name.removeprefix(table.prefix))
    missing = leaves.keys() - {slot.path for slot in out.values()}
    assert not missing, f"no rule for {sorted(missing)}"
    return out


def spellings(
    table: Table, expected: Mapping[str, Slot], found: Mapping[str, Shape], where: str
) -> dict[str, str]:
    """Canonical name -> the name found, if `found` is exactly what is expected.

    Raises one ValueError that lists unknown, missing and mis-shaped tensors by name.
    """
    names = {
        name: slot.alias if name not in found and slot.alias in found else name
        for name, slot in expected.items()
    }
    shapes = {stored: expected[name].shape for name, stored in names.items()}
    shapes |= {copy: shapes[of] for copy, of in table.copies.items() if copy in found}
    misfit(
        where,
        unknown=[name for name in found if name not in shapes],
        missing=[name for name in shapes if name not in found],
        misshaped=[
            f"{name} {tuple(found[name])}, the config gives {tuple(shape)}"
            for name, shape in shapes.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    )
    return names | {c: c for c in table.copies if c in found}


def misfit(
    where: str, *, unknown: list[str], missing: list[str], misshaped: list[str] | None = None
) -> None:
    """Raise one ValueError that lists all of them, if there are any."""
    unknown = [name + _near(name, missing) for name in unknown]
    kinds = {"unknown": unknown, "missing": missing, "mis-shaped": misshaped or []}
    problems = [f"\n  {kind} ({len(v)}):{_listed(v)}" for kind, v in kinds.items() if v]
    if problems:
        raise ValueError(f"{where}: the tensors do not fit the config{''.join(problems)}")


def _near(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    return f" (did you mean {near[0]}?)" if near else ""


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_LISTED
    shown = [*names[:MAX_LISTED], f"... and {more} more"] if more > 0 else names
    return "".join(f"\n    {name}" for name in shown)
