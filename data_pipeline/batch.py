# SPDX-License-Identifier: Apache-2.0
"""Batch: the one contract between the data pipeline and the model.

B rows, L token positions, C clip slots, F frames per clip, S square frame side (pixels),
Q visual tokens per clip.
"""

from typing import NamedTuple

import numpy as np

from data_pipeline.canvas import frame_shape

MODALITIES = ("text", "image", "video")  # of a sample: the last of these that is in it


class Batch(NamedTuple):
    """One training batch of static shape; absent modalities are masked, never missing."""

    tokens: np.ndarray  # i32[B, L]
    targets: np.ndarray  # i32[B, L], already shifted: the token that follows `tokens`
    loss_weights: np.ndarray  # f32[B, L], 0 on padding, prompts and visual positions
    positions: np.ndarray  # i32[B, L], restart at 0 in every segment
    segment_ids: np.ndarray  # i32[B, L], 0 = padding
    visual_index: np.ndarray  # i32[B, L], index into the row's C*Q visual tokens, -1 = text
    # u8[B, C, F, S, S, 3], RGB, or u8[B, C, F, S*S*3//2], YUV 4:2:0 planes: see canvas.py
    frames: np.ndarray
    frame_geometry: np.ndarray  # i32[B, C, 4]: top, left, height, width of the picture
    clip_mask: np.ndarray  # bool[B, C]
    clip_segment_ids: np.ndarray  # i32[B, C], the segment a clip belongs to, 0 = none
    # i32[B, L], of the sample: number of its source * 3 + that of its modality; 0 on padding
    groups: np.ndarray


def empty_batch(
    rows: int,
    length: int,
    clips: int,
    frames_per_clip: int,
    frame_size: int,
    layout: str = "rgb",
) -> Batch:
    """A batch that is all padding, to be filled in place (shapes as in `Batch`)."""
    row, frame = (rows, length), frame_shape(layout, frame_size)
    return Batch(
        tokens=np.zeros(row, np.int32),
        targets=np.zeros(row, np.int32),
        loss_weights=np.zeros(row, np.float32),
        positions=np.zeros(row, np.int32),
        segment_ids=np.zeros(row, np.int32),
        visual_index=np.full(row, -1, np.int32),
        frames=np.zeros((rows, clips, frames_per_clip, *frame), np.uint8),
        frame_geometry=np.zeros((rows, clips, 4), np.int32),
        clip_mask=np.zeros((rows, clips), np.bool_),
        clip_segment_ids=np.zeros((rows, clips), np.int32),
        groups=np.zeros(row, np.int32),
    )
