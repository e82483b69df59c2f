# SPDX-License-Identifier: Apache-2.0
"""Every second of a run is of one kind."""

from apollo_jax.training import goodput
from apollo_jax.training.goodput import Goodput


def test_adds_up_what_the_time_went_to(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])
    one = Goodput()
    now[0] = 2.0
    with one.during("step"):
        with one.during("compile"):
            now[0] = 5.0
        with one.during("data"):
            now[0] = 5.5
        now[0] = 9.5
        with one.during("checkpoint"):
            now[0] = 10.0
        assert one.shares() == {
            "goodput/start": 0.2,
            "goodput/compile": 0.3,
            "goodput/data": 0.05,
            "goodput/step": 0.4,
            "goodput/checkpoint": 0.05,
            "goodput/evaluation": 0.0,
        }
    assert one.line() == (
        "goodput: 40.0% of 10 s in steps; start 20.0%, compile 30.0%, data 5.0%, checkpoint 5.0%, "
        "evaluation 0.0%"
    )
