# SPDX-License-Identifier: Apache-2.0
"""What is inside a folder of frame shards (`apollo-jax shards`), and whether it is sound."""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from fnmatch import translate
from pathlib import Path
from typing import Any

from data_pipeline.contact_sheets import clock, contact_sheet, grid_frames, read_strips
from data_pipeline.frame_shards import FrameShards
from data_pipeline.media_index import MediaIndex
from data_pipeline.shard_checks import check_folder
from data_pipeline.shard_folder import Problem, open_folder
from data_pipeline.shard_statistics import statistics, statistics_text


def listing(index: MediaIndex, patterns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Every medium whose id matches one of the glob patterns (all if there are none)."""
    match = re.compile("|".join(map(translate, patterns))).match
    for row in index.rows():
        if match(row["id"]):
            row["kind"] = "video" if row.pop("is_video") else "image"
            yield row


def _ls(args: argparse.Namespace) -> None:
    shards = FrameShards(args.path)
    count = 0
    for row in listing(shards.index, args.patterns):
        count += 1
        if args.json:
            print(json.dumps(row, ensure_ascii=False))
        else:
            size = f"{row['width']}x{row['height']}"
            length = clock(row["duration"]) if row["kind"] == "video" else "-"
            print(
                f"{row['kind']}  {size:>9}  {length:>9}  {row['stored_frames']:>6} frames  "
                f"frames-{row['shard']:05d}  {_printable(row['id'])}"
            )
    print(f"{count} of {len(shards)} media in {args.path}", file=sys.stderr)


def _printable(name: str) -> str:
    return name if name.isprintable() else json.dumps(name)


def facts(shards: FrameShards, media_id: str) -> dict[str, Any]:
    """All that is known of one medium: index, shard, record headers and its sidecar's entry."""
    row = shards.index.find(media_id)
    info = shards.info(media_id)
    known = {**vars(info)}
    number = int(shards.index.columns["shard"][row])
    known["shard"] = shards.manifest["shards"][number]["file"]
    known["first_record"] = int(shards.index.columns["record"][row])
    entry = _sidecar_entry(shards.path / f"frames-{number:05d}.json", media_id)
    known |= {k: v for k, v in entry.items() if k not in known and k != "record"}
    headers, size = [], 0
    for header, jpegs in shards.segments(media_id):
        headers.append(header)
        size += sum(map(len, jpegs))
    known["records"], known["jpeg_bytes"] = len(headers), size
    known |= {k: headers[0][k] for k in ("codec", "q", "subsampling")}
    known["pts"] = [pts / 1e6 for header in headers for pts in header["pts_us"]]
    return known


def _sidecar_entry(path: Path, media_id: str) -> dict[str, Any]:
    """What the job noted about a medium; nothing if the sidecar is lost, which `verify` tells."""
    try:
        media = json.loads(path.read_bytes())["media"]
        return next((entry for entry in media if entry["id"] == media_id), {})
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _show(args: argparse.Namespace) -> None:
    shards = FrameShards(args.path)
    ids = list(args.ids)
    if args.random:
        rows = random.Random(args.seed).sample(range(len(shards)), min(args.random, len(shards)))
        ids += map(shards.index.name, sorted(rows))
    for name, value in (("every", args.every), ("frames", args.frames)):
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value:g} is not possible: it must be positive")
    if not ids:
        raise ValueError("say which: ids as `apollo-jax shards ls` prints them, or --random N")
    for media_id in ids:
        known = facts(shards, media_id)
        print(json.dumps(known, ensure_ascii=False) if args.json else _describe(known))
    if args.output:
        each = args.frames or (24 if len(ids) == 1 else 6)
        wanted = {}
        for info in map(shards.info, ids):
            wanted[info.id] = grid_frames(info.stored_frames, info.stored_fps, each, args.every)
        sheet = contact_sheet(read_strips(shards, wanted))
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(args.output, format="PNG")
        print(f"{args.output}: {sum(map(len, wanted.values()))} frames", file=sys.stderr)


