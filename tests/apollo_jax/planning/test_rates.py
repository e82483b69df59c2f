# SPDX-License-Identifier: Apache-2.0
"""Which links a group of devices has."""

import itertools

import pytest

from apollo_jax.planning.rates import Rates

# A torus of 4 x 16 that closes only along its second dimension; places in row-major order.
TORUS = Rates(
    flops=1,
    hbm=1,
    ici=4.0,  # a link sends 1
    dcn=0.5,
    places=tuple(itertools.product(range(4), range(16))),
    shape=(4, 16),
    wraps=16,
)
ROW, COLUMN, HALF_ROW = range(16), range(0, 64, 16), range(8)


@pytest.mark.parametrize(
    ("kind", "group", "seconds"),
    [
        ("all-gather", ROW, 12 / 2),  # both ways around
        ("all-gather", COLUMN, 12),  # a line
        ("all-gather", HALF_ROW, 12),
        ("all-reduce", range(64), 12 / 3),
        ("collective-permute", ROW, 12),  # to one neighbour
        ("all-to-all", ROW, 12 * (16 / 4) / 2),  # passing 4 chips on average
        ("all-reduce", (0,), 12 / 4),  # two devices of one chip would be here
        ("all-reduce", (), 12 / 0.5),  # between slices
    ],
)
def test_links(kind, group, seconds):
    assert TORUS.exchange_seconds(kind, 12, group) == seconds


def test_without_places_a_group_has_all_links():
    assert Rates(1, 1, 4.0, 1).exchange_seconds("all-gather", 12, range(4)) == 3
