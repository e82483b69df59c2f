# SPDX-License-Identifier: Apache-2.0
"""Evaluation on a multiple-choice benchmark, with the controls of the paper's Figure 2.

Every question is put with the video, with its centre frame alone, and without any picture.
Responses are appended as they come, so the same command continues after an interruption.

    OUTPUT/responses-RUN.jsonl   one line per answer; a later line for the same id replaces it
    OUTPUT/results.json          scores of every run, and all that makes them reproducible
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
from flax import nnx

from apollo_jax.evaluation import benchmark
from apollo_jax.evaluation.answering import Answerer, Reply, Scoring, Seen, read_ahead, waves
from apollo_jax.evaluation.benchmark import Benchmark
from apollo_jax.evaluation.multiple_choice import Question, summarise
from apollo_jax.inference.generate import load
from apollo_jax.inference.processor import Processor
from apollo_jax.models.apollo import Apollo
from data_pipeline.sampling import ClipSampling

Modality = Literal["video", "image", "text"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)


class Run(NamedTuple):
    """One way of seeing the questions."""

    name: str
    modality: Modality
    sampling: ClipSampling


def evaluate(
    model: Apollo,
    processor: Processor,
    bench: Benchmark,
    output: str | Path,
    *,
    modalities: Sequence[Modality] = MODALITIES,
    samplings: Sequence[str] = ("fps",),
    scoring: Scoring = "generate",
    max_new_tokens: int = 16,
    overwrite: bool = False,
) -> dict:
    """Put every question in every way; fills the folder `output` and returns its results.

    Args:
      modalities: what is shown: the video, its centre frame ("image"), nothing ("text").
      samplings: of the video, "fps" or "uniform:N" with N frames in all.
      scoring: see `Answerer`.
      overwrite: ask again whatever `output` already answers.
    Raises ValueError if `output` holds answers of other weights, prompts or settings.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    runs = make_runs(modalities, samplings, processor.sampling)
    if overwrite:
        for run in runs:
            _responses(output, run.name).unlink(missing_ok=True)
    weights = weights_id(model)
    answerer = Answerer(model, processor, bench.prompt, scoring, max_new_tokens)
    results = _description(answerer, bench, weights) | {"runs": {}}
    for run in runs:
        started = time.monotonic()
        rows = _ask(answerer, bench, run, output, weights)
        results["runs"][run.name] = {
            "modality": run.modality,
            "sampling": dataclasses.asdict(run.sampling),
            "seconds": round(time.monotonic() - started, 2),
            **summarise(rows),
        }
        _write_json(output / "results.json", results)
    return results


def make_runs(
    modalities: Sequence[Modality], samplings: Sequence[str], base: ClipSampling
) -> list[Run]:
    """Every sampling of the video, and the two controls once. ValueError for an unknown name."""
    unknown = [m for m in modalities if m not in MODALITIES]
    if unknown:
        raise ValueError(f"modality {unknown[0]!r} is unknown; known: {', '.join(MODALITIES)}")
    centre = dataclasses.replace(base, mode="centre")
    controls = {"image": Run("image", "image", centre), "text": Run("text", "text", base)}
    videos = []
    for name in samplings:
        mode, _, frames = name.partition(":")
        if mode not in ("fps", "uniform") or (mode == "uniform") != frames.isdecimal():
            raise ValueError(f"sampling {name!r} is neither 'fps' nor 'uniform:N' with N frames")
        sampling = dataclasses.replace(base, mode=mode, uniform_frames=int(frames or 0))
        videos.append(Run(f"video-{mode}{frames}", "video", sampling))
    return [r for m in modalities for r in (videos if m == "video" else [controls[m]])]


def read_responses(output: Path, run: str) -> list[dict]:
    """The last answer to every question of a run."""
    rows = map(json.loads, _responses(output, run).read_text().splitlines())
    return list({row["id"]: row for row in rows}.values())


