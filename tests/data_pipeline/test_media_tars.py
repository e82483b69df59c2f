# SPDX-License-Identifier: Apache-2.0
"""Files inside tars are found, named and read as if they were unpacked, with nothing unpacked."""

import io
import os
import tarfile

import pytest

from data_pipeline.media_files import Medium, find_media, local_copy
from data_pipeline.media_tars import TarIndex, index_tar
from data_pipeline.video import VideoError

SAMPLE = {
    "000001.mp4": b"first" * 300,
    "000001.json": b"{}",
    "deep/000002.left.jpg": b"second",
    "deep/000002.right.jpg": b"third",
}


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def contents(media):
    found = {}
    for medium in media:
        with local_copy(medium) as path:
            found[medium.id] = path.read_bytes()
    return found


def test_members_are_read_by_their_offsets(tmp_path):
    media = find_media(write_tar(tmp_path / "a.tar", SAMPLE))
    wanted = {name: data for name, data in SAMPLE.items() if not name.endswith("json")}
    assert contents(media) == wanted
    assert [m.kind for m in media] == ["video", "image", "image"]
    whole = (tmp_path / "a.tar").read_bytes()
    assert all(whole[m.offset : m.offset + m.size] == wanted[m.id] for m in media)


def test_a_folder_and_its_tar_give_the_same_ids(tmp_path):
    for name, data in SAMPLE.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "in", ".")  # ./000001.mp4, as tar -C in -cf a.tar . names it
    tarred = sorted(m[:2] + m[3:4] for m in find_media(tmp_path / "a.tar"))
    assert tarred == [m[:2] + m[3:4] for m in find_media(tmp_path / "in")]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, form):
    members = {f"{'long' * 60}/ü {k}.mp4": bytes([k]) * 700 for k in range(3)}
    assert contents(find_media(write_tar(tmp_path / "a.tar", members, form))) == members


def test_links_hidden_files_and_repeated_names(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("a.mp4", b"old"), ("._a.mp4", b"?"), (".git/b.mp4", b"?")]:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for name, kind in [("hard.mp4", tarfile.LNKTYPE), ("soft.mp4", tarfile.SYMTYPE)]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a.mp4"
            tar.addfile(entry)
        entry = tarfile.TarInfo("a.mp4")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"newer"))
    assert contents(find_media(tmp_path / "a.tar")) == {"a.mp4": b"newer", "hard.mp4": b"old"}


def test_braces_and_patterns_find_tars_in_order(tmp_path):
    for k in range(12):
        write_tar(tmp_path / f"s-{k:03}.tar", {f"{11 - k:02}.mp4": bytes([k])})
    (tmp_path / "notes.txt").write_text("no list of media")
    wanted = [f"{11 - k:02}.mp4" for k in range(12)]
    assert [m.id for m in find_media(tmp_path / "s-{000..011}.tar")] == wanted
    assert [m.id for m in find_media(tmp_path / "s-*.tar")] == wanted
    assert [m.id for m in find_media(tmp_path / "s-00{3,1}.tar")] == ["08.mp4", "10.mp4"]
    paths = [tmp_path / "s-002.tar", tmp_path / "s-000.tar"]
    assert [m.id for m in find_media(paths)] == ["09.mp4", "11.mp4"]
    with pytest.raises(FileNotFoundError, match=r"no tar .*s-012\.tar"):
        find_media(tmp_path / "s-{000..012}.tar")
    with pytest.raises(ValueError, match=r"names no videos or images, but 12 \.tar: .*/\*\.tar"):
        find_media(tmp_path)


def test_one_name_in_two_tars_needs_a_root(tmp_path):
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", {"0.mp4": shard.encode()})
    with pytest.raises(ValueError, match=r"two media are called '0.mp4', in .*a.tar and in .*b.t"):
        find_media(tmp_path / "*.tar")
    media = find_media(tmp_path / "*.tar", root=tmp_path)
    assert contents(media) == {"a.tar/0.mp4": b"a", "b.tar/0.mp4": b"b"}


