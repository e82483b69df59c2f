# SPDX-License-Identifier: Apache-2.0
"""Folders, patterns and lists with everything that people keep in them."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from data_pipeline.file_listing import expand_braces
from data_pipeline.media_files import Medium, find_media, local_copy
from data_pipeline.video import VideoError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))


def ids(source, root=None):
    return [medium.id for medium in find_media(source, root)]


def test_a_folder_is_listed_in_order_with_sizes(tmp_path):
    touch(tmp_path, "b.mp4", "a b/ü [1].MOV", "a-c/d.png", "notes.txt", "0001.json")
    media = find_media(tmp_path)
    assert [m[:2] for m in media] == [
        ("a b/ü [1].MOV", "video"), ("a-c/d.png", "image"), ("b.mp4", "video")
    ]  # fmt: skip
    assert all(os.stat(m.path).st_size == m.size and m.offset == -1 for m in media)
    assert ids(f"{tmp_path}/") == ids(tmp_path) == [m.id for m in media]
    assert pickle.loads(pickle.dumps(media)) == media
    assert Medium(*json.loads(json.dumps(media[0]))) == media[0]


def test_hidden_files_are_left_out(tmp_path):
    touch(tmp_path, "a.mp4", "._a.mp4", ".thumbnails/b.png", "c/.d/e.mp4")
    assert ids(tmp_path) == ids(f"{tmp_path}/**/*") == ids(f"{tmp_path}/*.*") == ["a.mp4"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "in/a/clip.mp4", "in/b/other.mp4", "elsewhere/far.mp4")
    root = tmp_path / "in"
    (root / "far").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    (root / "self.mp4").symlink_to("self.mp4")
    (root / "lost.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(root / "pipe.mp4")
    wanted = ["a/clip.mp4", "b/other.mp4", "far/far.mp4", "lost.mp4", "self.mp4"]
    assert ids(root) == ids(f"{root}/**/*.mp4") == wanted
    sizes = {m.id: m.size for m in find_media(root)}
    assert sizes["lost.mp4"] == sizes["self.mp4"] == -1  # to be missed when they are read


def test_one_file_name_in_two_folders_is_two_media(tmp_path):
    touch(tmp_path, "a/clip.mp4", "b/clip.mp4", "b/CLIP.mp4")
    assert ids(tmp_path) == ["a/clip.mp4", "b/CLIP.mp4", "b/clip.mp4"]


def test_a_name_that_is_no_text_gets_an_id_that_is(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    with open(path, "wb") as file:
        file.write(b"latin")
    (medium,) = find_media(tmp_path)
    assert medium.id == "caf\ufffd.mp4"
    with local_copy(pickle.loads(pickle.dumps(medium))) as local:
        assert local.read_bytes() == b"latin"


def test_patterns(tmp_path, monkeypatch):
    touch(tmp_path, "1.mp4", "a/1.mp4", "a/2.mp4", "a/b/3.mp4", "a/1.txt", "c/4.png")
    assert ids(f"{tmp_path}/*.mp4") == ["1.mp4"]
    assert ids(f"{tmp_path}/*/*") == ["a/1.mp4", "a/2.mp4", "c/4.png"]
    assert ids(f"{tmp_path}/a/**") == ["1.mp4", "2.mp4", "b/3.mp4"]
    assert ids(f"{tmp_path}/**/[13].mp?") == ["1.mp4", "a/1.mp4", "a/b/3.mp4"]
    assert ids(f"{tmp_path}/{{c,a}}/*") == ["c/4.png", "a/1.mp4", "a/2.mp4"]
    assert ids(f"{tmp_path}/a/{{1..2}}.mp4", root=tmp_path) == ["a/1.mp4", "a/2.mp4"]
    monkeypatch.chdir(tmp_path)
    assert ids("*.mp4") == ["1.mp4"]
    assert ids("a/*.mp4") == ["1.mp4", "2.mp4"]
    assert ids("**/[23].*") == ["a/2.mp4", "a/b/3.mp4"]
    assert ids(".") == ids(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file matches x/\*\.mp4"):
        find_media("x/*.mp4")


def test_names_with_the_characters_of_patterns(tmp_path):
    touch(tmp_path, "set [1]/{a}*.mp4")
    assert ids(f"{tmp_path}/set [1]") == ["{a}*.mp4"]
    assert ids(f"{tmp_path}/set [1]/{{a}}*.mp4") == ["{a}*.mp4"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{a}{}{x..y}", ["{a}{}{x..y}"]),
        ("{a}-{1,2}", ["{a}-1", "{a}-2"]),
    ],
)
def test_braces_as_in_bash(pattern, names):
    assert expand_braces(pattern) == names


def test_braces_have_a_bound():
    with pytest.raises(ValueError, match="more than 1000000 names"):
        expand_braces("{0..9999999999}")


def test_lists_and_single_files(tmp_path):
    touch(tmp_path, "a.mp4", "b/c.png")
    assert ids(tmp_path / "b" / "c.png") == ["c.png"]
    assert ids(tmp_path / "b" / "c.png", root=tmp_path) == ["b/c.png"]
    assert ids(["b/c.png", tmp_path / "a.mp4", "gone.mp4"], tmp_path) == [
        "b/c.png", "a.mp4", "gone.mp4"
    ]  # fmt: skip
    assert ids([tmp_path / "a.mp4"]) == [str(tmp_path / "a.mp4")]
    assert ids(f"file://{tmp_path}/b") == ["c.png"]
    with pytest.raises(ValueError, match="the list names no videos"):
        find_media([])
    with pytest.raises(ValueError, match=r"a\.mp4 does not lie in the root .*/b"):
        find_media([tmp_path / "a.mp4"], tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"input .*gone\.mp4 does not exist"):
        find_media(tmp_path / "gone.mp4")


def test_local_copies_of_local_files_are_the_files(tmp_path):
    touch(tmp_path, "a.mp4")
    with local_copy(find_media(tmp_path)[0]) as path:
        assert path == tmp_path / "a.mp4"
    with pytest.raises(VideoError) as caught, local_copy(Medium("d", "video", str(tmp_path))):
        pass
    assert caught.value.reason == "unreadable"


def test_many_rows_take_little_time_and_memory(tmp_path):
    """In a process of its own, which the memory of others does not blur."""
    with open(tmp_path / "m.csv", "w") as file:
        file.write("id,path\n")
        file.writelines(f"clip{k:07},part-{k % 100:03}/clip{k:07}.mp4\n" for k in range(200_000))
    script = (
        "import resource, sys, time; from data_pipeline.media_files import find_media\n"
        "start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "media = find_media(sys.argv[1], '/nowhere')\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(media), time.process_time() - start, (after - before) / 1024)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "m.csv")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    count, seconds, megabytes = map(float, done.stdout.split())
    assert count == 200_000
    assert seconds < 20, seconds
    assert megabytes < 100, megabytes
