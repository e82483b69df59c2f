# SPDX-License-Identifier: Apache-2.0
"""What the model in training answers to a few held-out samples, beside what it should.

Written at every evaluation: samples.jsonl and samples.html in the workdir, pictures and texts to
TensorBoard. The weights are those of the state, not a copy.

n clips, F frames per clip, S canvas side.
"""

import base64
import io
import json
from collections import defaultdict
from functools import partial
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from apollo_jax import evaluation as reports
from apollo_jax.config import Experiment
from apollo_jax.inference.decoding import collate, generate_tokens
from apollo_jax.training import stages
from apollo_jax.training.boards import Boards, forget_after, whole_lines
from apollo_jax.training.state import TrainState, abstract_model, merge
from data_pipeline.data_config import DataConfig, sample_maker
from data_pipeline.samples import Sample
from data_pipeline.sources import Source, open_source
from data_pipeline.tokenizer import Tokenizer

SAMPLES, PAGE = "samples.jsonl", "samples.html"
MAX_NEW_TOKENS = 64
_FRAMES = 8  # of a sample that are shown
_LOOKED_AT = 64  # records of each source, at most


class Held(NamedTuple):
    """A held-out sample up to its first answer."""

    id: str
    source: str
    asked: str  # as the tokenizer spells the prompt, without the visual tokens
    reference: str
    tokens: np.ndarray  # i32[L] of the prompt
    visual_index: np.ndarray  # i32[L]
    frames: np.ndarray  # u8[n, F, S, S, 3]
    geometry: np.ndarray  # i32[n, 4]


def choose(experiment: Experiment) -> list[Held]:
    """The first samples of the held-out sources in turn; those that cannot be used are left out."""
    evaluation = experiment.evaluation
    maker = sample_maker(experiment.data)
    sources = {n: open_source(s, max_bad_share=1.0) for n, s in evaluation.sources.items()}
    held = (
        _held(name, source, index, maker, experiment.data)
        for index in range(_LOOKED_AT)
        for name, source in sources.items()
    )
    return list(islice((one for one in held if one is not None), evaluation.samples))


def _held(name: str, source: Source, index: int, maker: Any, data: DataConfig) -> Held | None:
    if index >= len(source):
        return None
    try:
        sample: Sample = maker.make(source[index])
        frames, geometry = _read(sample, data)
    except (ValueError, OSError):
        return None
    text = sample.text
    learnt = np.flatnonzero(text.loss_weights > 0)
    if not len(learnt) or not learnt[0]:
        return None  # a plain text: nothing is asked
    first = learnt[0]
    end = first + int(np.argmin(np.append(text.loss_weights[first:], 0.0) > 0))
    tokens, visual = text.tokens[:first], text.visual_index[:first]
    used = (visual.max() + 1) // data.tokens_per_clip  # clips of later turns are not shown yet
    tokenizer: Tokenizer = maker.tokenizer
    asked = tokenizer.decode(tokens[visual < 0])
    reference = tokenizer.decode(text.tokens[first:end])
    return Held(
        sample.id, name, asked.strip(), reference.strip(), tokens, visual,
        frames[:used], geometry[:used],
    )  # fmt: skip


