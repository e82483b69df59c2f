# SPDX-License-Identifier: Apache-2.0
"""The same videos in a folder, tars, manifests and remote storage make the same shards."""

import csv
import http.server
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from functools import partial

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.frame_shards import FrameShards
from data_pipeline.media_encoding import encode_video
from data_pipeline.media_files import find_media, local_copy
from data_pipeline.predecode import PredecodeConfig, predecode

CONFIG = PredecodeConfig(fps=2.0, size=64, workers=1)


@pytest.fixture
def collection(videos, tmp_path):
    """12 videos, two tars and three manifests of them; (folder, names)."""
    folder = tmp_path / "collection"
    names = [f"{'deep é/' * (k % 3 == 0)}clip {k:02}.mp4" for k in range(12)]
    (folder / "videos" / "deep é").mkdir(parents=True)
    for k, name in enumerate(names):
        videos.write(folder / "videos" / name, count=6 + 3 * k, gop=4)
    names.sort()
    for shard in range(2):
        with tarfile.open(folder / f"set-{shard:03}.tar", "w") as tar:
            for name in names[6 * shard : 6 * shard + 6]:
                tar.add(folder / "videos" / name, name)
    with open(folder / "m.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "id"], *([name, name] for name in names)])
    pyarrow.parquet.write_table(pyarrow.table({"video": names}), folder / "m.parquet")
    (folder / "m.txt").write_text("\n".join(names))
    return folder, names


def stored(output):
    """id -> (what is known of it, its frames)."""
    shards, found = FrameShards(output), {}
    for name in shards.ids():
        info = shards.info(name)
        canvas = np.zeros((1, info.num_frames, 64, 64, 3), np.uint8)
        shards.read_clips(name, np.arange(info.num_frames)[None], canvas)
        found[name] = info, canvas.tobytes()
    return found


def test_every_input_makes_the_same_shards(collection, tmp_path):
    folder, names = collection
    predecode(folder / "videos", tmp_path / "folder", CONFIG, progress=False)
    wanted = stored(tmp_path / "folder")
    assert sorted(wanted) == names
    frames = (tmp_path / "folder" / "frames-00000.array_record").read_bytes()
    for source in ("set-{000..001}.tar", "videos/**/*.mp4", "m.csv", "m.parquet", "m.txt"):
        output = tmp_path / source.rpartition(".")[2]
        root = folder / "videos" if source.startswith("m.") else None
        predecode(folder / source, output, CONFIG, root=root, progress=False)
        assert (output / "frames-00000.array_record").read_bytes() == frames, source
        assert stored(output) == wanted


def test_memory_gives_the_same_records(collection):
    """In this process, because others have a memory of their own."""
    folder, names = collection
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/videos/", "/videos/", recursive=True)
    media = find_media("memory://videos")
    assert [medium.id for medium in media] == names
    for medium in media:
        with local_copy(medium) as path:
            copied = encode_video(path, medium.id, CONFIG.spec)
        local = encode_video(folder / "videos" / medium.id, medium.id, CONFIG.spec)
        assert (copied.info, list(copied.records)) == (local.info, list(local.records))
    memory.store.clear()


def test_a_web_server_gives_the_same_shards_to_the_workers(collection, tmp_path):
    pytest.importorskip("aiohttp")
    folder, _ = collection
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        source = f"http://127.0.0.1:{server.server_port}/videos/"
        predecode(source, tmp_path / "web", CONFIG, progress=False)
        server.shutdown()
        thread.join()
    fsspec.filesystem("http").clear_instance_cache()
    predecode(folder / "videos", tmp_path / "folder", CONFIG, progress=False)
    assert stored(tmp_path / "web") == stored(tmp_path / "folder")


def test_a_killed_process_leaves_no_copy_behind(collection, tmp_path):
    folder, _ = collection
    script = (
        "import sys, time; from data_pipeline.media_files import find_media, local_copy\n"
        "with local_copy(find_media(sys.argv[1])[0]) as path:\n"
        "    print(path.stat().st_size, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(folder / "set-000.tar")]
    (tmp_path / "tmp").mkdir()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    ) as process:
        assert process.stdout
        assert int(process.stdout.readline()) > 0
        process.send_signal(signal.SIGKILL)
    assert sys.platform != "linux" or list((tmp_path / "tmp").iterdir()) == []


def test_the_command_says_what_is_wrong_with_an_input(tmp_path):
    (tmp_path / "m.csv").write_text("vidio\na.mp4\n")
    command = [sys.executable, "-m", "apollo_jax", "predecode", "--output", str(tmp_path / "out")]
    wrong = {
        tmp_path / "m.csv": "m.csv:1: a column video, image, images, path or url is needed",
        "memry://videos": "did you mean memory://?",
        tmp_path / "{0..3}.tar": "there is no tar",
    }
    for source, message in wrong.items():
        done = subprocess.run([*command, "--input", str(source)], capture_output=True, text=True)
        assert done.returncode, source
        assert message in done.stderr, json.dumps(done.stderr)
        assert "Traceback" not in done.stderr
