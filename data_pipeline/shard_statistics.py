# SPDX-License-Identifier: Apache-2.0
"""What a folder of frame shards holds in numbers."""

from collections import Counter
from typing import Any

import numpy as np

from data_pipeline.contact_sheets import clock
from data_pipeline.frame_shards import FrameShards

_DURATIONS = (0, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 10800, float("inf"))  # seconds
_BAR = 40  # characters
_COMMON = 8  # sizes and rates that are listed


def statistics(shards: FrameShards) -> dict[str, Any]:
    """Counts, hours, bytes and what the media are like."""
    columns, manifest = shards.index.columns, shards.manifest
    video = columns["is_video"]
    seconds = columns["duration"][video]
    frames = int(columns["stored_frames"].sum())
    size = sum(shard["bytes"] for shard in manifest["shards"])
    # Of the bytes, as many are the videos' as of the frames.
    of_videos = size * int(columns["stored_frames"][video].sum()) / frames
    sizes = Counter(zip(columns["width"].tolist(), columns["height"].tolist(), strict=True))
    rates = Counter(np.round(columns["fps"][video], 2).tolist())
    counts, _ = np.histogram(seconds, _DURATIONS)
    hours, _ = np.histogram(seconds, _DURATIONS, weights=seconds / 3600)
    return {
        "path": str(shards.path),
        "media": len(shards),
        "videos": int(video.sum()),
        "images": int((~video).sum()),
        "shards": len(manifest["shards"]),
        "frames": frames,
        "hours": float(seconds.sum() / 3600),
        "bytes": size,
        "bytes_per_frame": size / frames,
        "bytes_per_second_of_video": of_videos / seconds.sum() if seconds.sum() else None,
        "spec": manifest["spec"],
        "durations": [
            {
                "from": a,
                "to": b if b < _DURATIONS[-1] else None,
                "videos": int(n),
                "hours": float(h),
            }
            for a, b, n, h in zip(_DURATIONS, _DURATIONS[1:], counts, hours, strict=False)
        ],
        "sizes": {f"{w}x{h}": n for (w, h), n in sizes.most_common()},
        "source_fps": {f"{rate:g}": n for rate, n in rates.most_common()},
        "rejected": manifest.get("rejected", {}),
    }


def statistics_text(known: dict[str, Any]) -> str:
    """`statistics` for people."""
    rate = known["bytes_per_second_of_video"]
    video = f"{rate / 1e3:.1f} kB per second of video, " if rate else ""
    lines = [
        known["path"],
        f"  {known['videos']} videos, {known['images']} images, {known['frames']} frames",
        f"  {known['hours']:.2f} hours, {_size(known['bytes'])} in {known['shards']} shards",
        f"  {video}{known['bytes_per_frame'] / 1e3:.1f} kB per frame",
        "  " + ", ".join(f"{name} {value}" for name, value in known["spec"].items()),
        *_histogram(known["durations"]),
        *_common("sizes", known["sizes"]),
        *_common("frames per second of the sources", known["source_fps"]),
        *_common("rejected", known["rejected"]),
    ]
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _histogram(bins: list[dict[str, Any]]) -> list[str]:
    most = max(entry["videos"] for entry in bins)
    lines = ["durations of the videos"] if most else []
    for entry in bins:
        if entry["videos"]:
            upper = f"- {clock(entry['to'])}" if entry["to"] else "or more"
            bar = "#" * max(1, round(_BAR * entry["videos"] / most))
            lines.append(f"  {clock(entry['from']):>9} {upper:<11} {entry['videos']:>8}  {bar}")
    return lines


def _common(title: str, counts: dict[str, int]) -> list[str]:
    lines = [title] if counts else []
    lines += [f"  {name:>21} {count:>8}" for name, count in list(counts.items())[:_COMMON]]
    others = sum(list(counts.values())[_COMMON:])
    return [*lines, f"  {'others':>21} {others:>8}"] if others else lines
