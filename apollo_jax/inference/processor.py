# SPDX-License-Identifier: Apache-2.0
"""Processor: a video or image file and a question to what the model takes, as the official code.

n clips, F frames per clip, T source frames, h x w their pixels, I an encoder's image side,
Q visual tokens per clip, L prompt tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from apollo_jax.checkpoints import run, weights_folder
from apollo_jax.checkpoints.pretrained import config_from_pretrained
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.models import apollo
from data_pipeline.conversation import (
    PLACEHOLDER,
    MediaClips,
    Rendered,
    Turn,
    ask,
    prompt_text,
    render,
)
from data_pipeline.image_files import read_image
from data_pipeline.sampling import ClipSampling, SampledClips, clip_sampling_ratio, sample_clips
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.transforms import FrameSpec, preprocess
from data_pipeline.video import iter_frames, probe

VISUAL_SHARE = 0.65  # of the context, the published default
MEDIA_SHARE = 0.9  # of the context, for the clips and the text between them


@dataclass(frozen=True)
class Media:
    """One video or image, sampled and preprocessed."""

    clips: MediaClips
    frame_indices: np.ndarray  # i64[n, F], frame numbers of the source
    pixels: dict[str, np.ndarray]  # per tower f32[n, F, I, I, 3]


@dataclass(frozen=True)
class Example:
    """One prompt, ready for the model; without media no clips and no pixels."""

    prompt: str
    tokens: np.ndarray  # i32[L]
    visual_index: np.ndarray  # i32[L], 0 .. n*Q-1 in order, -1 on text
    pixels: dict[str, np.ndarray]  # per tower f32[n, F, I, I, 3], normalised for it
    clip_indices: np.ndarray  # i64[n, F], frame numbers of the source
    timestamps: np.ndarray  # f64[n, 2], seconds


@dataclass(frozen=True)
class Processor:
    """Samples, decodes, preprocesses and renders; `dataclasses.replace` changes the sampling."""

    tokenizer: Tokenizer
    towers: Mapping[str, FrameSpec]
    tokens_per_clip: int
    max_length: int  # tokens the model was trained to read
    sampling: ClipSampling
    visual_share: float = VISUAL_SHARE  # of max_length that the clips of a video may take

    @classmethod
    def from_config(
        cls, config: apollo.Config, tokenizer: Tokenizer, sampling: ClipSampling | None = None
    ) -> "Processor":
        """The processor of a model; `sampling` defaults to its clips at constant fps."""
        return cls(
            tokenizer,
            {name: tower.frame_spec for name, tower in config.towers.items()},
            config.connector.num_output_tokens,
            config.llm.model_max_length,
            sampling
            or ClipSampling(
                clip_duration=config.clip_duration, frames_per_clip=config.frames_per_clip
            ),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Processor":
        """The processor of an official folder, or of a training run with the run's sampling.

        Raises FileNotFoundError or ValueError naming what is missing or unknown there.
        """
        folder, sampling = Path(path), None
        if run.is_run(folder):
            data = run.read_experiment(folder).data
            sampling = ClipSampling(
                data.sampling_mode,
                data.clip_duration,
                data.frames_per_clip,
                min(data.max_clips or data.clips, data.clips),
                data.uniform_frames,
            )
            folder = folder / run.TOKENIZER
        elif weights_folder.is_weights(folder):
            folder = folder / weights_folder.PUBLISHED / layout.LLM
        config = config_from_pretrained(path)
        if not isinstance(config, apollo.Config):
            part = type(config).__module__.rpartition(".")[2]
            raise ValueError(f"{path} holds {part}, not a whole Apollo")
        return cls.from_config(config, Tokenizer.from_path(folder), sampling)

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.tokenizer.eos_id, self.tokenizer.pad_id

    def __call__(
        self,
        video: str | Path | None = None,
        *,
        prompt: str,
        image: str | Path | None = None,
        frames: np.ndarray | None = None,
        fps: float | None = None,
    ) -> Example:
        """A question about a video or image file, about decoded frames, or about nothing.

        Args:
          prompt: the question; <video> or <image> in it says where the medium stands (default:
            in front).
          frames: u8[T, h, w, 3] RGB, in place of a file, at `fps` frames per second.
        Raises:
          FileNotFoundError, ValueError: naming the file, or what does not fit the prompt.
        """
        media = self.media(video, image=image, frames=frames, fps=fps)
        turns = [question(prompt, media)]
        rendered = self.render(turns, media)
        clips = [] if media is None else [media.clips]
        return Example(
            prompt_text(turns, clips, self.tokens_per_clip),
            rendered.tokens,
            rendered.visual_index,
            {} if media is None else media.pixels,
            np.zeros((0, self.sampling.frames_per_clip), np.int64)
            if media is None
            else media.frame_indices,
            np.zeros((0, 2)) if media is None else media.clips.timestamps,
        )

    def media(
        self,
        video: str | Path | None = None,
        *,
        image: str | Path | None = None,
        frames: np.ndarray | None = None,
        fps: float | None = None,
    ) -> Media | None:
        """The clips of one medium (arguments as in `__call__`), None without one."""
        given = {"video": video, "image": image, "frames": frames}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"give one of video, image and frames, not {' and '.join(names)}")
        if image is not None:
            return self._image(read_image(image))
        if video is not None:
            info = probe(video)
            sampled = self.sample(info.fps, info.num_frames, info.duration)
            shown = ((i, frame) for i, frame, _ in iter_frames(video, sampled.frame_indices))
            return self._video(sampled, shown, info.duration)
        if frames is not None:
            if fps is None or fps <= 0:
                raise ValueError(f"frames need their fps to be sampled, got fps={fps}")
            sampled = self.sample(fps, len(frames), len(frames) / fps)
            shown = ((i, frames[i]) for i in np.unique(sampled.frame_indices).tolist())
            return self._video(sampled, shown, len(frames) / fps)
        return None

    def sample(self, fps: float, num_frames: int, duration: float) -> SampledClips:
        """The clips of a video that fit `visual_share` of the context."""
        clip_duration = self.sampling.clip_duration
        ratio = clip_sampling_ratio(
            duration, self.max_length, self.visual_share, self.tokens_per_clip, clip_duration
        )
        sampling = self.sampling
        while True:
            sampled = sample_clips(
                sampling, fps=fps, num_frames=num_frames, duration=duration, ratio=ratio
            )
            # The published rule forgets that the times beside the clips are tokens too. With few
            # visual tokens per clip they are the greater part, and fewer clips must do.
            clips = [MediaClips("video", sampled.timestamps, duration, clip_duration)]
            prompt = render([ask("", clips)], clips, self.tokenizer, self.tokens_per_clip)
            length, room = len(prompt.tokens), MEDIA_SHARE * self.max_length
            count = len(sampled.timestamps)
            if length <= room or count == 1:
                return sampled
            sampling = replace(sampling, max_clips=max(1, int(count * room / length)))

    def render(self, turns: Sequence[Turn], media: Media | None) -> Rendered:
        """Tokens of a conversation about `media`; ValueError if they exceed the context."""
        clips = [] if media is None else [media.clips]
        rendered = render(turns, clips, self.tokenizer, self.tokens_per_clip)
        if len(rendered.tokens) > self.max_length:
            visual = int((rendered.visual_index >= 0).sum())
            raise ValueError(
                f"the prompt has {len(rendered.tokens)} tokens ({visual} of them visual), but the "
                f"model reads at most {self.max_length}: shorten the text or the video"
            )
        return rendered

    def _video(
        self, sampled: SampledClips, frames: Iterable[tuple[int, np.ndarray]], duration: float
    ) -> Media:
        indices = sampled.frame_indices
        pixels = {
            name: np.empty((*indices.shape, spec.size, spec.size, 3), np.float32)
            for name, spec in self.towers.items()
        }
        # Frame by frame: all frames of a long video at full size would not fit the memory.
        for index, frame in frames:
            for name, spec in self.towers.items():
                pixels[name][indices == index] = preprocess(frame[None], spec)
        clips = MediaClips("video", sampled.timestamps, duration, self.sampling.clip_duration)
        return Media(clips, indices, pixels)

    def _image(self, frame: np.ndarray) -> Media:
        """An image is one clip that shows it F times."""
        count = self.sampling.frames_per_clip
        pixels = {
            name: np.repeat(preprocess(frame[None], spec)[None], count, axis=1)
            for name, spec in self.towers.items()
        }
        clips = MediaClips("image", np.zeros((1, 2)))
        return Media(clips, np.zeros((1, count), np.int64), pixels)


def question(prompt: str, media: Media | None) -> Turn:
    """The user's turn about `media`, wherever <video> or <image> stands in it (default: first)."""
    placeholders = PLACEHOLDER.findall(prompt)
    given = [] if media is None else [media.clips.kind]
    if not placeholders:
        return ask(prompt, [] if media is None else [media.clips])
    if placeholders != given:
        raise ValueError(
            f"the prompt speaks of {', '.join(f'<{p}>' for p in placeholders)} but "
            f"{' and '.join(given) or 'neither video nor image'} was given"
        )
    return Turn("user", prompt)
