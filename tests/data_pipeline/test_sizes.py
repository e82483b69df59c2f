# SPDX-License-Identifier: Apache-2.0
"""Tables of sizes: measured in parallel, found again, never stale; they change no batch."""

import contextlib
import dataclasses
import json
import logging
import os

import numpy as np
import pytest

from data_pipeline import loader as loader_module
from data_pipeline.data_config import sample_maker
from data_pipeline.loader import Loader
from data_pipeline.samples import FAULTY, MISSING, TOO_LONG, TRIMMED, WHOLE
from data_pipeline.sizes import compute, open_measured
from data_pipeline.sources import JsonlSource


def load(config, steps: int) -> list:
    with contextlib.closing(Loader(config, num_steps=steps)) as loader:
        return list(loader)


def test_rows_of_the_table(tiny_data):
    odd = [
        {"id": "lost", "question": "?", "answer": "a", "video": "nowhere"},
        {"id": "long", "question": "a " * 300, "answer": "a"},
        {"id": "kind", "question": "?", "answer": "a", "image": "v0"},
    ]
    config = tiny_data.config({"v": tiny_data.records("video", 8) + odd}, clips=3)
    heard = []
    table = compute(config, "v", progress=lambda *done: heard.append(done))
    assert heard == [(11, 11)]
    assert table[:, 1].tolist() == [1, 1, 2, 2, 3, 3, 3, 3, 0, 0, 0]
    assert table[:, 2].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0]
    assert table[:, 3].tolist() == [WHOLE] * 6 + [TRIMMED] * 2 + [MISSING, TOO_LONG, FAULTY]
    source, maker = JsonlSource(config.sources["v"].path), sample_maker(config)
    for index in range(8):
        assert table[index, 0] == len(maker.make(source[index]).text.tokens)
    again = compute(config, "v")
    assert isinstance(again, np.memmap)
    np.testing.assert_array_equal(again, table)


def test_processes_measure_the_same(tiny_data):
    config = tiny_data.config({"t": tiny_data.records("text", 2500)})
    done = []
    table = compute(config, "t", processes=2, progress=lambda n, total: done.append(n))
    assert done == [1000, 2000, 2500]
    for file in tiny_data.folder.glob("t.jsonl.*"):
        file.unlink()
    np.testing.assert_array_equal(compute(config, "t", processes=1), table)
    assert not list(tiny_data.folder.glob("*.tmp"))


def test_batches_are_the_same_with_and_without(tiny_data, tmp_path):
    kinds = ("text", "image", "video")
    config = tiny_data.config(
        {k: tiny_data.records(k, 20) for k in kinds}, sizes=str(tmp_path / "elsewhere")
    )
    before = load(config, 6)
    for name in config.sources:
        compute(config, name)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 6  # sizes and index of each
    maker = sample_maker(config)
    for settings in config.sources.values():
        source, table = open_measured(settings, maker, config.sizes)
        assert table is not None
        assert isinstance(source, JsonlSource)
        assert source.indexed
    for (batch, stats), (other, same) in zip(load(config, 6), before, strict=True):
        assert stats == same
        for a, b in zip(batch, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_stale_table_is_not_used(tiny_data):
    records = tiny_data.records("video", 8)
    config = tiny_data.config({"v": records})
    compute(config, "v")

    def found(config) -> bool:
        settings = config.sources["v"]
        return open_measured(settings, sample_maker(config))[1] is not None

    assert found(config)
    assert found(dataclasses.replace(config, seed=1, batch_size=2, threads=1))
    for changes in ({"length": 255}, {"clips": 7}, {"tokens_per_clip": 5}, {"clip_duration": 1.0}):
        assert not found(dataclasses.replace(config, **changes))
    source, _ = open_measured(config.sources["v"], sample_maker(config))
    tiny_data.write("v", [*records[:-1], records[0]])
    assert not found(config)
    changed, _ = open_measured(config.sources["v"], sample_maker(config))
    assert changed.fingerprint != source.fingerprint


def test_a_damaged_table_is_measured_again(tiny_data):
    config = tiny_data.config({"v": tiny_data.records("video", 8)})
    table = compute(config, "v")
    (file,) = tiny_data.folder.glob("*.sizes-*.npy")
    os.truncate(file, 150)
    np.testing.assert_array_equal(compute(config, "v"), table)


def test_missing_media_are_told_from_the_table(tiny_data):
    lost = {"id": "lost", "question": "?", "answer": "a", "video": "nowhere"}
    config = tiny_data.config({"v": [*tiny_data.records("video", 8), lost]})
    with pytest.raises(ValueError, match="1 of 9 records need media") as before:
        Loader(config, num_steps=1)
    compute(dataclasses.replace(config, max_bad_share=1.0), "v")
    with pytest.raises(ValueError, match="lost: 'nowhere'") as after:
        Loader(config, num_steps=1)
    assert str(after.value) == str(before.value)


def test_an_index_stands_for_the_checks(tiny_data):
    path = tiny_data.write("t", tiny_data.records("text", 30))
    checked = JsonlSource(path)
    checked.write_index(tiny_data.folder)
    found = JsonlSource(path, index=tiny_data.folder)
    assert (checked.indexed, found.indexed) == (False, True)
    assert found.fingerprint == checked.fingerprint
    assert [found[i] for i in range(30)] == [checked[i] for i in range(30)]
    path.write_text(path.read_text() + json.dumps({"text": "more"}) + "\n")
    assert len(JsonlSource(path, index=tiny_data.folder)) == 31


def test_weights_of_tokens_are_exact_in_expectation(tiny_data):
    sources = {k: tiny_data.records(k, 40) for k in ("text", "video")}
    config = tiny_data.config(sources, weight_by="tokens")
    with pytest.raises(ValueError, match="source 'text'; measure them once: apollo-jax data check"):
        Loader(config, num_steps=1)
    tables = {name: compute(config, name) for name in sources}
    weights = {"text": 3.0, "video": 1.0}
    config = dataclasses.replace(
        config,
        sources={n: dataclasses.replace(s, weight=weights[n]) for n, s in config.sources.items()},
    )
    with contextlib.closing(Loader(config, num_steps=1)) as loader:
        shares = np.diff(loader._mixture._edges)
    drawn = [share * tables[n][:, 0].mean() for n, share in zip(sources, shares, strict=True)]
    np.testing.assert_allclose(drawn[0] / drawn[1], 3.0)
    with pytest.raises(ValueError, match="weight_by='clips' must be 'samples' or 'tokens'"):
        Loader(dataclasses.replace(config, weight_by="clips"), num_steps=1)


def test_many_records_without_a_table_are_mentioned_once(tiny_data, monkeypatch, caplog):
    monkeypatch.setattr(loader_module, "_MANY", 10)
    config = tiny_data.config({k: tiny_data.records(k, 40) for k in ("text", "video")})
    with caplog.at_level(logging.WARNING):
        Loader(config, num_steps=1).close()
        Loader(config, num_steps=1, process_index=1, process_count=2).close()
        for name in config.sources:
            compute(config, name)
        Loader(config, num_steps=1).close()
    (said,) = caplog.messages
    assert said.startswith("2 of 2 sources (text, video): samples are measured when they are")
    assert "apollo-jax data check" in said
