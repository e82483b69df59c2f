# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax demo`: a video language model from mp4 files to answers, on a CPU, in minutes.

Every step is what the other commands do, called here in order; each leaves its results in the
workdir and is not repeated by --resume.

    world/  tokenizer.model  frames/  stages/*/   what the model is trained on, and its training
    evaluation/  evaluation-warmup/               answers and scores
    apollo-mini/                                  the trained model in the official layout
    report.html  report.json
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

import apollo_jax
from apollo_jax import config, cpu
from apollo_jax.config import Experiment
from apollo_jax.evaluation import benchmark, scenes
from apollo_jax.evaluation.apollobench_mini import DESCRIBE, write_world
from apollo_jax.evaluation.evaluate import evaluate
from apollo_jax.evaluation.multiple_choice import question_text
from apollo_jax.evaluation.report import LiveAnswer, Stage, Story, write_report
from apollo_jax.inference.generate import load
from apollo_jax.training.train import train
from data_pipeline.conversation import PLACEHOLDER, SYSTEM, MediaClips, media_text
from data_pipeline.predecode import PredecodeConfig, predecode
from data_pipeline.sampling import ClipSampling, sample_clips
from data_pipeline.tokenizer import train_sentencepiece

STAGES = ("images", "warmup", "align", "vision", "sft")
CONFIG = Path(__file__).parents[1] / "configs" / "demo.py"
UNFROZEN = "sft_unfrozen"
PROGRESS = "progress.json"  # what is done, and the seconds it took

console = Console()


class Stopped(Exception):
    """Training was asked to stop; what it did is saved."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """One demo in its workdir.

    quick: a few scenes and steps, to see in a minute whether every part works; learns nothing.
    unfrozen: also train the last stage with nothing frozen, for comparison.
    """

    workdir: Path
    config: Path = CONFIG
    quick: bool = False
    unfrozen: bool = False

    def steps(self) -> dict[str, Callable[[], None]]:
        """What to do, in order."""
        return {
            "render the world": self.render,
            "train the tokenizer": self.train_tokenizer,
            "predecode": self.predecode,
            **{f"train {stage}": lambda stage=stage: self.train(stage) for stage in STAGES},
            "evaluate": self.evaluate,
            "export": self.export,
            "ask": self.ask,
            **(self.without_freezing() if self.unfrozen else {}),
        }

    def without_freezing(self) -> dict[str, Callable[[], None]]:
        """The last stage again with nothing frozen: what the paper's freezing gains or costs."""
        return {
            f"train {UNFROZEN}": lambda: self.train(UNFROZEN),
            f"evaluate {UNFROZEN}": self.evaluate_unfrozen,
        }

    def render(self) -> None:
        train, test = (64, 2) if self.quick else (5400, 40)
        write_world(
            self.workdir / "world",
            train_scenes=train,
            test_scenes_per_family=test,
            workers=cpu.cores(),
        )

    def train_tokenizer(self) -> None:
        texts = [*training_texts(self.workdir / "world"), *prompt_texts() * 100]
        size = self.experiment(STAGES[0]).model.llm.vocab_size
        train_sentencepiece(texts, self.workdir / "tokenizer.model", size)

    def predecode(self) -> None:
        world = self.workdir / "world"
        files = sorted([*world.glob("videos/train/*.mp4"), *world.glob("images/*.png")])
        size = self.experiment(STAGES[0]).data.frame_size
        workers = cpu.cores()
        settings = PredecodeConfig(fps=scenes.FPS, size=size, subsampling="444", workers=workers)
        names = [file.relative_to(world) for file in files]
        predecode(names, self.workdir / "frames", settings, root=world)

    def train(self, stage: str) -> None:
        if not train(self.experiment(stage), self.stage(stage)):
            raise Stopped

    def evaluate(self) -> None:
        bench = benchmark.load("apollobench_mini", self.workdir / "world")
        warmed_up = load(str(self.stage("warmup")))
        evaluate(*warmed_up, bench, self.workdir / "evaluation-warmup", modalities=["video"])
        trained = load(str(self.stage("sft")))
        samplings = ("fps", "uniform:24")
        evaluate(*trained, bench, self.workdir / "evaluation", samplings=samplings)

    def evaluate_unfrozen(self) -> None:
        bench = benchmark.load("apollobench_mini", self.workdir / "world")
        trained = load(str(self.stage(UNFROZEN)))
        evaluate(*trained, bench, self.workdir / "evaluation-unfrozen", modalities=["video"])

    def export(self) -> None:
        model, processor = load(str(self.stage("sft")))
        folder = self.workdir / "apollo-mini"
        apollo_jax.save_pretrained(model, folder, tokenizer=processor.tokenizer, overwrite=True)

    def ask(self) -> None:
        """Three questions about a held-out video, put to the exported model."""
        model, processor = load(str(self.workdir / "apollo-mini"))
        lines = (self.workdir / "world/test.jsonl").read_text().splitlines()
        bench = benchmark.load("apollobench_mini", self.workdir / "world")
        video = bench.questions[0].video
        asked = {
            question_text(q, bench.prompt): q.options[q.answer]
            for q in bench.questions
            if q.video == video
        } | {DESCRIBE: json.loads(lines[0])["caption"]}
        answers = []
        for prompt, expected in asked.items():
            reply = apollo_jax.generate(
                model, processor, video=video, prompt=prompt, max_new_tokens=24
            )
            console.print(f"{prompt}\n  -> {reply}  (expected: {expected})", markup=False)
            answers.append(LiveAnswer(video, prompt, reply, expected))
        rows = [dataclasses.asdict(answer) for answer in answers]
        write_json(self.workdir / "live.json", rows)

    def report(self, seconds: dict[str, float]) -> dict:
        live = json.loads((self.workdir / "live.json").read_text())
        story = Story(
            stages=[
                Stage(s, self.trained(s), self.mixture(s), self.stage(s) / "metrics.jsonl")
                for s in STAGES
            ],
            evaluation=self.workdir / "evaluation",
            warmed_up=self.workdir / "evaluation-warmup",
            unfrozen=self.workdir / "evaluation-unfrozen" if self.unfrozen else None,
            live=[LiveAnswer(**answer) for answer in live],
            seconds=seconds,
        )
        return write_report(self.workdir, story)

    def stage(self, name: str) -> Path:
        """The workdir of a training stage."""
        return self.workdir / "stages" / name

    def trained(self, stage: str) -> str:
        """The components that a stage trains."""
        rates = dataclasses.asdict(self.experiment(stage).optimizer.learning_rates)
        return ", ".join(name.replace("_", " ") for name, rate in rates.items() if rate > 0)

    def mixture(self, stage: str) -> str:
        """The sources a stage reads, with their shares."""
        sources = self.experiment(stage).data.sources
        total = sum(source.weight for source in sources.values())
        return ", ".join(f"{s.weight / total:.0%} {name}" for name, s in sources.items())

    def experiment(self, stage: str) -> Experiment:
        """A stage's config, whose paths are relative to the workdir."""
        written = config.load(f"{self.config}:{stage}")

        def place(path: str) -> str:
            return str(self.workdir / path) if path else ""

        def placed(sources: dict) -> dict:
            return {n: dataclasses.replace(s, path=place(s.path)) for n, s in sources.items()}

        data = dataclasses.replace(
            written.data,
            sources=placed(written.data.sources),
            frames=tuple(place(folder) for folder in written.data.frames),
            tokenizer=place(written.data.tokenizer),
        )
        held_out = dataclasses.replace(
            written.evaluation, sources=placed(written.evaluation.sources)
        )
        steps = {"num_steps": 2, "log_every": 1} if self.quick else {}
        return dataclasses.replace(
            written,
            data=data,
            evaluation=held_out,
            train=dataclasses.replace(written.train, **steps),
        )


def run(demo: Demo, *, resume: bool = False) -> dict:
    """Do what is not done yet; returns the numbers of the report.

    Raises FileExistsError if the workdir is in use and `resume` is not given, ValueError if it was
    begun otherwise, Stopped if training was stopped by a signal.
    """
    seconds = finished_steps(demo, resume)
    steps = demo.steps()
    for number, (name, step) in enumerate(steps.items(), 1):
        title = f"{number}/{len(steps)} {name}"
        if name in seconds:
            console.print(f"{title}: done before, in {seconds[name]:.0f} s", style="dim")
            continue
        console.rule(title, align="left")
        started = time.monotonic()
        step()
        seconds[name] = round(time.monotonic() - started, 1)
        write_json(demo.workdir / PROGRESS, {"quick": demo.quick, "seconds": seconds})
    return demo.report(seconds)


def finished_steps(demo: Demo, resume: bool) -> dict[str, float]:
    """{step: seconds} of what an earlier start did; makes the workdir if there is none."""
    workdir, path = demo.workdir, demo.workdir / PROGRESS
    if not workdir.exists() or not any(workdir.iterdir()):
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, {"quick": demo.quick, "seconds": {}})
    elif not path.exists():
        raise FileExistsError(f"{workdir} is not empty and holds no demo: choose another --workdir")
    elif not resume:
        raise FileExistsError(
            f"{workdir} holds a demo: continue it with --resume, or choose another --workdir"
        )
    progress = json.loads(path.read_text())
    if progress["quick"] != demo.quick:
        begun = "with" if progress["quick"] else "without"
        raise ValueError(f"{workdir} was begun {begun} --quick: continue it so")
    return progress["seconds"]


def training_texts(world: Path) -> Iterator[str]:
    """All that is said in the training conversations."""
    for path in sorted((world / "train").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            for turn in json.loads(line)["conversations"]:
                yield PLACEHOLDER.sub("", turn["value"])


def prompt_texts() -> list[str]:
    """The words that prompts put around a conversation."""
    texts = [SYSTEM, "system", "user", "assistant"]
    for seconds in range(1, 13):
        clips = sample_clips(
            ClipSampling(), fps=scenes.FPS, num_frames=scenes.FPS * seconds, duration=seconds
        )
        texts.append(media_text(MediaClips("video", clips.timestamps, seconds), 0))
    return texts


def write_json(path: Path, value: object) -> None:
    """Atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def main(argv: list[str]) -> None:
    """Build, train, evaluate and question a tiny Apollo; ends with WORKDIR/report.html."""
    parser = argparse.ArgumentParser("apollo-jax demo", description=main.__doc__)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted demo")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything: checks, learns nothing"
    )
    parser.add_argument(
        "--unfrozen",
        action="store_true",
        help="also train the last stage with nothing frozen, for comparison (5 minutes more)",
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="its stages (default: ours)")
    args = parser.parse_args(argv)
    demo = Demo(args.workdir.absolute(), args.config, args.quick, args.unfrozen)
    cpu.keep_freed_memory()
    cpu.use_all_cores(*(demo.experiment(stage).data.batch_size for stage in STAGES))
    try:
        numbers = run(demo, resume=args.resume)
    except (Stopped, KeyboardInterrupt):
        console.print("stopped; the same command with --resume continues")
        raise SystemExit(1) from None
    for modality, score in numbers["headline"].items():
        met = "met" if score["met"] else "NOT met"
        console.print(
            f"{modality}: {score['accuracy']:.1%} of {score['questions']} temporal questions, "
            f"expected {score['expected']}: {met}"
        )
    console.print(f"report: {args.workdir / 'report.html'}")
