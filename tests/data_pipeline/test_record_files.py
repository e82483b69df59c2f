# SPDX-License-Identifier: Apache-2.0
"""Many files of records with few of them open; trouble is an error, never an empty file."""

import os
import threading
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipeline import record_files
from data_pipeline.record_files import RecordFiles, open_records


def write(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def open_in(folder):
    fds = Path("/proc/self/fd")
    links = [os.readlink(fds / fd) for fd in os.listdir(fds) if (fds / fd).is_symlink()]
    return sum(link.startswith(str(folder)) for link in links)


def test_few_files_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "MAX_OPEN", 4)
    paths = [write(tmp_path / f"{k}", [b"%d %d" % (k, r) for r in range(3)]) for k in range(20)]
    stores, wrong = [RecordFiles(paths[:10]), RecordFiles(paths[10:])], []
    assert open_in(tmp_path) == 0

    def read(thread):
        for k in range(100):
            file, record = (7 * k + thread) % 20, k % 3
            if stores[file // 10].read(file % 10, record) != b"%d %d" % (file, record):
                wrong.append((file, record))

    threads = [threading.Thread(target=read, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 0 < open_in(tmp_path) <= 4


def test_trouble_is_an_error(tmp_path):
    path = write(tmp_path / "a", [b"x" * 1000])
    with pytest.raises(IndexError, match="no record 1 among 1"):
        RecordFiles([path]).read(0, 1)
    data = path.read_bytes()
    for damaged in (b"", data[:1000], b"no records" * 10000):
        path.write_bytes(damaged)
        with pytest.raises(RuntimeError, match="cut off or is no ArrayRecord"):
            open_records(path)
    files = RecordFiles([path])
    with pytest.raises(RuntimeError, match="cut off"):
        files.read(0, 0)
    path.write_bytes(data)  # what failed is not remembered
    assert files.read(0, 0) == b"x" * 1000
    with pytest.raises((RuntimeError, OSError)):
        RecordFiles([tmp_path / "nowhere"]).read(0, 0)
