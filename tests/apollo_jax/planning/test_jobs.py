# SPDX-License-Identifier: Apache-2.0
"""Plans in processes of their own: kept, found again, failing alone. The planner is a script."""

import sys
from pathlib import Path

import pytest

from apollo_jax.planning import jobs

DEMO = str(Path(__file__).parents[3] / "configs/demo.py") + ":sft"
SCRIPT = """
import json, pathlib, sys
log, rows = pathlib.Path(sys.argv[1]), int(sys.argv[2])
log.write_text(log.read_text() + f"{rows} ")
if rows == 3:
    print("text before", "XlaRuntimeError: INTERNAL: it broke", "more", sep="\\n", file=sys.stderr)
    sys.exit(134)
pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps({"rows": rows}))
sys.exit(rows == 2)  # as a plan that does not fit
"""


@pytest.fixture
def planner(tmp_path, monkeypatch):
    """Counts what is compiled in the file that it gives."""
    log, script = tmp_path / "log", tmp_path / "planner.py"
    log.write_text("")
    script.write_text(SCRIPT)
    line = [sys.executable, str(script), str(log)]
    monkeypatch.setattr(jobs.Job, "command", lambda job: [*line, dict(job.overrides)[ROWS]])
    return log


ROWS = "data.batch_size"


def job(rows: int, **more: str) -> jobs.Job:
    return jobs.Job(DEMO, ((ROWS, str(rows)), *more.items()), "v5e:4x4")


def test_results_are_kept_and_found_again(planner, tmp_path):
    wanted = [job(1), job(2)]
    first = dict(jobs.run(wanted, tmp_path / "kept", parallel=2))
    assert first == {job(1): {"rows": 1}, job(2): {"rows": 2}}
    assert dict(jobs.run([*wanted, job(4)], tmp_path / "kept")) == first | {job(4): {"rows": 4}}
    assert sorted(planner.read_text().split()) == ["1", "2", "4"]
    assert not list((tmp_path / "kept").glob("*.tmp"))


def test_an_interrupt_keeps_what_is_done(planner, tmp_path):
    running = jobs.run([job(1), job(4), job(5)], tmp_path / "kept")
    next(running)
    running.close()  # as an exception in its consumer does
    assert len(list((tmp_path / "kept").glob("*.json"))) in (1, 2)


def test_a_crash_is_one_jobs_own(planner, tmp_path):
    found = dict(jobs.run([job(3), job(1)], tmp_path))
    assert str(found[job(3)]) == "XlaRuntimeError: INTERNAL: it broke"
    assert found[job(1)] == {"rows": 1}
    dict(jobs.run([job(3)], tmp_path))
    assert planner.read_text().split().count("3") == 2  # failures are tried again


def test_the_key_follows_what_is_compiled(monkeypatch):
    key = job(1).key()
    assert key == job(1).key()
    assert key == job(1, **{"data.threads": "3", "data.tokenizer": "x"}).key()  # not in the step
    assert key != job(2).key()
    assert key != job(1, **{"train.remat": "full"}).key()
    assert key != jobs.Job(DEMO, job(1).overrides, "v5e:4x8").key()
    with monkeypatch.context() as environment:
        environment.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_other=true")
        assert key != job(1).key()
    monkeypatch.setattr(jobs, "versions", lambda: {"jax": "0"})
    assert key != job(1).key()


def test_the_key_knows_what_the_step_is_made_of():
    """The step's own modules and no others, so that other work does not throw results away."""
    found = set(jobs.modules("planning.ahead_of_time"))
    assert {"training.step", "models.qwen2", "sharding", "planning.hlo"} <= found
    assert not {"training.train", "planning.search", "evaluation.report"} & found
