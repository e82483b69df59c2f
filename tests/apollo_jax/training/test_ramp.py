# SPDX-License-Identifier: Apache-2.0
"""Ramps of the batch: counted alike by the host and in a compiled program; schedules and rates."""

import jax.numpy as jnp
import numpy as np
import pytest

from apollo_jax.config import LearningRates, OptimizerConfig
from apollo_jax.training.optimizer import Batches, make_schedules, rates_by_batch
from apollo_jax.training.ramp import Ramp, left_out

RAMP = Ramp(((0, 1), (3, 4), (5, 2)))
COUNTS = [1, 1, 1, 4, 4, 2, 2, 2]  # of updates 0 to 7
RATES = LearningRates(connector=1e-3)


def test_microbatches_of_and_before_every_update():
    assert [RAMP.at(n) for n in range(8)] == COUNTS
    assert [RAMP.before(n) for n in range(9)] == [0, *np.cumsum(COUNTS)]
    assert RAMP.most == 4
    assert [int(RAMP.traced_at(jnp.int32(n))) for n in range(8)] == COUNTS
    assert [int(RAMP.traced_before(jnp.int32(n))) for n in range(9)] == [0, *np.cumsum(COUNTS)]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train.accumulate": "0"}, r"config\.train\.accumulate is 0"),
        ({"train.batch_ramp": "0:1,2:4,2:8"}, "batch_ramp 0:1,2:4,2:8 must go from earlier to"),
        ({"train.batch_ramp": "0:1,4:2,3:8"}, "batch_ramp .* must go from earlier to later"),
        ({"train.batch_ramp": "0:1,2:0"}, "batch_ramp 0:1,2:0 has an update without a microbatch"),
        ({"train.batch_ramp": "1:2"}, "batch_ramp 1:2 must begin at update 0"),
        ({"train.batch_ramp": "0:2", "train.accumulate": "2"}, r"leave train\.accumulate at 1"),
        ({"optimizer.rate_rule": "sqrt"}, r"config\.optimizer\.base_batch 0: set it to the rows"),
        ({"optimizer.base_batch": "64"}, r"base_batch is 64, but config\.optimizer\.rate_rule is"),
        ({"optimizer.rate_rule": "cubic"}, "rate_rule is 'cubic'; known: 'none', 'linear', 'sqrt'"),
        ({"train.batch_ramp": "0:1,8:2", "train.noise_scale": "true"}, "only one in all 8 updates"),
        ({"train.batch_ramp": "0:x"}, r"config\.train\.batch_ramp\[0\]\[1\] is 'x'"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(experiment, overrides, said):
    with pytest.raises(ValueError, match=said):
        experiment(overrides)


def test_a_ramp_is_read_from_the_command_line(experiment):
    assert experiment({"train.batch_ramp": "0:1, 3:4,5:2"}).train.ramp == RAMP
    assert experiment({"train.accumulate": "3"}).train.ramp == Ramp(((0, 3),))


def test_pieces_that_the_run_does_not_reach_are_left_out(experiment):
    """Nothing is compiled or kept ready for them; the run has 8 updates."""
    train = experiment({"train.batch_ramp": "0:1,7:2,8:4,5000:8"}).train
    assert train.ramp == Ramp(((0, 1), (7, 2)))
    (said,) = left_out(train.batch_ramp, train.num_steps)
    assert said == "config.train.batch_ramp: 8:4,5000:8 is left out, the run ends at 8"
    assert left_out(((0, 1), (7, 2)), 8) == []


def rates(config: OptimizerConfig, steps: int, ramp: Ramp = RAMP) -> list[float]:
    rate = make_schedules(config, steps, Batches(8, ramp))["connector"]
    return [float(rate(jnp.int32(n))) for n in range(steps + 1)]


@pytest.mark.parametrize("by", ["samples", "tokens"])
def test_a_schedule_by_what_is_consumed_is_that_of_the_same_rows_unramped(by):
    """After as many rows the rate is as in a run of one microbatch to each update."""
    config = OptimizerConfig(RATES, warmup_ratio=0.2, schedule_by=by)
    plain = rates(OptimizerConfig(RATES, warmup_ratio=0.2), steps=17, ramp=Ramp(((0, 1),)))
    wanted = [plain[RAMP.before(n)] for n in range(9)]
    np.testing.assert_allclose(rates(config, 8), wanted, rtol=1e-6, atol=1e-12)
    assert rates(config, 8) != rates(OptimizerConfig(RATES, warmup_ratio=0.2), 8)


def test_without_a_ramp_all_three_are_one_schedule():
    by = [OptimizerConfig(RATES, schedule_by=by) for by in ("steps", "samples", "tokens")]
    first, *others = (rates(config, 50, Ramp(((0, 4),))) for config in by)
    assert others == [first, first]


@pytest.mark.parametrize(("rule", "power"), [("none", 0.0), ("linear", 1.0), ("sqrt", 0.5)])
def test_rates_follow_the_batch_of_the_update(rule, power):
    base = 16 if rule != "none" else 0
    config = OptimizerConfig(
        RATES, warmup_ratio=0, schedule="constant", rate_rule=rule, base_batch=base
    )
    wanted = [1e-3 * (8 * count / 16) ** power for count in [*COUNTS, 2]]
    np.testing.assert_allclose(rates(config, 8), wanted, rtol=1e-6)
    told = rates_by_batch(config, Batches(8, RAMP))
    assert [line.split(":")[0] for line in told] == [
        "from update 0",
        "from update 3",
        "from update 5",
    ]
    assert "32 rows (4 x 8), peak rates connector " + f"{wanted[3]:.3g}" in told[1]
    assert ("linear, base 16" in told[1]) == (rule == "linear")
