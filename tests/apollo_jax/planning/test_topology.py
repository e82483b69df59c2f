# SPDX-License-Identifier: Apache-2.0
"""Names of topologies."""

import pytest

from apollo_jax.planning.topology import CHIPS, SLICES, parse, peak_flops


def test_names_and_counts():
    assert parse("v5p:4x4x4").chips == 64
    assert parse("v5p-128").shape == (4, 4, 4)  # v5p is rented by cores
    assert parse("v5e-256").hosts == 64
    two = parse("2*v5e:16x16")
    assert (two.slices, two.chips) == (2, 512)
    assert [parse(name).name for name in SLICES] == list(SLICES)


def test_peaks_are_of_one_device_and_nothing_is_guessed():
    assert peak_flops("TPU v5") == CHIPS["v5p"].flops
    assert peak_flops("TPU7x") == CHIPS["tpu7x"].flops / 2
    assert peak_flops("cpu") == peak_flops("TPU v99") == 0.0


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5e-16", "v5p-8", "v6e-16", "tpu7x-64"])
def test_jax_calls_the_chips_so(name):
    topology = parse(name)
    peak = topology.chip.flops / topology.chip.devices
    assert {peak_flops(d.device_kind) for d in topology.devices()} == {peak}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v7x:4x4x4", "is not CHIP:AxB"),
        ("v5e-250", "did you mean v5e-256"),
        ("v5e:4x4x4", "2 sides, as in v5e:4x4"),
        ("v5p:4x4", "3 sides"),
        ("v5e:0x4", "2 sides"),
        ("0*v5e:4x4", "has no slices; one is v5e:4x4, two are 2*v5e:4x4"),
        ("v5e:3x5", "the first two sides are even; nearest that work: v5e:2x4 or v5e:4x6"),
        ("v5p:1x2x3", "nearest that work: v5p:2x2x3"),
        ("x*v5e:4x4", "number of slices first"),
        ("", "known: v5e-16"),
    ],
)
def test_unknown_names(name, said):
    with pytest.raises(ValueError, match=said.replace("*", r"\*")):
        parse(name)
