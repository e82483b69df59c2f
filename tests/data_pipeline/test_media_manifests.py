# SPDX-License-Identifier: Apache-2.0
"""Every kind of manifest, and what can be wrong with one."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.media_files import find_media

ROWS = [
    {"video": "a b.mp4", "image": "", "note": "1"},
    {"video": "", "image": "é.png", "note": "2"},
    {"video": "", "image": "", "note": "about nothing"},
]


def write(path, rows):
    """The rows in the format that the path's ending asks for."""
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if ending == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif ending == "json":
        text = json.dumps(rows)
    else:
        lines = [list(rows[0]), *(row.values() for row in rows)]
        text = "".join(("\t" if ending == "tsv" else ",").join(line) + "\r\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet", "csv.gz", "jsonl.gz"])
def test_every_format_says_the_same(tmp_path, ending):
    media = find_media(write(tmp_path / f"m.{ending}", ROWS))
    assert [(m.id, m.kind) for m in media] == [("a b.mp4", "video"), ("é.png", "image")]
    assert [m.path for m in media] == [f"{tmp_path}/a b.mp4", f"{tmp_path}/é.png"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_an_id_belongs_to_a_path_or_url(tmp_path, ending):
    """Beside `video` it is the conversation's: annotations know the medium by its name."""
    rows = [{"id": "x", "path": "a.mp4"}, {"id": "", "path": "/abs/b.PNG"}]
    media = find_media(write(tmp_path / f"m.{ending}", rows), root="/r")
    assert [m[:3] for m in media] == [
        ("x", "video", "/r/a.mp4"),
        ("/abs/b.PNG", "image", "/abs/b.PNG"),
    ]
    rows = [{"id": "conversation 1", "video": "a.mp4", "url": "https://x.org/watch"}]
    assert find_media(write(tmp_path / f"n.{ending}", rows))[0].id == "a.mp4"
    rows = [{"id": "x", "url": "memory://host/a.webp?size=1"}]
    assert find_media(write(tmp_path / f"o.{ending}", rows))[0][:3] == (
        "x", "video", "memory://host/a.webp?size=1"
    )  # fmt: skip


def test_lists_of_names(tmp_path):
    rows = [{"images": ["1.png", "2.png"], "video": ["a.mp4", "b.mp4"]}, {"images": []}]
    for ending in ("jsonl", "parquet"):
        if ending == "parquet":
            rows = [{**row, "video": row.get("video")} for row in rows]
        media = find_media(write(tmp_path / f"m.{ending}", rows))
        assert [m.id for m in media] == ["a.mp4", "b.mp4", "1.png", "2.png"]


def test_a_text_list_is_taken_as_it_stands(tmp_path):
    names = ["b.mp4", " leading and trailing .mp4 ", "#1.png", 'comma, "quoted".mp4', "no ending"]
    (tmp_path / "list.txt").write_bytes("\ufeff".encode() + "\r\n".join([*names, "", ""]).encode())
    media = find_media(tmp_path / "list.txt")
    assert [m.id for m in media] == names
    assert [m.kind for m in media] == ["video", "video", "image", "video", "video"]


def test_quoted_cells(tmp_path):
    (tmp_path / "m.csv").write_text('caption,video\n"two\nlines, ""quoted""",a.mp4\nx,"b,c.mp4"\n')
    assert [m.id for m in find_media(tmp_path / "m.csv")] == ["a.mp4", "b,c.mp4"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "vidio,id\na.mp4,1\n", r"m.csv:1: a column video, .*did you mean 'video'\?"),
        ("m.csv", "a.mp4\nb.mp4\n", r"m.csv:1: .*without a header is a .txt file"),
        ("m.csv", "video,id\na.mp4,1\nb.mp4\n", r"m.csv:3: 1 cells under a header of 2"),
        ("m.csv", 'video,id\n"a.mp4,1\n', r"m.csv:2: unexpected end of data"),
        ("m.csv", "", r"m.csv:1: a column video"),
        ("m.csv", "video\n", r"m.csv names no media: it has no records"),
        ("m.tsv", "video,id\na.mp4,1\n", r"m.tsv:1: a column .*it has the fields 'video,id'"),
        ("m.jsonl", "", r"m.jsonl names no media: it has no records"),
        ("m.jsonl", "\n\n", r"m.jsonl names no media: it has no records"),
        ("m.jsonl", '{"Video": "a.mp4"}\n', r"the fields 'Video' \(did you mean 'video'\?\)"),
        ("m.jsonl", '{"video": "a.mp4"}\n{"video": 7}\n', r"m.jsonl:2: field 'video' .* not '7'"),
        ("m.jsonl", '{"path": ["a.mp4"]}\n', r"m.jsonl:1: field 'path' should be a name"),
        ("m.jsonl", '{"path": "a", "id": [1]}\n', r"m.jsonl:1: field 'id' should be a name"),
        ("m.jsonl", '{"video": "a\\u0000.mp4"}\n', r"m.jsonl:1: field 'video' is no name"),
        ("m.jsonl", '{"video": "\\ud800.mp4"}\n', r"m.jsonl:1: field 'video' is no name"),
        ("m.jsonl", '\n{"video": \n', r"m.jsonl:2: not JSON"),
        ("m.jsonl", '"a.mp4"\n', r"m.jsonl:1: expected an object, got str"),
        ("m.jsonl", '[{"video": "a.mp4"}]', r"m.jsonl:1: a JSON array; .*jq"),
        ("m.json", '{"video": "a.mp4"}', r"m.json: a .json file is one array of objects"),
        ("m.json", '[{"video": "a.mp4"},', r"m.json is not JSON"),
        ("m.jsonl", '{"video": "a.tar"}', r"m.jsonl:1: a.tar is a tar"),
        ("m.txt", "\n", r"m.txt names no media"),
        ("m.jsonl", b'{"video": "\xff"}', r"m.jsonl is not UTF-8 text"),
        ("m.csv.gz", b"video\na.mp4\n", r"m.csv.gz is not a whole gzip file"),
        (
            "m.csv.gz",
            gzip.compress(b"video\na.mp4\n", mtime=0)[:-9],
            r"m.csv.gz is not a whole gzip file",
        ),
        ("m.parquet", b"PAR1 and no more", r"m.parquet is not a whole parquet file"),
        ("m.xlsx", b"PK", r"m.xlsx is neither a video, .*\.jsonl, .*\.parquet"),
    ],
)
def test_faults_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        find_media(tmp_path / name)


