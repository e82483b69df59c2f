# SPDX-License-Identifier: Apache-2.0
"""What --distributed may say; what processes do with each other is in test_survive.py."""

from pathlib import Path

import jax
import pytest

from apollo_jax.training import processes

SMALL = Path(__file__).parent / "small.py"


@pytest.mark.parametrize(
    "how",
    ["localhost,2,0", "localhost:1234,2", "localhost:1234,2,2", "localhost:1234,2,-1", ":12,2,0"],
)
def test_other_addresses_are_refused(experiment, how):
    with pytest.raises(ValueError, match=rf"--distributed {how}: must be auto or HOST:PORT,COUNT"):
        processes.join(how, experiment())
    assert not jax.distributed.is_initialized()


def test_where_no_cluster_is_the_others_must_be_named(texts, company, tmp_path):
    workdir = tmp_path / "run"
    statuses, said = company(f"{SMALL}:{texts}", workdir, 1, "--distributed").end()
    assert statuses == [2], said
    assert "--distributed auto: jax finds nothing here that says who the other" in said[0]
    assert "say it: --distributed HOST:PORT,COUNT,INDEX" in said[0]
    assert not workdir.exists()
