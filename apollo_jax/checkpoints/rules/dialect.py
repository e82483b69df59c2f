# SPDX-License-Identifier: Apache-2.0
"""The same published tensors as other files name, shape and group them.

A model's `Table` ties its parameters to published tensors. A `Dialect` ties those to the tensors
of another layout (big_vision's .npz, an author's .pth), without a model: every tensor of the file
takes part, also those that we have no parameter for. Each link says that one tensor holds others,
one after the other along its first axis, so that any of them can be made from rows of the rest.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from apollo_jax.checkpoints.rules.table import SAME, Shape, Transform


class Link(NamedTuple):
    """Foreign tensors that hold the numbers of published ones; one side is a single tensor.

    transform: `inward` turns a foreign piece into the published one, `outward` turns it back.
    stacked: pieces are indices of a new leading axis, not equal runs of rows.
    """

    foreign: tuple[str, ...]
    published: tuple[str, ...]
    transform: Transform = SAME
    stacked: bool = False


def rename(foreign: str, published: str, transform: Transform = SAME) -> Link:
    """One tensor for one."""
    return Link((foreign,), (published,), transform)


def fused(foreign: str, published: Iterable[str], transform: Transform = SAME) -> Link:
    """The foreign tensor is the published ones end to end, as a fused qkv is."""
    return Link((foreign,), tuple(published), transform)


def divided(foreign: Iterable[str], published: str, transform: Transform = SAME) -> Link:
    """The published tensor is the foreign ones end to end."""
    return Link(tuple(foreign), (published,), transform)


def stacked(foreign: str, published: Iterable[str], transform: Transform = SAME) -> Link:
    """The foreign tensor has a leading axis of layers."""
    names = tuple(published)
    if len(names) == 1:  # one for one, but for the axis
        inward, outward = transform.inward, transform.outward
        return rename(
            foreign, *names, Transform(lambda x: inward(x[0]), lambda y: outward(y)[None])
        )
    return Link((foreign,), names, transform, stacked=True)


@dataclass(frozen=True)
class Dialect:
    """A layout of one model.

    name: what messages and reports call it, like "big_vision".
    links: every published tensor that the layout holds.
    ignored: foreign tensor (or a pattern with *) -> why it is passed over.
    absent: published tensor that the layout lacks -> why; zeros stand in for it.
    prefix: of the foreign names, which some files leave out.
    """

    name: str
    links: tuple[Link, ...]
    ignored: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    prefix: str = ""


def shape_of(shapes: Mapping[str, Shape], name: str, rank: int) -> Shape:
    """The shape of a tensor that tells a model's size; ValueError if it is not there or not so."""
    if name not in shapes:
        raise ValueError(f"{name} is missing, which tells the size of the model")
    if len(shapes[name]) != rank:
        raise ValueError(f"{name} is {tuple(shapes[name])}, expected {rank} dimensions")
    return shapes[name]