def test_parquet_columns_of_another_type(tmp_path):
    rows = [{"video": "a.mp4"}, {"video": None}, {"video": "b.mp4"}]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(
        table.set_column(0, "video", table["video"].dictionary_encode()), tmp_path / "m.parquet"
    )
    assert [m.id for m in find_media(tmp_path / "m.parquet")] == ["a.mp4", "b.mp4"]
    bad = write(tmp_path / "bad.parquet", [{"video": {"path": "a.mp4", "bytes": b"1"}}])
    with pytest.raises(ValueError, match=r"bad.parquet:1: field 'video' should be a name"):
        find_media(bad)
    with pytest.raises(ValueError, match=r"other.parquet: a column .*did you mean 'image'"):
        find_media(write(tmp_path / "other.parquet", [{"imag": "a"}]))


def test_what_is_named_twice_is_one_medium_and_one_name_is_not_two(tmp_path):
    rows = [{"id": "x", "path": "a.mp4"}, {"id": "x", "path": "a.mp4"}]
    assert len(find_media(write(tmp_path / "m.csv", rows))) == 1
    rows[1]["path"] = "b.mp4"
    with pytest.raises(ValueError, match=r"two media are called 'x', in .*a.mp4 and in .*b.mp4"):
        find_media(write(tmp_path / "m.csv", rows))
