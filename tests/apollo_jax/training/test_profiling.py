# SPDX-License-Identifier: Apache-2.0
"""Traces hold the steps that were asked for, by the config or by a signal, where xprof looks."""

import os
import signal

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from apollo_jax.training.profiling import Tracer, parse


def traced_steps(workdir) -> list[list[int]]:
    """Steps in each trace, the oldest first."""
    found = []
    for path in sorted(workdir.glob("profile/plugins/profile/*/*.xplane.pb")):
        numbers = set()
        for plane in ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name == "train":
                        numbers.add(int(dict(event.stats)["step_num"]))
        found.append(sorted(numbers))
    return found


def run(tracer: Tracer, steps: int, ask_before: int = 0) -> None:
    double = jax.jit(lambda x: 2.0 * x)
    x = jnp.ones(())
    with tracer:
        for step in range(1, steps + 1):
            if step == ask_before:
                os.kill(os.getpid(), signal.SIGUSR1)
            with tracer.step(step, x):
                x = double(x)


def test_the_steps_of_the_config(tmp_path, capsys):
    run(Tracer(tmp_path, "2:2"), 5)
    assert traced_steps(tmp_path) == [[2, 3]]
    assert "tracing steps 2 to 3" in capsys.readouterr().out


def test_a_signal_traces_the_next_steps_also_at_the_end(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    run(Tracer(tmp_path), 5, ask_before=4)
    assert traced_steps(tmp_path) == [[4, 5]]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_nothing_is_traced_unasked(tmp_path):
    run(Tracer(tmp_path), 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["3", "0:2", "2:0", "a:b", "1:2:3"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not START:COUNT"):
        parse(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.profile": "9:1"}, "profile begins at step 9, the run ends at 8"),
        ({"train.profile": "soon"}, r"config\.train\.profile: 'soon' is not START:COUNT"),
        ({"evaluation.samples": "2", "evaluation.every": "0"}, "set config.evaluation.every"),
    ],
)
def test_a_config_that_would_show_nothing_is_refused(experiment, changes, said):
    with pytest.raises(ValueError, match=said):
        experiment(changes)