def _read(sample: Sample, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Frames u8[n, F, S, S, 3] and geometry i32[n, 4] of a sample's clips."""
    shape = sample.clips, data.frames_per_clip, data.frame_size, data.frame_size, 3
    frames, geometry, at = np.zeros(shape, np.uint8), np.zeros((sample.clips, 4), np.int32), 0
    for store, media_id, wanted in sample.media:
        end = at + len(wanted)
        geometry[at:end] = store.read_clips(media_id, wanted, frames[at:end])
        at = end
    return frames, geometry


class Answers:
    """Asks the model in training and shows what it says."""

    def __init__(self, experiment: Experiment, workdir: Path, mesh: Mesh, start: int):
        self.workdir, self.held = workdir, choose(experiment)
        self.tokenizer = Tokenizer.from_path(experiment.data.tokenizer)
        rates = experiment.optimizer.learning_rates
        trained = stages.trained_components(rates)
        self.graphdef, _ = abstract_model(experiment.model, experiment.train, trained, mesh)
        self.pages = [_strip(one.frames) for one in self.held]
        forget_after(workdir / SAMPLES, start)

    def write(self, step: int, state: TrainState, boards: Boards) -> None:
        """What the model says after `step`."""
        if not self.held:
            return
        said = self._ask(merge(self.graphdef, state.params, state.frozen))
        with open(self.workdir / SAMPLES, "a") as file:
            for one, answer in zip(self.held, said, strict=True):
                facts = dict(id=one.id, source=one.source, asked=one.asked)
                told = {"step": step, **facts, "reference": one.reference, "answer": answer}
                file.write(json.dumps(told, ensure_ascii=False) + "\n")
        for number, (one, answer) in enumerate(zip(self.held, said, strict=True)):
            text = f"**asked** {one.asked}\n\n**answer** {answer}\n\n**reference** {one.reference}"
            boards.show(step, f"samples/{number}", self.pages[number], text)
        rows = map(json.loads, whole_lines(self.workdir / SAMPLES))
        (self.workdir / PAGE).write_text(_page(list(rows), self.held, self.pages))

    def _ask(self, model: Any) -> list[str]:
        clips = [len(one.frames) for one in self.held]
        visual: list[Any] = [None] * len(self.held)
        if sum(clips):
            count = 1 << (sum(clips) - 1).bit_length()
            frames, geometry = (
                np.concatenate([getattr(one, field) for one in self.held])
                for field in ("frames", "geometry")
            )
            pad = [(0, count - sum(clips))]
            frames = np.pad(frames, [*pad, *[(0, 0)] * 4])
            geometry = np.pad(geometry, [*pad, (0, 0)], mode="edge")
            encoded = np.asarray(_encode(*nnx.split(model), frames, geometry))
            parts = np.split(encoded[: sum(clips)], np.cumsum(clips)[:-1])
            visual = [part if len(part) else None for part in parts]
        rows = [
            (one.tokens, seen, one.visual_index)
            for one, seen in zip(self.held, visual, strict=True)
        ]
        stop = self.tokenizer.eos_id, self.tokenizer.pad_id
        tokens = generate_tokens(model, *collate(rows), stop=stop, max_new_tokens=MAX_NEW_TOKENS)
        return [self.tokenizer.decode(row[row >= 0]).strip() for row in np.asarray(tokens)]


def open_answers(experiment: Experiment, workdir: Path, mesh: Mesh, start: int) -> Answers | None:
    """Of a run that has done `start` steps; None if its config asks for none.

    Many processes would have to generate as one, which is not there: None too, and a word of it.
    """
    if not experiment.evaluation.every or not experiment.evaluation.samples:
        return None
    if jax.process_count() > 1:
        if jax.process_index() == 0:
            print("config.evaluation.samples: only a run of one process answers, this one has more")
        return None
    return Answers(experiment, workdir, mesh, start)


@partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, state: nnx.State, frames: Any, geometry: Any) -> Any:
    return nnx.merge(graphdef, state).encode_clips(jnp.asarray(frames), jnp.asarray(geometry))


def _strip(frames: np.ndarray) -> np.ndarray:
    """u8[S, k S, 3]: a few frames beside each other, one grey pixel if there is none."""
    flat = frames.reshape(-1, *frames.shape[2:])
    if not len(flat):
        return np.full((1, 1, 3), 128, np.uint8)
    chosen = np.linspace(0, len(flat) - 1, min(_FRAMES, len(flat))).round().astype(int)
    return np.concatenate(list(flat[chosen]), axis=1)


def _page(rows: list[dict], held: list[Held], pictures: list[np.ndarray]) -> str:
    """All answers so far, sample by sample, the latest first."""
    style = Path(str(reports.__file__)).with_name("report.css").read_text()
    by_sample = defaultdict(list)
    for row in reversed(rows):
        by_sample[row["source"], row["id"]].append(row)
    cards = []
    for one, picture in zip(held, pictures, strict=True):
        said = "".join(
            f'<br><span class="soft">step {row["step"]}</span> {escape(row["answer"])}'
            for row in by_sample[one.source, one.id]
        )
        cards.append(
            f'<div class="card"><h3>{escape(one.source)} <span class="soft">{escape(one.id)}</span>'
            f'</h3>{_image(picture)}<div class="qa"><pre>{escape(one.asked)}</pre>'
            f'<b>reference</b> <span class="right">{escape(one.reference)}</span>{said}</div></div>'
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>samples</title>'
        f"<style>{style}</style></head><body><h1>What the model answers</h1>{''.join(cards)}"
        "</body></html>\n"
    )


def _image(picture: np.ndarray) -> str:
    if picture.size <= 3:
        return ""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="strip" alt="frames" src="data:image/jpeg;base64,{data}">'
