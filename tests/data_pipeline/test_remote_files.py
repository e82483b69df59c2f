# SPDX-License-Identifier: Apache-2.0
"""Inputs that are not local: fsspec's memory storage, a web server, and storages that fail.

gs:// and s3:// take the same way as memory://; what is tested of them is what one reads who has
not installed them.
"""

import functools
import http.server
import io
import os
import sys
import tarfile
import threading
import time
import urllib.parse

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline import remote_files
from data_pipeline.media_files import Medium, find_media, local_copy
from data_pipeline.video import VideoError

DATA = {"a b.mp4": b"first" * 300, "deep/ü.PNG": b"second" * 5, "deep/c.mp4": b"third" * 7}


class Trouble(MemoryFileSystem):
    """Memory whose files break off after some bytes, as often as the test says."""

    protocol = "trouble"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("trouble:/"))

    store, pseudo_dirs = {}, [""]
    breaks, opened, error = [], 0, OSError("connection reset")

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        if mode == "rb":
            type(self).opened += 1
            if self.breaks:
                return Broken(file, self.breaks.pop(0), self.error)
        return file


class Broken:
    def __init__(self, file, left, error):
        self.file, self.left, self.error = file, left, error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def seek(self, offset):
        self.file.seek(offset)

    def read(self, size):
        if not self.left:
            raise self.error
        data = self.file.read(min(size, self.left))
        self.left -= len(data)
        return data


@pytest.fixture
def trouble(monkeypatch):
    fsspec.register_implementation("trouble", Trouble, clobber=True)
    Trouble.store.clear()
    Trouble.breaks, Trouble.opened, Trouble.error = [], 0, OSError("connection reset")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    Trouble().pipe("/v/a.mp4", bytes(range(256)) * 8)
    return Trouble


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    for name, data in {**DATA, ".hidden/x.mp4": b"", "._a.mp4": b"", "notes.txt": b""}.items():
        system.pipe(f"/videos/{name}", data)
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def contents(media):
    found = {}
    for medium in media:
        with local_copy(medium) as path:
            found[medium.id] = path.read_bytes()
    return found


def test_a_remote_folder(memory):
    media = find_media("memory://videos")
    assert contents(media) == DATA
    assert [(m.id, m.size) for m in media] == [(k, len(v)) for k, v in sorted(DATA.items())]
    assert [m.id for m in find_media("memory://videos/deep/", "memory://videos")] == [
        "deep/c.mp4", "deep/ü.PNG"
    ]  # fmt: skip


def test_remote_patterns_manifests_and_lists(memory):
    wanted = ["a b.mp4", "deep/c.mp4"]
    assert [m.id for m in find_media("memory://videos/**/*.mp4")] == wanted
    assert [m.id for m in find_media("memory://videos/{a b,deep/c}.mp4")] == wanted
    memory.pipe("/videos/m.csv", b"video\na b.mp4\nmemory://videos/deep/c.mp4\ngone.mp4\n")
    media = find_media("memory://videos/m.csv")
    urls = ["memory://videos/a b.mp4", "memory://videos/deep/c.mp4", "memory://videos/gone.mp4"]
    assert [m.path for m in media] == urls
    with pytest.raises(VideoError, match="missing"), local_copy(media[2]):
        pass
    assert [m.id for m in find_media(urls, "memory://videos")] == [*wanted, "gone.mp4"]
    assert [m.id for m in find_media(urls[0])] == ["a b.mp4"]
    with pytest.raises(FileNotFoundError, match=r"no file matches memory://videos/\*\.mkv"):
        find_media("memory://videos/*.mkv")
    with pytest.raises(FileNotFoundError, match="input memory://nowhere does not exist"):
        find_media("memory://nowhere")


def test_a_local_manifest_of_remote_names(memory, tmp_path):
    (tmp_path / "m.jsonl").write_text('{"video": "a b.mp4"}\n{"image": "deep/ü.PNG"}\n')
    media = find_media(tmp_path / "m.jsonl", "memory://videos")
    assert contents(media) == {name: DATA[name] for name in ("a b.mp4", "deep/ü.PNG")}


def test_remote_tars(memory, tmp_path):
    for shard, names in enumerate([["a b.mp4"], ["deep/ü.PNG", "deep/c.mp4"]]):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = len(DATA[name])
                tar.addfile(entry, io.BytesIO(DATA[name]))
        memory.pipe(f"/tars/{shard:03}.tar", packed.getvalue())
    for source in ("memory://tars/*.tar", "memory://tars/{000..001}.tar"):
        assert contents(find_media(source)) == DATA
    (first, *_) = find_media("memory://tars/*.tar", "memory://tars")
    assert first.id == "000.tar/a b.mp4"
    with pytest.raises(FileNotFoundError, match=r"002\.tar"):
        find_media("memory://tars/{000..002}.tar")


def test_a_copy_goes_with_its_context(memory):
    medium = find_media("memory://videos/*.mp4")[0]
    with local_copy(medium) as path:
        assert path.read_bytes() == path.read_bytes() == DATA["a b.mp4"]
    assert not path.exists()


def test_a_broken_connection_is_taken_up_where_it_broke(trouble):
    trouble.breaks = [0, 0, 0, 0, 100, 0, 0, 0, 1]  # bytes before it breaks
    beats = []
    with local_copy(Medium("a", "video", "trouble://v/a.mp4", 2048), beats.append) as path:
        assert path.read_bytes() == bytes(range(256)) * 8
    assert trouble.opened == 10
    assert set(beats) == {0}
    with local_copy(Medium("a", "video", "trouble://v/a.mp4", 300, 1000)) as path:
        assert path.read_bytes() == (bytes(range(256)) * 8)[1000:1300]


