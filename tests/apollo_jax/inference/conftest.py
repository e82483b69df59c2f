# SPDX-License-Identifier: Apache-2.0
"""The tiny official checkpoint with what PyTorch made of it, and video files to ask about."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from apollo_jax.checkpoints.pretrained import from_pretrained
from apollo_jax.inference.processor import Processor
from apollo_jax.models.apollo import Apollo

TINY = Path(__file__).parents[2] / "fixtures" / "apollo-tiny-a"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return TINY / "checkpoint"


@pytest.fixture(scope="session")
def official() -> dict[str, np.ndarray]:
    """Every intermediate of the official PyTorch code for one video and question."""
    return dict(np.load(TINY / "fixture.npz"))


@pytest.fixture(scope="session")
def image() -> dict[str, np.ndarray]:
    """The same for one image."""
    return dict(np.load(TINY / "image.npz"))


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Apollo:
    loaded = from_pretrained(checkpoint)
    assert isinstance(loaded, Apollo)
    return loaded


@pytest.fixture(scope="session")
def processor(checkpoint: Path) -> Processor:
    return Processor.from_pretrained(checkpoint)


@pytest.fixture
def write_video(tmp_path: Path) -> Callable[..., Path]:
    """A lossless mp4 of u8[T, h, w, 3] frames."""

    def write(frames: np.ndarray, fps: float, name: str = "video.mp4") -> Path:
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264rgb", Fraction(fps), {"qp": "0"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode())
        return tmp_path / name

    return write


@pytest.fixture
def video(official: dict[str, np.ndarray], write_video: Callable[..., Path]) -> Path:
    """The official fixture's video as a file, without loss."""
    return write_video(official["video"], float(official["fps"]))
