# SPDX-License-Identifier: Apache-2.0
"""ApolloBench-mini: the synthetic world as real files, for training and for evaluation.

    videos/{train,test}/*.mp4   64x64, 8 fps, h264
    images/*.png
    train/{captions_video,captions_image,multi_image,text,qa_video}.jsonl   conversations
    test.jsonl                  the benchmark: id, video, question, options, answer, category, ...

What the words mean is taught by still images with captions; what a question asks, and to say one
of its options, by text alone; the rest needs the videos.
"""

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image

from apollo_jax.evaluation import pictures, scenes
from apollo_jax.evaluation.multiple_choice import Question, question_text
from apollo_jax.evaluation.scenes import make_scene

CENTRE_SHARE = TEXT_SHARE = 0.08  # training records of the two control modalities
DESCRIBE = "Describe the video."
_TRAIN, _TEST, _IMAGE, _TEXT = range(4)  # independent random streams


def write_world(
    out: Path,
    *,
    train_scenes: int = 3600,
    test_scenes_per_family: int = 50,
    seed: int = 0,
    workers: int = 2,
) -> None:
    """Write the whole world below `out`. The files depend on the sizes and the seed alone."""
    out = Path(out)
    for folder in ("videos/train", "videos/test", "images", "train"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    num_images = train_scenes // 2
    num_test = test_scenes_per_family * len(scenes.FAMILIES)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        run = partial(pool.map, chunksize=32)
        train = list(run(partial(_train_scene, out, seed), range(train_scenes)))
        test = list(run(partial(_test_scene, out, seed), range(num_test)))
        captions = list(run(partial(_still, out, seed), range(num_images)))
    images = [
        _record(f"image_{i:05d}", ("<image>\nDescribe the image.", caption), image=_image_path(i))
        for i, caption in enumerate(captions)
    ]
    _write_lines(out / "train/captions_video.jsonl", (record["caption"] for record in train))
    _write_lines(out / "train/qa_video.jsonl", (qa for record in train for qa in record["qa"]))
    _write_lines(out / "train/captions_image.jsonl", images)
    _write_lines(out / "train/multi_image.jsonl", _multi_image(captions, seed))
    notes = (note for record in train for note in record["notes"])
    _write_lines(out / "train/text.jsonl", [*notes, *_bindings(train_scenes, seed)])
    _write_lines(out / "test.jsonl", (question for scene in test for question in scene))


def write_video(path: Path, frames: np.ndarray, fps: int = scenes.FPS) -> None:
    """Encode frames u8[T, H, W, 3] as h264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "18", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _train_scene(out: Path, seed: int, index: int) -> dict:
    """Write one training video; its caption, its questions, and those about the caption."""
    rng = np.random.default_rng((seed, _TRAIN, index))
    family = scenes.FAMILIES[index % len(scenes.FAMILIES)]
    scene = make_scene(family, rng)
    name, video = f"{family}_{index:05d}", f"videos/train/{family}_{index:05d}.mp4"
    write_video(out / video, scene.frames)
    turns = [(question_text(q, scenes.PROMPT), q.options[q.answer]) for q in scene.questions]
    qa = [_question(f"{name}_{i}", turn, video, rng) for i, turn in enumerate(turns)]
    caption = _record(name, *_seen([(DESCRIBE, scene.caption)]), video=video)
    notes = [
        _record(f"{name}_note_{i}", (f"Note: {scene.caption}\n{question}", answer))
        for i, (question, answer) in enumerate(turns)
    ]
    return {"caption": caption, "qa": qa, "notes": notes}


def _question(name: str, turn: tuple[str, str], video: str, rng: np.random.Generator) -> dict:
    """A conversation of one question: of two, the second would be told by the first answer."""
    control = rng.random()
    if control < TEXT_SHARE:  # must guess: the text-only control is in distribution
        return _record(f"{name}_text", turn)
    if control < TEXT_SHARE + CENTRE_SHARE:
        return _record(f"{name}_centre", *_seen([turn]), video=video, sampling="centre")
    return _record(f"{name}_qa", *_seen([turn]), video=video)


def _test_scene(out: Path, seed: int, index: int) -> list[dict]:
    """Write one test video; its questions, the place of the right option going round evenly."""
    rng = np.random.default_rng((seed, _TEST, index))
    family = scenes.FAMILIES[index % len(scenes.FAMILIES)]
    scene = make_scene(family, rng)
    name = f"{family}_{index // len(scenes.FAMILIES):04d}"
    write_video(out / f"videos/test/{name}.mp4", scene.frames)
    first = index // len(scenes.FAMILIES) * len(scene.questions)
    records = []
    for i, question in enumerate(scene.questions):
        question = _with_answer_at(question, (first + i) % len(question.options))
        question = dataclasses.replace(question, id=f"{name}_{i}", video=f"videos/test/{name}.mp4")
        fields = {k: v for k, v in dataclasses.asdict(question).items() if v != ""}
        records.append(fields | {"caption": scene.caption})
    return records


def _with_answer_at(question: Question, place: int) -> Question:
    options = list(question.options)
    options[place], options[question.answer] = options[question.answer], options[place]
    return dataclasses.replace(question, options=tuple(options), answer=place)


def _image_path(index: int) -> str:
    return f"images/{index:05d}.png"


def _still(out: Path, seed: int, index: int) -> str:
    frame, caption = pictures.draw_still(np.random.default_rng((seed, _IMAGE, index)))
    Image.fromarray(frame).save(out / _image_path(index), compress_level=1)
    return caption


def _multi_image(captions: list[str], seed: int) -> Iterable[dict]:
    """Two or three of the images, described in order."""
    rng = np.random.default_rng((seed, _IMAGE, len(captions)))
    for i in range(len(captions) // 4):
        chosen = rng.choice(len(captions), rng.integers(2, 4), replace=False).tolist()
        answer = " then ".join(captions[j] for j in chosen)
        turn = ("<image>\n" * len(chosen) + "Describe the images.", answer)
        yield _record(f"images_{i:05d}", turn, images=[_image_path(j) for j in chosen])


def _bindings(number: int, seed: int) -> Iterable[dict]:
    """Text that teaches to say one of the options, with the words of every family."""
    rng = np.random.default_rng((seed, _TEXT))
    words = [pictures.COLORS, pictures.DIGITS, pictures.PLACES, scenes.DIRECTIONS]
    words = [list(group) for group in (*words, scenes.NUMBERS, scenes.PERIODS, scenes.LENGTHS)]
    for i in range(number):
        options = rng.choice(words[rng.integers(len(words))], 4, replace=False).tolist()
        answer = int(rng.integers(4))
        question = Question("What is the note?", tuple(options), answer, "Text")
        prompt = f"Note: {options[answer]}\n{question_text(question, scenes.PROMPT)}"
        yield _record(f"text_{i:05d}", (prompt, options[answer]))


def _seen(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same turns with the video before the first question."""
    return [("<video>\n" + turns[0][0], turns[0][1]), *turns[1:]]


def _record(name: str, *turns: tuple[str, str], **media: object) -> dict:
    """A conversation; an answer begins with a space, so that its words are those of the text."""
    said = [
        {"from": who, "value": value}
        for human, gpt in turns
        for who, value in (("human", human), ("gpt", f" {gpt}"))
    ]
    return {"id": name, **media, "conversations": said}


def _write_lines(path: Path, records: Iterable[dict]) -> None:
    partial_path = path.with_suffix(".tmp")
    partial_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(partial_path, path)
