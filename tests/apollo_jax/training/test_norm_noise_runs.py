# SPDX-License-Identifier: Apache-2.0
"""Runs that log the noise scale by modality: resumed exactly, refused where there is none."""

import json
import shutil
from pathlib import Path

import pytest

from apollo_jax.config import LearningRates, load
from apollo_jax.training import contrastive, train

SMALL, PAIRS = (Path(__file__).parent / name for name in ("small.py", "pairs.py"))
ON = ("--config.train.noise_scale_norms=true", "--config.train.num_steps=4")
SCALES = ("noise_scale/norms", "noise_scale/norms/text", "noise_scale/norms/video")
RATES = LearningRates(llm=1e-3)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_it_by_modality_and_resumes_exactly(command, tmp_path):
    """Killed after its second checkpoint; there are texts and videos, and no image."""
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    train.main(command(whole, RATES, *ON, "--config.train.keep=4"))
    found = lines(whole)
    for line in found:
        assert line["noise/variance/norms"] > 0
        assert line["noise/variance/norms/video"] > 0
        assert line["noise/variance/norms/image"] is None
        assert "noise_scale/norms/image" not in line
        assert set(SCALES) <= set(line)
        assert "noise_scale" not in line  # which needs microbatches
    first, last = found[0], found[-1]
    ratio = first["noise/variance/norms/text"] / first["noise/signal/norms/text"]
    assert first["noise_scale/norms/text"] == pytest.approx(ratio, rel=1e-6)
    assert last["noise_scale/norms/text"] != first["noise_scale/norms/text"]
    shutil.copytree(whole, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > 2:
            shutil.rmtree(folder)
    train.main(command(copy, RATES, *ON, "--config.train.keep=4"))
    told = ("loss", "grad_norm", *SCALES, "noise/variance/norms/video", "noise/signal/norms/video")
    again = lines(copy)
    assert [[line[n] for n in told] for line in again] == [
        [line[n] for n in told] for line in found
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer.learning_rates.llm": "0"}, "norms, which do not train here"),
        ({"train.lora.llm.rank": "4"}, "norms, which do not train here"),
        ({"data.batch_size": "1"}, "has only one here: set config.data.batch_size"),
    ],
)
def test_a_config_that_has_none_is_refused(fields, words, tmp_path):
    with pytest.raises(ValueError, match=rf"noise_scale_norms .*{words}"):
        load(f"{SMALL}:{tmp_path}", {"train.noise_scale_norms": "true"} | fields)


def test_rows_of_several_microbatches_are_enough(tmp_path):
    several = {"data.batch_size": "1", "train.accumulate": "2"}
    load(f"{SMALL}:{tmp_path}", {"train.noise_scale_norms": "true"} | several)


def test_pairs_have_no_decoder(tmp_path):
    with pytest.raises(ValueError, match="noise_scale_norms reads the norms of a decoder"):
        contrastive.load(f"{PAIRS}:{tmp_path}", {"train.noise_scale_norms": "true"})
