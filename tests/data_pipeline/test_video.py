# SPDX-License-Identifier: Apache-2.0
"""Decoding real files of every codec and every kind of damage, made on the spot with PyAV."""

import io
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline.image_files import read_image
from data_pipeline.video import VideoError, decode_frames, iter_frames, probe


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("h264.mp4", "libx264"),
        ("h264.ts", "libx264"),
        ("hevc.mp4", "libx265"),
        ("vp9.webm", "libvpx-vp9"),
        ("av1.mkv", "libsvtav1"),
        ("mpeg4.avi", "mpeg4"),  # its packets have no times
    ],
)
def test_frames_are_found_by_number_in_every_codec(videos, tmp_path, name, codec):
    path = videos.write(tmp_path / name, codec=codec)
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.rotation) == (40, 48, 64, 0)
    assert info.fps == pytest.approx(10, rel=0.01)
    assert info.duration == 40 / info.fps
    for wanted in ([0], [39], [25, 3, 3, 39, 11], list(range(40))):
        frames = decode_frames(path, wanted)
        assert frames.shape == (len(wanted), 48, 64, 3)
        assert [videos.number_of(f) for f in frames] == wanted


def test_only_wanted_frames_are_decoded(videos, tmp_path, monkeypatch):
    """Far apart frames are reached by seeking: a long video costs no more than its keyframes."""
    path = videos.write(tmp_path / "long.mp4", count=250, gop=10)
    import data_pipeline.video as video

    decoded = []
    original = video.decoded_frames
    monkeypatch.setattr(
        video, "decoded_frames", lambda *a: (decoded.append(f) or f for f in original(*a))
    )
    got = [(i, videos.number_of(f), round(t, 6)) for i, f, t in iter_frames(path, [200, 5, 101])]
    assert got == [(5, 5, 0.5), (101, 101, 10.1), (200, 200, 20.0)]
    assert len(decoded) < 20


def test_variable_frame_rate(videos, tmp_path):
    pts = [0, 33, 66, 100, 1500, 1600, 1633, 4000, 4033, 4100]
    path = videos.write(tmp_path / "vfr.mkv", count=10, pts=pts)
    info = probe(path)
    assert info.num_frames == 10
    assert info.fps == pytest.approx(9 / 4.1, rel=0.01)  # though the header says 10
    got = [(i, videos.number_of(f), round(1000 * t)) for i, f, t in iter_frames(path, [2, 4, 7, 9])]
    assert got == [(2, 2, 66), (4, 4, 1500), (7, 7, 4000), (9, 9, 4100)]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_applied_as_opencv_does(videos, tmp_path, degrees):
    path = videos.write(tmp_path / "phone.mp4", count=3)
    videos.rotate(path, degrees)
    ours = decode_frames(path, [1])[0]
    reader = cv2.VideoCapture(str(path))
    reader.read()
    theirs = reader.read()[1][..., ::-1]
    info = probe(path)
    assert (info.height, info.width) == ours.shape[:2] == theirs.shape[:2]
    assert info.rotation in (degrees, 360 - degrees)
    assert np.abs(ours.astype(int) - theirs).mean() < 3


def test_titles_in_an_unknown_encoding_are_no_obstacle(videos, tmp_path):
    path = videos.write(tmp_path / "titled.mp4", count=2, title="abcdefgh")
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"\xff\xfe\xe9bcdef"))
    assert probe(path).num_frames == 2


def test_sample_aspect_ratio_is_applied(videos, tmp_path):
    path = videos.write(tmp_path / "anamorphic.mp4", count=2, aspect=Fraction(4, 3))
    assert decode_frames(path, [0]).shape == (1, 48, 85, 3)
    assert probe(path).width == 85


def test_odd_sizes_and_a_single_frame(videos, tmp_path):
    path = videos.write(tmp_path / "odd.mp4", count=1, size=(37, 53))
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (1, 37, 53)
    assert decode_frames(path, [0, 0, 0, 0]).shape == (4, 37, 53, 3)


def test_colours_survive_both_matrices(videos, tmp_path):
    """BT.601 and BT.709 files show the same red."""
    for space, name in ((1, "bt709"), (5, "bt601")):
        path = tmp_path / f"{name}.mp4"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("libx264", rate=10, options={"crf": "5"})
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            stream.codec_context.colorspace = space
            stream.codec_context.color_range = 1
            picture = np.broadcast_to(np.array([200, 60, 30], np.uint8), (32, 32, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=space)
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        colour = decode_frames(path, [0])[0, 16, 16].astype(int)
        assert np.abs(colour - [200, 60, 30]).max() < 5, name


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_a_truncated_file_is_its_readable_part(videos, tmp_path, name):
    path = tmp_path / name
    videos.write(path, faststart=name == "cut.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    info = probe(path)
    assert 5 < info.num_frames < 40
    wanted = [0, info.num_frames // 2, info.num_frames - 1]
    numbers = [videos.number_of(f) for f in decode_frames(path, wanted)]
    assert numbers[:2] == wanted[:2]
    assert abs(numbers[2] - wanted[2]) < 5  # around the cut B frames lack their references


@pytest.mark.parametrize(
    "reason", ["missing", "empty", "unreadable", "no_moov", "no_video_stream", "corrupt"]
)
def test_unusable_files_say_why(videos, tmp_path, reason):
    path = videos.damaged(tmp_path / "file.mp4", reason)
    with pytest.raises(VideoError, match=r"file.mp4: .*\S") as caught:
        decode_frames(path, range(probe(path).num_frames))
    assert caught.value.reason == reason


def test_a_frame_that_does_not_exist_is_an_error(videos, tmp_path):
    path = videos.write(tmp_path / "video.mp4", count=5)
    for index in (5, -1):
        with pytest.raises(ValueError, match="frames 0 to 4"):
            decode_frames(path, [0, index])


def test_images(videos, tmp_path):
    picture = videos.numbered_frame(7, 37, 53)
    Image.fromarray(picture).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), picture)

    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to display
    Image.fromarray(picture).save(tmp_path / "phone.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "phone.png"), np.rot90(picture, -1))

    (tmp_path / "text.png").write_text("no image")
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        data, "JPEG"
    )
    (tmp_path / "half.jpg").write_bytes(data.getvalue()[:1500])
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, reason in {
        "text.png": "unreadable", "half.jpg": "corrupt", "empty.jpg": "empty", "no.jpg": "missing"
    }.items():  # fmt: skip
        with pytest.raises(VideoError, match=name) as caught:
            read_image(tmp_path / name)
        assert caught.value.reason == reason
