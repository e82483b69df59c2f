# SPDX-License-Identifier: Apache-2.0
"""Media inside records look exactly as they would after predecode, in both layouts."""

import numpy as np
import pytest
from PIL import Image

from data_pipeline.canvas import LAYOUTS, frame_shape
from data_pipeline.frame_shards import FrameShards
from data_pipeline.predecode import PredecodeConfig, predecode
from data_pipeline.record_media import RecordMedia

S = 32


def canvas(layout: str, clips: int = 1) -> np.ndarray:
    return np.full((clips, 4, *frame_shape(layout, S)), 99, np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of several kinds, one of them turned by its EXIF, and their shards."""
    folder = tmp_path_factory.mktemp("media")
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    (folder / "in").mkdir()
    Image.fromarray(noise).save(folder / "in" / "wide.png")
    Image.fromarray(noise[:, :20]).save(folder / "in" / "tall.jpg", quality=80)
    Image.fromarray(noise[:9, :11]).convert("RGBA").save(folder / "in" / "small.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise).save(folder / "in" / "turned.jpg", exif=turned)
    predecode(folder / "in", folder / "shards", PredecodeConfig(size=S, workers=1))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_is_as_predecoded(folder, layout):
    shards = FrameShards(folder / "shards")
    files = {path.name: path.read_bytes() for path in (folder / "in").iterdir()}
    media = RecordMedia(files)
    still = np.zeros((1, 4), np.int64)
    assert len(files) == 4
    for name in files:
        stored, inside = canvas(layout), canvas(layout)
        geometry = shards.read_clips(name, still, stored)
        np.testing.assert_array_equal(media.read_clips(name, still, inside), geometry)
        np.testing.assert_array_equal(inside, stored)
        assert media.info(name).kind == "image"
        assert name in media


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stored_frames_are_read_as_from_shards(folder, videos, layout, tmp_path):
    videos.write(tmp_path / "v.mp4")
    predecode(tmp_path, tmp_path / "shards", PredecodeConfig(size=S, fps=3.0, workers=1))
    shards = FrameShards(tmp_path / "shards")
    jpegs = [bytes(jpeg) for _, part in shards.segments("v.mp4") for jpeg in part]
    media = RecordMedia({}, {"v.mp4": (shards.info("v.mp4"), jpegs)})
    assert media.info("v.mp4") == shards.info("v.mp4")
    frames = np.array([[0, 1, 2, 39], [17, 18, 30, 99]])
    stored, inside = canvas(layout, 2), canvas(layout, 2)
    geometry = shards.read_clips("v.mp4", frames, stored)
    np.testing.assert_array_equal(media.read_clips("v.mp4", frames, inside), geometry)
    np.testing.assert_array_equal(inside, stored)
    with pytest.raises(ValueError, match=r"'v\.mp4' is stored at 24x32, larger than the 16-pixel"):
        media.read_clips("v.mp4", frames, np.zeros((2, 4, 16, 16, 3), np.uint8))


def test_what_is_no_image_is_named(folder):
    whole = (folder / "in" / "tall.jpg").read_bytes()
    media = RecordMedia({"a#0": b"no image", "a#1": whole[: len(whole) // 2]})
    with pytest.raises(ValueError, match="'a#0' is no image"):
        media.info("a#0")
    with pytest.raises(ValueError, match="'a#1' is damaged"):
        media.read_clips("a#1", np.zeros((1, 4), np.int64), canvas("rgb"))