def weights_id(model: Apollo) -> str:
    """Hash of every parameter's name and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _ask(answerer: Answerer, bench: Benchmark, run: Run, output: Path, weights: str) -> list[dict]:
    """The rows of all questions; those that `output` answers already are not put again."""
    processor = dataclasses.replace(answerer.processor, sampling=run.sampling)
    answerer = dataclasses.replace(answerer, processor=processor)
    questions = bench.questions
    if run.modality == "text":
        questions = [dataclasses.replace(q, video="", image="") for q in questions]
    settings = (weights, run, answerer.prompt, answerer.scoring, answerer.max_new_tokens)
    keys = {q.id: _hash((*settings, _identity(q))) for q in questions}
    path = _responses(output, run.name)
    rows = {row["id"]: row for row in _finished(path, keys)}
    progress = _Progress(run.name, len(questions), len(rows))
    videos = {q.id: q.video for q in bench.questions}
    with open(path, "a") as file:
        for wave in waves(read_ahead(processor, [q for q in questions if q.id not in rows])):
            for seen, reply in _answers(answerer, wave):
                row = _row(seen, reply, keys) | {"video": videos[seen.question.id]}
                rows[row["id"]] = row
                file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            progress(len(rows))
    return [rows[question.id] for question in questions]


def _answers(answerer: Answerer, wave: list[Seen]) -> Iterator[tuple[Seen, Reply]]:
    """Answers to what can be read, empty ones to the rest."""
    readable = [seen for seen in wave if not seen.error]
    yield from zip(readable, answerer(readable), strict=True)
    yield from ((seen, Reply(None, "")) for seen in wave if seen.error)


def _row(seen: Seen, reply: Reply, keys: dict[str, str]) -> dict:
    return {
        **dataclasses.asdict(seen.question),
        "reply": reply.text,
        "choice": reply.choice,
        "parse_ok": reply.choice is not None,
        "correct": reply.choice == seen.question.answer,
        "status": "decode_error" if seen.error else "ok",
        "error": seen.error,
        "key": keys[seen.question.id],
    }


def _finished(path: Path, keys: dict[str, str]) -> Iterator[dict]:
    """Rows of an earlier start; a last line cut short is removed, failures are tried again."""
    if not path.exists():
        return
    text = path.read_text()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        os.truncate(path, len(text.encode()))
    for row in map(json.loads, text.splitlines()):
        if keys.get(row["id"]) != row["key"]:
            raise ValueError(
                f"{path} answers {row['id']!r} with other weights, prompts or settings; "
                "choose another --output, or give --overwrite to start anew"
            )
        if row["status"] == "ok":
            yield row


def _description(answerer: Answerer, bench: Benchmark, weights: str) -> dict:
    processor = answerer.processor
    return {
        "benchmark": bench.name,
        "questions": len(bench.questions),
        "questions_hash": _hash(
            [dataclasses.replace(q, video="", image="") for q in bench.questions]
        ),
        "prompt": dataclasses.asdict(bench.prompt),
        "scoring": answerer.scoring,
        "max_new_tokens": answerer.max_new_tokens,
        "weights": weights,
        "tokens_per_clip": processor.tokens_per_clip,
        "max_length": processor.max_length,
        "visual_share": processor.visual_share,
        "device": jax.devices()[0].device_kind,
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in ("jax", "flax", "av", "numpy")},
    }


class _Progress:
    """A line on stderr, at most one a second: answered of all, and how fast."""

    def __init__(self, name: str, total: int, done: int):
        self._name, self._total, self._before = name, total, done
        self._started = self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last < 1 and done < self._total:
            return
        self._last = now
        rate = (done - self._before) / (now - self._started)
        text = f"{self._name}: {done}/{self._total} questions, {rate:.1f}/s"
        live = sys.stderr.isatty() and done < self._total
        print(f"\r{text}", end="" if live else "\n", file=sys.stderr, flush=True)


def _responses(output: Path, run: str) -> Path:
    return output / f"responses-{run}.jsonl"


def _identity(question: Question) -> tuple:
    """A question wherever its files lie."""
    return question.id, question.question, question.options, question.answer


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the questions of a benchmark with a checkpoint, and score the answers."""
    parser = argparse.ArgumentParser("apollo-jax evaluate", description=main.__doc__)
    parser.add_argument("--checkpoint", required=True, help="official Apollo folder, or a workdir")
    parser.add_argument("--benchmark", required=True, help=", ".join(benchmark.PROMPTS))
    parser.add_argument("--data", required=True, help="JSONL file, or the folder it lies in")
    parser.add_argument("--output", required=True, help="folder for responses and results.json")
    parser.add_argument("--modality", type=_names, default=list(MODALITIES), metavar="A,B")
    parser.add_argument("--sampling", type=_names, default=["fps"], metavar="fps,uniform:N")
    parser.add_argument("--scoring", choices=get_args(Scoring), default="generate")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--overwrite", action="store_true", help="ask again what is answered")
    args = parser.parse_args(argv)
    bench = benchmark.load(args.benchmark, args.data)
    bench = dataclasses.replace(bench, questions=bench.questions[: args.limit])
    model, processor = load(args.checkpoint)
    results = evaluate(
        model,
        processor,
        bench,
        args.output,
        modalities=args.modality,
        samplings=args.sampling,
        scoring=args.scoring,
        max_new_tokens=args.max_new_tokens,
        overwrite=args.overwrite,
    )
    for name, run in results["runs"].items():
        overall, parts = run["overall"], run["categories"].items()
        print(
            f"{name}: {overall['accuracy']:.1%} ({overall['low']:.1%} to {overall['high']:.1%}) of "
            f"{overall['questions']} questions, read {run['parse_rate']:.1%}; "
            + ", ".join(f"{category} {part['accuracy']:.1%}" for category, part in parts)
        )


if __name__ == "__main__":
    main()