def _describe(known: dict[str, Any]) -> str:
    known = dict(known)
    times = [f"{t:.3f}" for t in known.pop("pts")]
    if len(times) > 12:
        times = [*times[:9], "...", *times[-2:]]
    lines = [f"  {name:<14} {value}" for name, value in known.items() if name != "id" and value]
    return "\n".join([known["id"], *lines, f"  {'frames are of':<14} {' '.join(times)} s"])


def _stats(args: argparse.Namespace) -> None:
    known = statistics(FrameShards(args.path))
    print(json.dumps(known, ensure_ascii=False) if args.json else statistics_text(known))


def verify(path: str | Path, decode: bool = False, workers: int = 0) -> list[Problem]:
    """Everything that is wrong with a folder; `decode` also decodes every frame.

    FileNotFoundError if it holds no frame shards at all.
    """
    folder = open_folder(Path(path))
    shards = check_folder(folder, decode, workers)
    return folder.problems + [problem for found in shards.values() for problem in found]


def _repair(args: argparse.Namespace) -> None:
    from data_pipeline.shard_repair import repair  # with all that predecode needs

    done = repair(args.path, args.redo, args.dry_run, args.decode, args.workers)
    for line in done.lines:
        print(line)
    for problem in done.remaining:
        print(f"not repaired: {problem}")
    if args.dry_run:
        print("nothing was changed (--dry-run)", file=sys.stderr)
    elif not args.redo or not done.lines:
        print(f"{args.path}: {'not ' if done.remaining else ''}sound", file=sys.stderr)
    sys.exit(1 if done.remaining else 0)


def _verify(args: argparse.Namespace) -> None:
    problems = verify(args.path, args.decode, args.workers)
    for problem in problems:
        print(json.dumps(vars(problem), ensure_ascii=False) if args.json else problem)
    if not problems:
        print(f"{args.path}: sound", file=sys.stderr)
        return
    media = len({p.media_id for p in problems if p.media_id})
    print(
        f"{args.path}: {len(problems)} problems, {media} media damaged; "
        f"`apollo-jax shards repair {args.path} --dry-run` says what can be saved",
        file=sys.stderr,
    )
    sys.exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """`apollo-jax shards`."""
    parser = argparse.ArgumentParser("apollo-jax shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    ls = _command(commands, "ls", _ls, "what is stored, a line per medium")
    ls.add_argument("patterns", nargs="*", metavar="PATTERN", help="of ids, such as 'train/*.mp4'")
    show = _command(commands, "show", _show, "facts of a medium, and its frames as a picture")
    show.add_argument("ids", nargs="*", metavar="ID")
    show.add_argument("--random", type=int, default=0, metavar="N", help="so many media by chance")
    show.add_argument("--seed", type=int, default=0, help="of the chance")
    show.add_argument("--output", metavar="F.png", help="write a contact sheet")
    show.add_argument("--frames", type=int, help="of each medium, at most, spread evenly")
    show.add_argument("--every", type=float, metavar="SECONDS", help="a frame every so often")
    _command(commands, "stats", _stats, "counts, hours, bytes, durations, sizes, rejects")
    check = _command(commands, "verify", _verify, "read everything; exit code 1 if it is damaged")
    mend = _command(commands, "repair", _repair, "drop what is damaged, keep all that is good")
    mend.add_argument("--dry-run", action="store_true", help="only say what would be done")
    mend.add_argument(
        "--redo",
        action="store_true",
        help="drop nothing: mark damaged shards unfinished, so that the same predecode command "
        "makes these again",
    )
    for reading in (check, mend):
        reading.add_argument("--decode", action="store_true", help="decode every frame, too")
        reading.add_argument("--workers", type=int, default=0, help="processes (0: one per CPU)")
    args = parser.parse_args(argv)
    args.run(args)


def _command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:])
    parser.set_defaults(run=run)
    parser.add_argument("path", metavar="PATH", help="folder of frame shards")
    if name != "repair":
        parser.add_argument("--json", action="store_true", help="a JSON object per line")
    return parser


if __name__ == "__main__":
    main()
