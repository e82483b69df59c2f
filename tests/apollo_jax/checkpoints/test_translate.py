# SPDX-License-Identifier: Apache-2.0
"""Views of tensors: a slice of a view is that slice of the whole, blocks are it in order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_jax.checkpoints import safetensors, sources
from apollo_jax.checkpoints.rules.dialect import Dialect, divided, fused, rename, stacked
from apollo_jax.checkpoints.rules.table import SAME, TRANSPOSE, Slot, conv
from apollo_jax.checkpoints.sources import Stored, blocks
from apollo_jax.checkpoints.translate import (
    Arrays,
    Joined,
    Padded,
    Renamed,
    from_dialect,
    to_dialect,
    to_ours,
    to_published,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4))


@st.composite
def dialects(draw):
    """A dialect with every kind of link, and published tensors for it."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kinds = {"same": SAME, "transpose": TRANSPOSE}
    links, published = [], {}
    for i in range(draw(st.integers(1, 4))):
        shape, parts = draw(SHAPES), draw(st.integers(2, 3))
        how = kinds[draw(st.sampled_from(sorted(kinds)))]
        names = [f"p{i}.{j}" for j in range(parts)]
        kind = draw(st.sampled_from(["rename", "fused", "divided", "stacked"]))
        if kind == "rename":
            links.append(rename(f"f{i}", names[0], how))
            names = names[:1]
        elif kind == "divided":
            links.append(divided([f"f{i}.{j}" for j in range(parts)], names[0], how))
            names, shape = names[:1], (shape[0] * parts, shape[1])
        else:
            make = fused if kind == "fused" else stacked
            links.append(make(f"f{i}", names, how))
        published |= {name: rng.random(shape).astype(np.float32) for name in names}
    return Dialect("random", tuple(links)), published


@settings(max_examples=80, deadline=None)
@given(dialects(), st.data())
def test_a_dialect_there_and_back_and_any_slice_of_it(drawn, data):
    dialect, published = drawn
    foreign = to_dialect(Arrays(published), dialect)
    stored = Arrays({name: foreign.read(name) for name in foreign.stored})
    back = from_dialect(stored, dialect)
    assert back.stored.keys() == published.keys()
    for name, array in published.items():
        assert back.stored[name].shape == array.shape
        np.testing.assert_array_equal(back.read(name), array)
    for view in (foreign, back):
        name = data.draw(st.sampled_from(sorted(view.stored)))
        whole = view.read(name)
        assert view.stored[name].shape == whole.shape
        index = tuple(
            slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
            for n in whole.shape[: data.draw(st.integers(0, whole.ndim))]
        )
        np.testing.assert_array_equal(view.read(name, index), whole[index])
        assert b"".join(b.tobytes() for b in blocks(view, name)) == whole.tobytes()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_slice_of_a_stacked_parameter_comes_from_the_layers(data):
    rng = np.random.default_rng(0)
    published = {f"layers.{i}.w": rng.random((6, 4)).astype(np.float32) for i in range(3)}
    published |= {"conv": rng.random((5, 3, 2, 2)).astype(np.float32)}
    slots = {f"layers.{i}.w": Slot((6, 4), "w", i, TRANSPOSE) for i in range(3)}
    slots["conv"] = Slot((5, 3, 2, 2), "conv", None, conv(2, 2))
    ours = to_ours(Arrays(published), slots)
    whole = np.stack([a.T for n, a in published.items() if n != "conv"])
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in whole.shape]
    index = tuple(slice(*b) for b in bounds)
    np.testing.assert_array_equal(ours.read("w", index), whole[index])
    again = to_published(ours, slots)
    for name, array in published.items():
        np.testing.assert_array_equal(again.read(name), array)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_files_give_any_slice(tmp_path, monkeypatch, block):
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    rng = np.random.default_rng(0)
    arrays = {"a": rng.random((7, 5, 3)), "b": rng.random(()), "c": np.zeros((0, 4), np.int64)}
    np.savez(tmp_path / "a.npz", **{f"params/img/{n}": a for n, a in arrays.items()})
    safetensors.write(tmp_path, Renamed(Arrays(arrays), {n: n for n in arrays}, _single(arrays)))
    readers = [
        sources.open_npz(tmp_path / "a.npz", "img"),
        safetensors.TensorFolder(tmp_path),
    ]
    for reader in readers:
        assert reader.stored.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(reader.read(name), array)
            assert b"".join(b.tobytes() for b in blocks(reader, name)) == array.tobytes()
        index = (slice(2, 6), slice(None), slice(1, 3))
        np.testing.assert_array_equal(reader.read("a", index), arrays["a"][index])


def _single(arrays):
    return {n: Stored(safetensors.SINGLE, a.shape, a.dtype.name) for n, a in arrays.items()}


def test_padding_adds_zeros_and_joining_lets_the_last_count():
    source = Arrays({"e": np.ones((3, 2), np.float32), "x": np.zeros(2)})
    padded = Padded(source, {"e": 5})
    np.testing.assert_array_equal(padded.read("e").sum(1), [2, 2, 2, 0, 0])
    np.testing.assert_array_equal(padded.read("e", (slice(2, 5), slice(1, 2)))[:, 0], [1, 0, 0])
    joined = Joined(source, Arrays({"x": np.ones(2)}))
    np.testing.assert_array_equal(joined.read("x"), [1, 1])
