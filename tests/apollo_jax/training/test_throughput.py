# SPDX-License-Identifier: Apache-2.0
"""Rates are of the time that steps had; what is not known is not said."""

import time

import jax
import pytest

from apollo_jax.planning.flops import model_flops
from apollo_jax.training import throughput
from apollo_jax.training.goodput import Goodput
from apollo_jax.training.ramp import Ramp
from apollo_jax.training.throughput import Throughput, memory, peak_seconds
from data_pipeline.loader import LoadStats

STATS = LoadStats(
    samples=2, tokens=100, clips=3, frames=12, bad=(), fill_tokens=0.5, fill_clips=0.25
)


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds): time goes on by so much; else it stands still."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_rates_are_of_the_steps_alone(clock):
    """Two steps of 2 s, half a second of it waiting, beside an evaluation of a minute."""
    goodput = Goodput()
    goodput.turn("step")
    rates = Throughput(goodput, 4, parts=3, ramp=Ramp(((0, 1), (5, 3))), needs=0.25)
    for _ in range(2):
        rates.add(STATS, waited=0.5)
        clock(2.0)
    with goodput.during("evaluation"):
        clock(60.0)
    found = rates.values(6)
    assert found["seconds_per_step"] == 2.0
    assert found["tokens_per_second"] == 3 * 100 / 2.0
    assert found["frames_per_second"] == 3 * 12 / 2.0
    assert found["samples_per_second"] == 3 * 2 / 2.0
    assert found["data_wait"] == 0.25
    assert found["mfu"] == 0.25 * (1 + 3) / 4.0, "microbatches of updates 5 and 6"
    assert (found["fill_tokens"], found["fill_clips"]) == (0.5, 0.25)
    rates.restart(6)
    rates.add(STATS, waited=0.0)
    clock(4.0)
    assert rates.values(7)["tokens_per_second"] == 3 * 100 / 4.0


def test_no_mfu_where_the_peak_is_not_known(clock):
    rates = Throughput(Goodput(), 0)
    rates.add(STATS, waited=0.0)
    clock(1.0)
    assert "mfu" not in rates.values(1)


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_memory_is_that_of_the_fullest_device():
    gib = 2**30
    few = {"bytes_in_use": gib, "peak_bytes_in_use": 3 * gib, "bytes_limit": 16 * gib}
    many = {"bytes_in_use": 2 * gib, "peak_bytes_in_use": 2 * gib, "bytes_limit": 16 * gib}
    found = memory([Device(few), Device(many), Device(None)])
    assert found == {"memory/in_use_gib": 2, "memory/peak_gib": 3, "memory/limit_gib": 16}
    assert memory([Device({"bytes_in_use": gib})]) == {"memory/in_use_gib": 1}
    assert memory(jax.local_devices()) == {}, "a CPU says nothing"


def test_the_peak_is_that_of_the_devices_the_work_that_of_the_planner(experiment, monkeypatch):
    assert peak_seconds(experiment()) == 0.0, "of a CPU it is not known"
    monkeypatch.setattr(throughput, "peak_flops", {"cpu": 2e12}.get)
    needs = model_flops(experiment())
    assert needs > 1e8
    assert peak_seconds(experiment()) == needs / (2e12 * jax.device_count())
