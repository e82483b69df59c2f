# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax data`, as a user runs it: reports, exit codes, pictures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apollo_jax import data
from apollo_jax.config import load
from data_pipeline.data_config import sample_maker
from data_pipeline.frame_records import MediaInfo, ShardSpec, encode_segments
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.sizes import open_measured

LLM = Path(__file__).parents[1] / "fixtures" / "apollo-tiny-a" / "checkpoint" / "llm"
SPEC = ShardSpec(fps=2.0, size=32)
CONFIG = """
from apollo_jax.config import EvalConfig, Experiment, TrainConfig, to_config
from apollo_jax.models import apollo
from data_pipeline.loader import DataConfig, SourceConfig

def get_config(root):
    model = apollo.Config.debug()
    data = DataConfig(
        sources={n: SourceConfig(f"{root}/{n}.jsonl") for n in ("videos", "texts")},
        frames=(f"{root}/shards",),
        tokenizer="%s",
        batch_size=4,
        length=256,
        clips=4,
        frame_size=model.frame_size,
        tokens_per_clip=model.connector.num_output_tokens,
    )
    held_out = EvalConfig({"held_out": SourceConfig(f"{root}/texts.jsonl")}, every=5, batches=2)
    return to_config(Experiment("t", model, data, TrainConfig(num_steps=30), evaluation=held_out))
"""


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def asked(name: str, question: str, **media: str) -> dict:
    return {"id": name, "question": question, "answer": "Yes.", **media}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six videos of 2, 4, .. 12 s, each of one shade, and conversations about them."""
    writer = FrameShardWriter(tmp_path / "shards", SPEC)
    for v in range(6):
        frames = 4 * (v + 1)
        jpegs = [SPEC.encode(np.full((32, 24, 3), 40 * v, np.uint8))] * frames
        info = MediaInfo(f"v{v}.mp4", "video", 5 * frames, 10.0, frames / 2, frames, 2.0, 32, 24)
        times = [k / 2 for k in range(frames)]
        writer.add(info, encode_segments(info.id, jpegs, times, (32, 24), SPEC))
    writer.close()
    write(tmp_path / "videos.jsonl", [asked(f"q{v}", "Dark?", video=f"v{v}.mp4") for v in range(6)])
    write(tmp_path / "texts.jsonl", [{"text": "Once upon a time. " * (1 + t)} for t in range(9)])
    (tmp_path / "conf.py").write_text(CONFIG % LLM)
    return tmp_path


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """As a user would."""
    command = [sys.executable, "-m", "apollo_jax", "data", *arguments]
    config = ["--config", f"{root / 'conf.py'}:{root}"]
    return subprocess.run([*command, *config], capture_output=True, text=True)


def call(root: Path, *arguments: str) -> int:
    """The same without a process of its own; the exit code."""
    try:
        data.main([*arguments, "--config", f"{root / 'conf.py'}:{root}"])
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def test_sound_data_pass_and_are_described(root):
    done = run(root, "check", "--json", str(root / "out" / "report.json"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "the data will do" in done.stdout
    report = json.loads((root / "out" / "report.json").read_text())
    videos, texts = (report["training"]["sources"][n] for n in ("videos", "texts"))
    assert (videos["records"], videos["dropped"], videos["outcomes"]["trimmed"]) == (6, 0, 2)
    assert videos["clips"] == 1 + 2 + 3 + 4 + 4 + 4  # four slots to a row
    assert videos["hours"] == pytest.approx(42 / 3600)
    assert texts["clips"] == 0
    assert videos["epochs"] == pytest.approx(videos["drawn"] / 6)
    rows = report["training"]["rows"]
    assert rows == 4 * 30
    drawn = videos["drawn"] + texts["drawn"]
    assert drawn == pytest.approx(report["training"]["samples_per_row"] * rows)
    assert 0.5 < report["training"]["fill_clips"] <= 1
    assert sum(n for _, n in report["training"]["tokens_histogram"]) == 6 + 9
    assert report["held out"]["sources"]["held_out"]["records"] == 9
    assert "2 of 6 records (33.33%) lose clips" in done.stdout
    assert "q5: " in done.stdout


def test_what_was_measured_is_kept_for_the_loader(root, capsys):
    experiment = load(f"{root / 'conf.py'}:{root}")
    maker, settings = sample_maker(experiment.data), experiment.data.sources["videos"]
    assert open_measured(settings, maker)[1] is None
    assert call(root, "check") == 0
    table = open_measured(settings, maker)[1]
    assert table is not None
    assert table[:, 1].tolist() == [1, 2, 3, 4, 4, 4]
    first = capsys.readouterr().out
    assert call(root, "check") == 0
    assert capsys.readouterr().out == first
    with pytest.raises(ValueError, match=r"conf\.py.*; tables of sizes are kept there, or in"):
        call(root, "check", f"--config.data.sizes={root / 'conf.py'}")


def test_what_would_stop_a_run_is_named_and_fails(root, capsys):
    bad = [asked("lost", "?", video="videos/v3.MP4"), asked("kind", "?", image="v1.mp4")]
    write(root / "videos.jsonl", [*bad, asked("q", "?", video="v0.mp4")])
    assert call(root, "check") == 1
    out = capsys.readouterr().out
    assert "fails: source 'videos': 2 of 3 records would be dropped" in out
    near = "lost: video 'videos/v3.MP4' is not in the frame shards; did you mean 'v3.mp4'?"
    assert near in out
    assert "kind: 'v1.mp4' is named as image, but the shards hold a video" in out
    assert call(root, "check", "--config.data.max_bad_share=0.7") == 0
    capsys.readouterr()
    write(root / "texts.jsonl", [{"question": "<image>"}])
    assert call(root, "check", "--config.data.max_bad_share=0.7") == 1
    out = capsys.readouterr().out
    assert "fails: source 'texts': 1 faulty records in" in out
    assert "texts.jsonl:1: no 'conversations'" in out
    write(root / "texts.jsonl", [{"text": "a"}, {"question": "<image>"}])
    assert call(root, "check", "--config.data.max_bad_share=0.7") == 0
    out = capsys.readouterr().out
    assert "texts: 1 of 2 records (50.00%) are dropped: what they say" in out
    assert "record 1: texts.jsonl:2: no 'conversations'" in out


def test_conversations_become_a_tfds_dataset_that_a_config_names(root, capsys):
    (root / "in").mkdir()
    (root / "shards").rename(root / "in" / "frames")
    (root / "videos.jsonl").rename(root / "in" / "train.jsonl")
    command = [sys.executable, "-m", "apollo_jax", "data", "tfds", "--frames"]
    folders = ["--input", str(root / "in"), "--output", str(root / "out")]
    done = subprocess.run([*command, *folders], capture_output=True, text=True)
    name = re.search(r"sources name it (\S+)@SPLIT", done.stdout)
    assert name is not None, done.stderr
    changed = [f"--config.data.sources.videos.path={name[1]}@train", "--config.data.frames="]
    assert call(root, "check", *changed) == 0
    out = capsys.readouterr().out
    assert "2 of 6 records (33.33%) lose clips" in out
    assert "not kept for the loader: the sizes of videos; config.data.sizes names a folder" in out
    assert call(root, "check", "--config.data.weight_by=tokens", *changed) == 1
    out = capsys.readouterr().out
    assert "fails: source 'videos': weight_by='tokens' needs what was measured, but" in out
    gone = "--config.data.sources.videos.path=tfds:gone/x/1@train"
    assert call(root, "check", gone, changed[1]) == 1
    assert "write tfds:NAME[/CONFIG][:VERSION]@SPLIT" in capsys.readouterr().out
    picture = root / "s.png"
    assert call(root, "show", "--output", str(picture), *changed) == 0
    with Image.open(picture) as sheet:
        assert sheet.size == (4 * 32, 4 * 32)


def test_a_sample_is_shown_with_a_picture_of_its_frames(root, capsys):
    picture = root / "out" / "s.png"
    done = run(root, "show", "--index", "5", "--output", str(picture))
    assert (done.returncode, done.stderr) == (0, "")
    assert "videos[5], id q5" in done.stdout
    assert "4 clips of 4 (trimmed)" in done.stdout
    assert "video v5.mp4, 24x32, 12.0 s; clips at 0." in done.stdout
    assert "[8 visual tokens]" in done.stdout
    assert done.stdout.count("«Yes.<|im_end|>»") == 1
    with Image.open(picture) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (4 * 32, 4 * 32, 3)
    assert (np.abs(sheet[:, 16].astype(int) - 200) < 4).all()
    assert not sheet[:, :4].any()
    assert call(root, "show", "--source", "texts", "--output", str(picture)) == 0
    assert "«Once upon a time. <|endoftext|>»" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "--source", "video"], "no source 'video'.*did you mean 'videos'"),
        (["show", "--index", "-1"], "--index -1: source 'videos' has records 0 to 5"),
        (
            ["show", "--config.data.length=20"],
            r"videos\[0\], id q0, makes no sample: needs \d+",
        ),
        (["check", "--config.data.tokenizer=REQUIRED"], "add --config.data.tokenizer=PATH"),
        (["check", "--config.data.frames=nowhere"], "nowhere is no complete set of frame shards"),
        (["check", "--config.data.layout=bgr"], "layout 'bgr' is not one of rgb, yuv420"),
        (["check", "--config.data.lenght=9"], "did you mean config.data.length"),
    ],
)
def test_mistakes_say_what_and_where(root, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(root, *arguments)


def test_a_mistake_is_one_line(root):
    done = run(root, "show", "--index", "6")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("apollo-jax data: --index 6: source 'videos' has records 0 to 5\n")
