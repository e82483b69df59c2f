# SPDX-License-Identifier: Apache-2.0
"""Conversations and their frame shards as a TensorFlow Dataset, built and read without TensorFlow.

    apollo-jax data tfds --input DATA --output TFDS [--frames]

DATA holds a file of conversations per split (`train.jsonl`, `validation.json`, ..) and `frames`,
the folder that `apollo-jax predecode` made. Config `names` leaves the frames in their shards;
`frames` has them inside, as they are stored, for those who know TFDS but not our shards. Where
TensorFlow, Beam and mlcroissant are installed, TFDS's own command builds both:

    tfds build --imports data_pipeline.tfds_video_conversations video_conversations \\
        --manual_dir DATA --data_dir TFDS --file_format array_record
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_pipeline.frame_shards import FrameShards
from data_pipeline.sources import JsonlSource


class VideoConversations(tfds.core.GeneratorBasedBuilder):
    """Questions and answers about videos and images that are frames on a constant-fps grid."""

    code_path = None  # nothing is looked for beside it (where TFDS 4.9.10 lacks a dependency)
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="names", description="media by name, in frame shards"),
        tfds.core.BuilderConfig(name="frames", description="media with their frames"),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "SPLIT.jsonl or SPLIT.json per split, and frames/, their shards"

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = {
            "id": text(),
            "sampling": text(),
            "turns": tfds.features.Sequence({"role": text(), "text": text()}),
            "media": tfds.features.Sequence(
                {
                    "kind": text(),
                    "id": text(),
                    "num_frames": np.int64,
                    "fps": np.float64,
                    "duration": np.float64,
                    "stored_fps": np.float64,
                    "stored_frames": np.int64,
                    "height": np.int64,
                    "width": np.int64,
                }
            ),
        }
        if self._with_frames:
            # Those of all media in a row: lists of lists cannot be written without TensorFlow.
            image = tfds.features.Image(encoding_format="jpeg")
            features["frames"] = tfds.features.Sequence(image)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    @property
    def _with_frames(self) -> bool:
        assert self.builder_config is not None
        return self.builder_config.name == "frames"

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        folder = Path(dl_manager.manual_dir)
        shards = FrameShards(folder / "frames")
        return {path.stem: self._generate_examples(path, shards) for path in _files(folder)}

    def _generate_examples(self, path: Path, shards: FrameShards) -> Iterator[tuple[int, dict]]:
        source = JsonlSource(path)
        for number in range(len(source)):
            record = source[number]
            infos = [shards.info(medium.id) for medium in record.media]
            example = {
                "id": record.id,
                "sampling": record.sampling,
                "turns": [{"role": turn.role, "text": turn.text} for turn in record.turns],
                "media": [asdict(info) for info in infos],
            }
            if self._with_frames:
                segments = (s for info in infos for s in shards.segments(info.id))
                example["frames"] = [bytes(jpeg) for _, jpegs in segments for jpeg in jpegs]
            yield number, example


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in (".jsonl", ".json")]


def build(source: str | Path, output: str | Path, *, frames: bool = False) -> Path:
    """Builds the dataset of the folder `source` below `output`, and returns where it is.

    What is there already stays. Raises ValueError or FileNotFoundError for faulty input.
    """
    source = Path(source).absolute()
    if not (source.is_dir() and _files(source)):
        raise FileNotFoundError(f"{source} is no folder with SPLIT.jsonl or SPLIT.json files")
    name = "frames" if frames else "names"
    builder = VideoConversations(data_dir=str(output), config=name, file_format="array_record")
    how = tfds.download.DownloadConfig(manual_dir=str(source), try_download_gcs=False)
    builder.download_and_prepare(download_config=how)
    return Path(builder.data_dir)
