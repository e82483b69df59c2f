# SPDX-License-Identifier: Apache-2.0
"""Every command in docs/convert.md and README.md: understood, and run on tiny checkpoints."""

import re
import shlex
from pathlib import Path

import pytest

from apollo_jax.checkpoints import convert

ROOT = Path(__file__).parents[3]
COMMAND = re.compile(r"(?:^    |`)apollo-jax convert (-?[^[`\n](?:\\\n|[^`\n])*)", re.M)
# what the guide calls a checkpoint -> a tiny one of the same kind
TINY = {
    "Apollo-3B": "apollo-tiny-a/checkpoint",
    "Qwen2.5-3B-Instruct": "apollo-tiny-a/checkpoint/llm",
    "siglip-so400m-patch14-384": "apollo-tiny-a/checkpoint/vision_tower/siglip-so400m-patch14-384",
    "internvideo2": "apollo-tiny-a/checkpoint/vision_tower/internvideo2",
    "InternVideo2-Stage2_1B-224p-f4": "apollo-tiny-a/checkpoint/vision_tower/internvideo2",
    "webli_en_so400m_384.npz": "encoders/bigvision-siglip-a/loop.npz",
    "siglip2_b16_256.npz": "encoders/bigvision-siglip-a/scan.npz",  # the same tree
    "loop.npz": "encoders/bigvision-siglip-a/loop.npz",
    "siglip2-so400m-patch16-naflex": "encoders/siglip2-naflex-a",
    "clip-vit-large-patch14-336": "encoders/clip-a",
    "dinov2-large": "encoders/dinov2-a",
    "videomae-large": "encoders/videomae-a",
    "vjepa_vith16-384": "encoders/vjepa-a",
    "vjepa2-vitl-fpc64-256": "encoders/vjepa2-a",
}
# pickles need PyTorch (tests/parity); runs and flat names have tests of their own
ELSEWHERE = {
    "checkpoint-1000",
    "runs/sft",
    "dinov2_vitl14_pretrain.pth",
    "videomae_vitl.pth",
    "vitl.pt",
    "ViT-L-14-336px-state.pt",
    "vith16-384.pth.tar",
    "LanguageBind_Video_V1.5_FT",
    "LanguageBind_Video",
}
SIZES = {"152064": "448"}  # a tiny vocabulary


def commands() -> list[str]:
    texts = [(ROOT / name).read_text() for name in ("docs/convert.md", "README.md")]
    found = [c.replace("\\\n", " ") for text in texts for c in COMMAND.findall(text)]
    return [*dict.fromkeys(" ".join(c.split()) for c in found)]


def test_the_guide_has_commands():
    assert len(commands()) > 25


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_guide(command, tmp_path, monkeypatch):
    args = convert.arguments(shlex.split(command))
    source = str(args.source or "")
    if source in ELSEWHERE:
        return
    monkeypatch.chdir(tmp_path)
    for name, at in TINY.items():
        (tmp_path / name).symlink_to(ROOT / "tests/fixtures" / at)
    if source == "start":
        convert.main(["--to", "orbax", "Apollo-3B/", "start/"])
    else:
        paths = [source] if source else [p.partition("=")[2] for p in args.part]
        assert {p.strip("/") for p in paths} <= {*TINY, "fresh"}
    words = [SIZES.get(word, word) for word in shlex.split(command)]
    convert.main(words)
    assert (tmp_path / args.target).exists()
