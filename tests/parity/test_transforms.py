# SPDX-License-Identifier: Apache-2.0
"""The float bicubic of the host path against torch, shrinking and enlarging."""

import numpy as np
import pytest

from data_pipeline.transforms import FrameSpec, resize

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("before", "after"), [(52, 24), (23, 40), (97, 13)])
def test_torch_bicubic(before, after):
    square = np.random.default_rng(0).integers(0, 256, (before, before, 3), np.uint8)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(square.transpose(2, 0, 1)[None] / np.float32(255)),
        size=(after, after),
        mode="bicubic",
        antialias=True,
    )
    spec = FrameSpec(after, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "torch_bicubic")
    ours = resize(square, spec) / 255
    np.testing.assert_allclose(ours, theirs[0].numpy().transpose(1, 2, 0), atol=2e-6)
