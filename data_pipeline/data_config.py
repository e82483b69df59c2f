# SPDX-License-Identifier: Apache-2.0
"""What the loader is told: sources, shards, the shape of a batch, and how it is read.

B rows of the global batch, L tokens and C clip slots per row, F frames per clip, S canvas side,
Q visual tokens per clip.
"""

from dataclasses import dataclass

from data_pipeline.canvas import frame_shape
from data_pipeline.frame_shards import FrameShards
from data_pipeline.samples import SampleMaker
from data_pipeline.sampling import ClipSampling
from data_pipeline.sources import SourceConfig
from data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True)
class DataConfig:
    sources: dict[str, SourceConfig]
    frames: tuple[str, ...]  # folders of frame shards; the first that holds a medium is read
    tokenizer: str  # path, see tokenizer.py
    batch_size: int  # B, rows over all processes
    length: int  # L
    clips: int  # C
    frame_size: int  # S
    tokens_per_clip: int  # Q
    frames_per_clip: int = 4  # F
    clip_duration: float = 2.0  # seconds
    max_clips: int = 0  # per video, 0 = as many as a row holds
    sampling_mode: str = "fps"
    uniform_frames: int = 0
    weight_by: str = "samples"  # what the sources' weights are shares of: 'samples' | 'tokens'
    seed: int = 0
    max_bad_share: float = 0.01  # of all samples; more stop the run
    layout: str = "rgb"  # of the frames: 'rgb' | 'yuv420', see batch.py
    sizes: str = ""  # folder of what `data check` measured; "" = beside each source
    threads: int = 2
    prefetch: int = 4  # batches


def sample_maker(config: DataConfig) -> SampleMaker:
    """What makes samples as `config` says; FileNotFoundError or ValueError for wrong paths."""
    shards = [FrameShards(path) for path in config.frames]
    frame_shape(config.layout, config.frame_size)
    for folder in shards:
        folder.check_layout(config.layout)
        folder.check_size(config.frame_size)
    return SampleMaker(
        shards=shards,
        tokenizer=Tokenizer.from_path(config.tokenizer),
        sampling=ClipSampling(
            mode=config.sampling_mode,
            clip_duration=config.clip_duration,
            frames_per_clip=config.frames_per_clip,
            max_clips=config.max_clips,
            uniform_frames=config.uniform_frames,
        ),
        tokens_per_clip=config.tokens_per_clip,
        length=config.length,
        clips=config.clips,
    )