def test_a_fault_that_stays_is_a_reason(trouble):
    trouble.breaks = [0] * 20
    with (
        pytest.raises(VideoError, match="OSError: connection reset") as caught,
        local_copy(Medium("a", "video", "trouble://v/a.mp4")),
    ):
        pass
    assert (caught.value.reason, trouble.opened) == ("io", 5)
    trouble.error, trouble.opened = PermissionError(13, "forbidden"), 0
    with (
        pytest.raises(VideoError, match="forbidden") as caught,
        local_copy(Medium("a", "video", "trouble://v/a.mp4")),
    ):
        pass
    assert (caught.value.reason, trouble.opened) == ("io", 1)  # asking again is useless


def test_an_input_that_cannot_be_listed_is_one_line(trouble, monkeypatch):
    def refuse(self, path, **options):
        raise OSError("credentials have expired")

    monkeypatch.setattr(trouble, "find", refuse)
    with pytest.raises(ValueError, match=r"^trouble://v cannot be read: OSError: credentials"):
        find_media("trouble://v")


def test_a_file_that_shrank_since_it_was_listed(trouble):
    with (
        pytest.raises(VideoError, match="ended after 2048 of 2049 bytes") as caught,
        local_copy(Medium("a", "video", "trouble://v/a.mp4", 2049)),
    ):
        pass
    assert caught.value.reason == "io"


def test_a_full_disk_is_no_fault_of_the_file(memory, monkeypatch):
    def full(self, size):
        raise OSError(28, "No space left on device")

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def fileno(self):
            return 0

        write = full

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    (medium, *_) = find_media("memory://videos")
    with pytest.raises(OSError, match="No space left"), local_copy(medium):
        pass


@pytest.mark.parametrize("package", ["gcsfs", "s3fs"])
def test_a_storage_that_is_not_installed_names_the_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    protocol = {"gcsfs": "gs", "s3fs": "s3"}[package]
    remote_files._storage_class.cache_clear()
    (tmp_path / "m.txt").write_text(f"{protocol}://bucket/a.mp4\n")
    for source in (f"{protocol}://bucket/videos", tmp_path / "m.txt"):
        with pytest.raises(
            ValueError, match=rf"^{protocol}:// cannot .*{package}.*\[remote\]"
        ) as e:
            find_media(source)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"^memry:// is no storage .* did you mean memory://"):
        find_media("memry://bucket/videos")


def serve(handler, folder):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=folder)
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    return server, thread


class Plain(http.server.SimpleHTTPRequestHandler):
    """Lists folders, and gives whole files only."""

    def log_message(self, format, *args):
        pass


class Ranges(Plain):
    """Gives parts of files too, as every real storage does."""

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        path = self.translate_path(self.path)
        if not os.path.isfile(path):
            return super().do_HEAD() if head else super().do_GET()
        with open(path, "rb") as file:
            data = file.read()
        start, end = 0, len(data) - 1
        asked = self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or end), end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        if not head:
            self.wfile.write(data[start : end + 1])


@pytest.fixture(params=[Plain, Ranges])
def site(request, tmp_path):
    pytest.importorskip("aiohttp")
    for name, data in DATA.items():
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).write_bytes(data)
    server, thread = serve(request.param, tmp_path)
    yield request.param, f"http://127.0.0.1:{server.server_port}/videos/", tmp_path
    server.shutdown()
    thread.join()
    server.server_close()
    fsspec.filesystem("http").clear_instance_cache()


def test_a_web_server(site, monkeypatch):
    _, url, folder = site
    media = find_media(url)
    assert contents(media) == DATA
    monkeypatch.setattr(remote_files, "_CHUNK", 100)
    assert contents(media) == DATA
    (folder / "videos" / "m.txt").write_text("a b.mp4\ndeep/c.mp4?token=1\n")
    media = find_media(f"{url}m.txt")
    assert list(contents(media).values()) == [DATA["a b.mp4"], DATA["deep/c.mp4"]]
    gone = Medium("x", "video", f"{url}{urllib.parse.quote('ü gone')}.mp4")
    with pytest.raises(VideoError) as caught, local_copy(gone):
        pass
    assert caught.value.reason == "missing"


def test_tars_on_a_web_server_need_ranges(site):
    kind, url, folder = site
    (folder / "videos" / "big.json").write_bytes(b" " * 100_000)
    with tarfile.open(folder / "videos" / "a.tar", "w") as tar:
        for name in [*DATA, "big.json"]:
            tar.add(folder / "videos" / name, name)
    if kind is Ranges:
        assert contents(find_media(f"{url}a.tar")) == DATA
    else:
        with pytest.raises(ValueError, match=r"a.tar cannot be read in parts"):
            find_media(f"{url}a.tar")


def test_a_server_that_is_down_is_not_a_missing_file(site, monkeypatch):
    """fsspec's http calls both FileNotFoundError."""
    _, url, _ = site
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    down = "http://127.0.0.1:1/"
    with pytest.raises(VideoError, match="ClientConnector") as caught:
        contents([Medium("x", "video", f"{down}a.mp4")])
    assert (caught.value.reason, len(waits)) == ("io", 4)
    for source in (down, f"{down}m.csv", f"{down}a.mp4", f"{down}*.mp4", f"{down}a.tar"):
        with pytest.raises(ValueError, match=r"^http://127.0.0.1:1/\S* cannot be read: ClientConn"):
            find_media(source)
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone/"):
        find_media(f"{url}gone/")
    with pytest.raises(FileNotFoundError, match=r"no tar .*gone"):
        find_media([f"{url}gone.tar"])
    with pytest.raises(FileNotFoundError, match=r"gone\.csv does not exist"):
        find_media(f"{url}gone.csv")
