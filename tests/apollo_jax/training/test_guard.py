# SPDX-License-Identifier: Apache-2.0
"""Bad steps: found, named, counted; skipped or rewound they leave no trace in the state."""

import json
import math

import numpy as np
import pytest

from apollo_jax.config import TrainConfig
from apollo_jax.training.guard import BAD_STEPS, LEAST, WINDOW, Diverged, Guard, Measured

NAN = math.nan


def guard(tmp_path, **fields) -> Guard:
    train = TrainConfig(num_steps=1000, **fields)
    return Guard(train, tmp_path, lambda step: [f"r{step}", "x"])


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (NAN, 1.0, "the loss of step 3 is nan"),
        (1.0, math.inf, "the gradient norm of step 3 is inf"),
    ],
)
def test_no_number_stops_and_names_the_records(tmp_path, loss, norm, said):
    one = guard(tmp_path)
    assert not one.see(Measured(2, 1e30, 1e30))
    with pytest.raises(Diverged, match=f"{said}; its records: r3, x\n"):
        one.see(Measured(3, loss, norm))
    (line,) = map(json.loads, (tmp_path / BAD_STEPS).read_text().splitlines())
    assert line["records"] == ["r3", "x"]
    assert (line["step"], line["why"]) == (3, said)
    assert None in (line["loss"], line["grad_norm"])


def test_spikes_are_above_the_median_of_the_good(tmp_path):
    one = guard(tmp_path, on_nonfinite="skip", spike_factor=3.0)
    for step in range(1, LEAST + 1):
        assert not one.see(Measured(step, 2.0, 1.0 if step > 1 else 50.0))  # too early to say
    assert one.limits(LEAST + 1).tolist() == [np.inf, np.inf]  # the last is not known yet
    assert one.limits(LEAST + 2).tolist() == [6.0, 3.0]
    assert one.see(Measured(LEAST + 2, 6.5, 1.0))
    assert one.see(Measured(LEAST + 3, 2.0, 3.0))
    assert not one.see(Measured(LEAST + 4, 5.9, 2.9))
    assert one.bad == 2


def test_limits_do_not_depend_on_where_the_run_was_interrupted(tmp_path):
    rng = np.random.default_rng(0)
    whole = guard(tmp_path, on_nonfinite="skip", spike_factor=3.0)
    for step in range(1, 2 * WINDOW):
        known_early = whole.limits(step + 1)  # as when the step after this one is dispatched
        measured = Measured(step, *rng.lognormal(size=2).tolist())
        whole.see(measured)
        assert whole.limits(step + 1).tolist() == known_early.tolist()
        state = json.loads(json.dumps(whole.state()))
        again = Guard(whole.train, tmp_path, state=state)
        assert again.limits(step + 1).tolist() == known_early.tolist()
        assert (again.bad, again.in_a_row) == (whole.bad, whole.in_a_row)
    assert len(whole.state()["good"]) < WINDOW + 3
    assert whole.bad


def test_too_many_in_a_row_stop(tmp_path):
    one = guard(tmp_path, on_nonfinite="skip", max_bad_steps=2)
    assert one.see(Measured(1, NAN, NAN))
    assert not one.see(Measured(2, 1.0, 1.0))
    assert one.see(Measured(3, NAN, NAN))
    assert one.see(Measured(4, NAN, NAN))
    with pytest.raises(Diverged, match="3 bad steps in a row, more than config"):
        one.see(Measured(5, NAN, NAN))