def test_a_compressed_tar_is_refused(tmp_path):
    for name in ("a.tar.gz", "a.tgz"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
        with pytest.raises(ValueError, match=rf"{name} is compressed.* make it a .tar"):
            find_media(tmp_path / name)


@pytest.mark.parametrize("cut", [0.25, 0.5, 0.75])
def test_what_is_left_of_a_damaged_tar_is_used_and_the_rest_is_missed(tmp_path, cut):
    members = {f"{k}.mp4": bytes([k]) * 2000 for k in range(8)}
    data = write_tar(tmp_path / "a.tar", members).read_bytes()
    end = int(8 * (512 + 2048) * cut)
    for kind in ("cut", "zeroed header"):
        left = data[:end] if kind == "cut" else data[:end] + b"x" * 512 + data[end + 512 :]
        (tmp_path / "a.tar").write_bytes(left)
        *media, tar = find_media(tmp_path / "a.tar")
        assert contents(media) == dict(list(members.items())[: int(8 * cut)]), kind
        assert tar == Medium(str(tmp_path / "a.tar"), "tar", str(tmp_path / "a.tar"), len(left))
        with pytest.raises(VideoError, match="cut off or damaged") as caught, local_copy(tar):
            pass
        assert caught.value.reason == "unreadable"


def test_the_member_that_is_cut_off_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.remote_files._WAITS", ())
    tar = write_tar(tmp_path / "a.tar", {"0.mp4": b"0" * 600, "1.mp4": b"1" * 600})
    tar.write_bytes(tar.read_bytes()[: 2 * 512 + 1024 + 100])
    whole, broken, damaged = find_media(tar)
    assert contents([whole]) == {"0.mp4": b"0" * 600}
    assert (broken.id, damaged.kind) == ("1.mp4", "tar")
    with pytest.raises(VideoError, match="ended after 100 of 600 bytes"):
        contents([broken])


def test_headers_that_lie_about_sizes(tmp_path):
    """A file of 8 EiB, of -1 bytes, and a long name of 8 EiB, each after a sound file."""
    sound = write_tar(tmp_path / "a.tar", {"0.mp4": b"0"}).read_bytes()[:1024]
    huge, negative = b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7, b"\xff" * 12
    for kind, size in [(b"0", huge), (b"0", negative), (b"L", huge)]:
        header = bytearray(tarfile.TarInfo("1.mp4").tobuf())
        header[124:136], header[156:157] = size, kind
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(sound + header + bytes(512))
        index = index_tar(str(tmp_path / "a.tar"))
        assert index.members[0] == ("0.mp4", 512, 1)
        assert index.damage


@pytest.mark.parametrize("data", [b"", b"no tar" * 1000])
def test_what_is_no_tar_at_all(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    assert [m.kind for m in find_media(tmp_path / "a.tar")] == ["tar"]


def test_an_empty_tar_names_nothing(tmp_path):
    assert index_tar(str(write_tar(tmp_path / "a.tar", {}))) == TarIndex([])
    with pytest.raises(ValueError, match="names no videos or images"):
        find_media(tmp_path / "a.tar")


def test_names_that_are_no_text_may_clash(tmp_path):
    names = [os.fsdecode(b"caf" + byte + b".mp4") for byte in (b"\xe8", b"\xe9")]
    one, both = (dict.fromkeys(part, b"1") for part in (names[:1], names))
    write_tar(tmp_path / "a.tar", one, tarfile.GNU_FORMAT)
    assert contents(find_media(tmp_path / "a.tar")) == {"caf\ufffd.mp4": b"1"}
    write_tar(tmp_path / "a.tar", both, tarfile.GNU_FORMAT)
    with pytest.raises(ValueError, match="two media are called 'caf\ufffd"):
        find_media(tmp_path / "a.tar")
