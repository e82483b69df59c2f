# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax shards`: what is stored is told, and no damage passes unnoticed."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipeline.contact_sheets import clock, grid_frames, read_strips
from data_pipeline.frame_records import MediaInfo, ShardSpec, encode_segments
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.frame_shards import FrameShards
from data_pipeline.predecode import PredecodeConfig, predecode
from data_pipeline.shards import listing, main, verify

CONFIG = PredecodeConfig(fps=2.0, size=128, workers=1, shard_bytes=60_000)


@pytest.fixture(scope="module")
def made(tmp_path_factory, videos):
    """Shards of real files: nine videos, a picture, and one that cannot be used."""
    root, output = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out") / "shards"
    (root / "deep").mkdir()
    for k in range(8):
        videos.write(root / f"{k}.mp4", count=30 + 60 * k, size=(96, 128))
    videos.write(root / "deep" / "vp9 é.webm", codec="libvpx-vp9", count=20)
    videos.damaged(root / "bad.mp4", "no_moov")
    Image.fromarray(videos.numbered_frame(9, 100, 60)).save(root / "p.png")
    predecode(root, output, CONFIG, progress=False)
    assert len(FrameShards(output).manifest["shards"]) > 2
    return output


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "shards")


def lines_of(folder, **options):
    return [str(problem) for problem in verify(folder, workers=1, **options)]


def medium(folder, media_id):
    """Its shard's number, and where the bytes of its records lie in the shard's file."""
    shards = FrameShards(folder)
    number = int(shards.index.columns["shard"][shards.index.find(media_id)])
    data = (folder / f"frames-{number:05d}.array_record").read_bytes()
    return number, data.index(b"id\xa5" + media_id.encode())


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_ls_lists_and_filters(made, capsys):
    main(["ls", str(made)])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 10
    assert out.splitlines()[0].split() == [
        "video", "128x96", "0:03.0", "7", "frames", "frames-00000", "0.mp4"
    ]  # fmt: skip
    assert "10 of 10 media" in err
    main(["ls", str(made), "deep/*", "*.png", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["id"], row["kind"]) for row in rows] == [
        ("deep/vp9 é.webm", "video"), ("p.png", "image")
    ]  # fmt: skip
    info = FrameShards(made).info("p.png")
    assert vars(info).items() <= rows[1].items()
    assert list(listing(FrameShards(made).index, ["nothing*"])) == []


