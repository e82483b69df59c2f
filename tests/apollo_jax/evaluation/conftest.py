# SPDX-License-Identifier: Apache-2.0
"""A small world, a tokenizer for its words and an untrained model."""

import json

import pytest
from flax import nnx

from apollo_jax.evaluation.apollobench_mini import write_world
from apollo_jax.inference.processor import Processor
from apollo_jax.models import apollo
from data_pipeline.tokenizer import Tokenizer, train_sentencepiece


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    write_world(out, train_scenes=48, test_scenes_per_family=4, seed=3, workers=1)
    return out


@pytest.fixture(scope="session")
def processor(world, tmp_path_factory):
    lines = (world / "train/text.jsonl").read_text().splitlines()
    texts = [turn["value"] for line in lines for turn in json.loads(line)["conversations"]]
    path = tmp_path_factory.mktemp("tokenizer") / "words.model"
    train_sentencepiece(texts, path, 320)
    tokenizer = Tokenizer.from_path(path)
    return Processor.from_config(apollo.Config.debug(tokenizer.vocab_size), tokenizer)


@pytest.fixture(scope="session")
def model(processor):
    config = apollo.Config.debug(processor.tokenizer.vocab_size)
    return apollo.Apollo(config, rngs=nnx.Rngs(0))
