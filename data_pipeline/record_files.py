# SPDX-License-Identifier: Apache-2.0
"""Reading single records of very many ArrayRecord files with a bounded number of open ones."""

import itertools
import resource
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import ClassVar

from array_record.python.array_record_module import ArrayRecordReader

# An open file costs a descriptor, of which processes often get 1024, and about 60 kB.
_ALLOWED = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAX_OPEN = min(1024, _ALLOWED // 2) if _ALLOWED > 0 else 1024  # negative: no limit


class RecordFiles:
    """Record r of file f; thread-safe. Nothing is opened before it is read."""

    # All instances share the limit: a mixture reads dozens of folders at once.
    _readers: ClassVar[OrderedDict[tuple[int, int], ArrayRecordReader]] = OrderedDict()
    _lock: ClassVar = Lock()
    _instances: ClassVar = itertools.count()

    def __init__(self, paths: Sequence[Path]):
        self._paths, self._number = paths, next(self._instances)

    def read(self, file: int, record: int) -> bytes:
        """RuntimeError, IndexError or OSError if that is not possible."""
        reader = self._reader(file)
        if not 0 <= record < reader.num_records():
            raise IndexError(f"there is no record {record} among {reader.num_records()}")
        return reader.read([record])[0]

    def _reader(self, file: int) -> ArrayRecordReader:
        key = (self._number, file)
        with self._lock:
            if key in self._readers:
                self._readers.move_to_end(key)
                return self._readers[key]
        # Not under the lock: on a slow file system others may open theirs meanwhile.
        reader = open_records(self._paths[file])
        with self._lock:
            self._readers[key] = reader
            while len(self._readers) > MAX_OPEN:
                self._readers.popitem(last=False)  # closes as soon as no thread uses it
        return reader


def open_records(path: Path) -> ArrayRecordReader:
    """RuntimeError for what is no whole ArrayRecord file; the library would call it empty."""
    reader = ArrayRecordReader(
        str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768
    )
    if not reader.ok():
        raise RuntimeError("the file is cut off or is no ArrayRecord file")
    return reader