def test_show_says_all_and_draws(made, tmp_path, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    main(["show", str(made), "7.mp4", "--output", str(sheet), "--every", "10"])
    out, err = capsys.readouterr()
    assert "num_frames     450" in out
    assert "0.000 0.500 1.000" in out
    assert "5 frames" in err
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.size[0] > 5 * 128
        pixels = np.asarray(image)
    # The third picture is of 20 s, source frame 200: 12 * 16 + 8, so two greys of 192 and 128.
    left = 4 + 2 * 132
    third = pixels[22 : 22 + 96, left : left + 128]
    assert abs(int(third[50, 20, 0]) - 192) < 8
    assert abs(int(third[50, 100, 0]) - 128) < 8

    main(["show", str(made), "--random", "4", "--output", str(sheet), "--json"])
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({known["id"] for known in shown}) == 4
    assert all(len(known["pts"]) == known["stored_frames"] for known in shown)
    with pytest.raises(ValueError, match=r"did you mean '7.mp4'"):
        main(["show", str(made), "7.mov"])
    with pytest.raises(ValueError, match="--random N"):
        main(["show", str(made)])
    with pytest.raises(ValueError, match=r"--every 0 is .*must be positive"):
        main(["show", str(made), "7.mp4", "--output", str(sheet), "--every", "0"])


def test_frames_of_a_sheet(made):
    with pytest.raises(ValueError, match="fewer media"):
        read_strips(FrameShards(made), {"7.mp4": [0] * 3000})
    assert grid_frames(10, 2.0, 4, None) == [1, 3, 6, 8]
    assert grid_frames(3, 2.0, 24, None) == [0, 1, 2]
    assert grid_frames(10, 2.0, 24, 1.5) == [0, 3, 6, 9]
    assert grid_frames(3, 2.0, 24, 0.1) == [0, 1, 2]
    assert [clock(s) for s in (0, 59.96, 61.25, 3723.4)] == [
        "0:00.0", "1:00.0", "1:01.2", "1:02:03.4"
    ]  # fmt: skip


def test_stats(made, capsys):
    main(["stats", str(made), "--json"])
    known = json.loads(capsys.readouterr().out)
    assert (known["videos"], known["images"], known["rejected"]) == (9, 1, {"no_moov": 1})
    assert known["frames"] == FrameShards(made).manifest["frames"]
    seconds = sum(3 + 6 * k for k in range(8)) + 2
    assert known["hours"] * 3600 == pytest.approx(seconds)
    assert sum(entry["videos"] for entry in known["durations"]) == 9
    assert sum(entry["hours"] for entry in known["durations"]) == pytest.approx(known["hours"])
    assert known["sizes"] == {"128x96": 8, "64x48": 1, "60x100": 1}
    assert known["bytes"] == sum(p.stat().st_size for p in made.glob("*.array_record"))
    main(["stats", str(made)])
    out = capsys.readouterr().out
    assert "9 videos, 1 images" in out
    assert "0:30.0 - 1:00.0" in out
    assert "no_moov" in out


def test_sound_shards_verify(made, capsys):
    assert verify(made, decode=True, workers=2) == []
    main(["verify", str(made), "--workers", "1"])
    out, err = capsys.readouterr()
    assert out == ""
    assert "shards, 0 problems" in err
    assert err.endswith("sound\n")


def test_a_flipped_byte_names_its_medium_alone(folder):
    number, at = medium(folder, "7.mp4")
    flip(folder / f"frames-{number:05d}.array_record", at + 2000)
    checksum, damaged = lines_of(folder)
    assert checksum.startswith(f"frames-{number:05d}.array_record: has another sha256")
    assert damaged.startswith(f"frames-{number:05d}.array_record: '7.mp4' is damaged")


@pytest.mark.parametrize("keep", [0, 70_000])
def test_a_truncated_shard_names_all_of_its_media(folder, keep):
    path = folder / "frames-00000.array_record"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    lines = lines_of(folder)
    assert lines[0].endswith(f"has {keep} bytes instead of {size}")
    lost = [line.split("'")[1] for line in lines if line.endswith("' cannot be read")]
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert lost == [row["id"] for row in sidecar["media"]]


def test_missing_and_extra_files_are_told(folder):
    (folder / "frames-00000.array_record").unlink()
    (folder / "frames-00001.json").unlink()
    shutil.copy(folder / "frames-00002.array_record", folder / "frames-00777.array_record")
    (folder / "frames-00000.array_record.0123.tmp").write_bytes(b"")
    lines = lines_of(folder)
    assert "frames-00000.array_record: is missing" in lines
    assert "frames-00000.array_record: '0.mp4' is lost" in lines
    assert "frames-00001.json: is missing" in lines
    assert "frames-00777.array_record: belongs to no shard of the set" in lines
    assert any("0123.tmp: is what a killed job left" in line for line in lines)


def test_an_index_that_does_not_fit(folder):
    path = folder / "index.npz"
    manifest = json.loads((folder / "manifest.json").read_text())
    with np.load(path) as index:
        columns = dict(index)

    def lines_with(**changes):
        np.savez(path, allow_pickle=False, **(columns | changes))
        manifest.pop("index_sha256", None)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return lines_of(folder)

    assert lines_with() == []
    later = columns["record"].copy()
    later[-1] += 1
    assert lines_with(record=later) == [
        f"index.npz: does not fit manifest.json: {FrameShards(folder).ids()[-1]!r} begins at a "
        "wrong record"
    ]
    frames = columns["stored_frames"] * 3
    assert "instead of 10 with" in lines_with(stored_frames=frames)[0]
    assert "unknown shards" in lines_with(shard=columns["shard"] + 50)[0]
    with pytest.raises(ValueError, match=r"does not fit manifest.json; `apollo-jax shards repair"):
        FrameShards(folder)
    names = bytes(columns["ids"]).decode().replace("0.mp4", "1.mp4").encode()
    assert "'1.mp4' is there twice" in lines_with(ids=np.frombuffer(names, np.uint8))[0]
    # What the sidecar and the index say of a medium must be the same.
    assert lines_with(fps=columns["fps"] + 1)[0].endswith(" and index.npz disagree")
    path.write_bytes(path.read_bytes()[:-100])
    assert lines_of(folder)[0].startswith("index.npz: is damaged")
    path.unlink()
    assert lines_of(folder) == ["index.npz: is missing"]


def test_a_manifest_of_another_making(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert "frames-00001.json: says sha256" in lines_of(folder)[0]
    manifest["index_sha256"] = "1" * 64
    path.write_text(json.dumps(manifest))
    assert lines_of(folder)[0].startswith("index.npz: is not the one that manifest.json names")
    for text in ("{", "{}", "[]", '{"format": "AFS1"}', path.read_text().replace("spec", "s")):
        path.write_text(text)
        assert lines_of(folder)[0].startswith("manifest.json: is damaged")
        with pytest.raises(ValueError, match=r"manifest.json is damaged .*shards repair"):
            FrameShards(folder)
    needed = {k: manifest[k] for k in ("format", "version", "spec", "shards")}
    path.write_text(json.dumps(needed))  # as another writer may make it
    assert len(FrameShards(folder)) == 10
    assert [line.partition(":")[0] for line in lines_of(folder)] == ["frames-00001.json"]
    for changes, message in (({"format": "AFS9"}, "format 'AFS9'"), ({"version": 9}, "update")):
        path.write_text(json.dumps(manifest | changes))  # of a later time, not damaged
        for read in (FrameShards, verify):
            with pytest.raises(ValueError, match=message):
                read(folder)


def test_unfinished_and_foreign_folders(folder, tmp_path):
    (folder / "manifest.json").unlink()
    (folder / "frames-00002.json").unlink()
    first, *others = lines_of(folder)
    assert first.startswith("manifest.json: is missing: ")
    assert "apollo-jax predecode" in first
    assert others == []
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.mp4").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="holds no frame shards"):
        verify(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        verify(tmp_path / "nowhere")


def test_a_frame_that_does_not_decode(tmp_path):
    """Right checksums over wrong bytes: only decoding can tell."""
    spec = ShardSpec(size=16)
    jpeg = spec.encode(np.zeros((16, 16, 3), np.uint8))
    writer = FrameShardWriter(tmp_path, spec)
    wrong = spec.encode(np.zeros((8, 16, 3), np.uint8))
    for name, frame in (("good", jpeg), ("nothing", b"no jpeg"), ("other size", wrong)):
        info = MediaInfo(name, "image", 1, 1.0, 0.0, 1, 1.0, 16, 16)
        writer.add(info, encode_segments(name, [frame], [0.0], (16, 16), spec))
    writer.close()
    assert lines_of(tmp_path) == []
    nothing, other = lines_of(tmp_path, decode=True)
    assert "'nothing' is damaged" in nothing
    assert "'other size' is damaged: frame 0 of segment 0 is of another size" in other


def test_as_a_user(folder):
    def run(*arguments):
        command = [sys.executable, "-m", "apollo_jax", "shards", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("verify", folder).returncode == 0
    number, at = medium(folder, "7.mp4")
    flip(folder / f"frames-{number:05d}.array_record", at + 2000)
    done = run("verify", folder, "--json")
    assert done.returncode == 1
    assert [json.loads(line)["media_id"] for line in done.stdout.splitlines()] == [None, "7.mp4"]
    assert "1 media damaged; `apollo-jax shards repair" in done.stderr
    done = run("show", folder, "7.mp4")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    done = run("ls", folder / "nowhere")
    assert done.returncode == 2
    assert "apollo-jax predecode" in done.stderr
