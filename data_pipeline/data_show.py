# SPDX-License-Identifier: Apache-2.0
"""One sample as it reaches the model: its text, numbers, clip times and frames.

n tokens, c clips of F frames, S canvas side, Q visual tokens per clip.
"""

import difflib
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.data_config import DataConfig, sample_maker
from data_pipeline.samples import Sample
from data_pipeline.sizes import folder
from data_pipeline.sources import open_source
from data_pipeline.tokenizer import Tokenizer

_SHEET_CLIPS = 64  # rows of the picture, at most


def show(config: DataConfig, source_name: str | None, index: int, picture: Path) -> str:
    """What `index` of a source (default: the first) becomes; its frames go to `picture`, a PNG.

    Raises ValueError or FileNotFoundError for an unknown source or index, or a bad record.
    """
    name = _known(source_name, config)
    settings = config.sources[name]
    source = open_source(settings, index=folder(settings, config.sizes), max_bad_share=1.0)
    if not 0 <= index < len(source):
        raise ValueError(f"--index {index}: source {name!r} has records 0 to {len(source) - 1}")
    maker = sample_maker(config)
    record = source[index]
    try:
        sample = maker.make(record)
    except ValueError as error:
        raise ValueError(f"{name}[{index}], id {record.id}, makes no sample: {error}") from error
    tokens, learnt = len(sample.text.tokens), int((sample.text.loss_weights > 0).sum())
    lines = [
        f"{name}[{index}], id {sample.id}",
        f"{tokens} tokens of {config.length}, {learnt} of them learnt; {sample.clips} clips of "
        f"{config.clips}" + (" (trimmed)" if sample.trimmed else ""),
        *_media_lines(sample),
        "text, what is learnt in «»:",
        _text(sample, maker.tokenizer),
    ]
    if sample.clips:
        sheet = contact_sheet(sample, config)
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(picture)
        lines.append(f"frames, a clip per row: {picture}")
    return "\n".join(lines)


def _known(name: str | None, config: DataConfig) -> str:
    name = name or next(iter(config.sources), "")
    if name not in config.sources:
        near = difflib.get_close_matches(name, config.sources, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(config.sources)}"
        raise ValueError(f"no source {name!r} in config.data.sources; {hint}")
    return name


def _media_lines(sample: Sample) -> list[str]:
    lines = []
    for store, media_id, frames in sample.media:
        info = store.info(media_id)
        if info.kind == "image":
            lines.append(f"image {media_id}, {info.width}x{info.height}")
            continue
        times = [f"{a / info.fps:.1f}-{b / info.fps:.1f}" for a, b in frames[:, [0, -1]].tolist()]
        lines.append(
            f"video {media_id}, {info.width}x{info.height}, {info.duration:.1f} s; clips at "
            f"{', '.join(times)} s"
        )
    return lines


def _text(sample: Sample, tokenizer: Tokenizer) -> str:
    """The text the tokens spell; runs of visual positions in short."""
    text = sample.text
    visual, learnt = text.visual_index >= 0, text.loss_weights > 0
    change = np.flatnonzero((np.diff(visual) != 0) | (np.diff(learnt) != 0)) + 1
    spelt = ""
    for part in np.split(np.arange(len(text.tokens)), change):
        if visual[part[0]]:
            spelt += f"[{len(part)} visual tokens]"
            continue
        run = tokenizer.decode(text.tokens[part], skip_special=False)
        spelt += f"«{run}»" if learnt[part[0]] else run
    return spelt


def contact_sheet(sample: Sample, config: DataConfig) -> np.ndarray:
    """u8[min(c, 64) * S, F * S, 3]: the frames as the model gets them, a clip per row."""
    size, frames = config.frame_size, config.frames_per_clip
    clips = np.zeros((sample.clips, frames, size, size, 3), np.uint8)
    at = 0
    for store, media_id, wanted in sample.media:
        store.read_clips(media_id, wanted, clips[at : at + len(wanted)])
        at += len(wanted)
    rows = clips[:_SHEET_CLIPS]
    return rows.transpose(0, 2, 1, 3, 4).reshape(len(rows) * size, frames * size, 3)
