# SPDX-License-Identifier: Apache-2.0
"""TensorFlow Datasets as sources, by random access and without TensorFlow.

    tfds:NAME[/CONFIG][:VERSION]@SPLIT     e.g. tfds:coco_captions/2017:1.1.0@train[:90%]
    tfds:FOLDER@SPLIT                      the folder that holds its features.json

The dataset must be there, in the ArrayRecord file format: nothing is downloaded or built. Its
records are conversations in one of the ways of annotations.py, or the config says how they become
some: `question` and `answer` are templates over a record's fields, as in

    question="What animal is this?"  answer="{label}"            classes by their names
    question="Describe it."          answer="{captions[0][text]}"  sequences by number

and the pictures of the field `image` stand in front of the question, unless it says <image>.
"""

import hashlib
import json
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_parser, read_only_builder

from data_pipeline.annotations import Record, read_record
from data_pipeline.conversation import PLACEHOLDER
from data_pipeline.frame_records import MediaInfo
from data_pipeline.record_media import RecordMedia
from data_pipeline.sources import SourceConfig

PREFIX = "tfds:"
_RAW = tfds.decode.DeserializeMethod.RAW_BYTES  # no picture is decoded to know a length
_FORMAT = tfds.core.FileFormat.ARRAY_RECORD
_SAMPLED = 16  # records, for the fingerprint
_FACTS = [field.name for field in fields(MediaInfo)]


class TfdsSource:
    """The records of one split. Opening it tries the first one; the others as they are read.

    Raises FileNotFoundError for a dataset that is not there, ValueError for another format, an
    unknown split or field, or records that are no conversations.
    """

    def __init__(self, config: SourceConfig):
        name, at, split = config.path.removeprefix(PREFIX).rpartition("@")
        if not at:
            raise ValueError(f"{config.path} names no split; write {config.path}@train")
        self._config = config
        builder = _builder(name, config)
        self._features = builder.info.features
        self._parser = example_parser.ExampleParserNp(self._features.get_serialized_info())
        try:
            self._records = builder.as_data_source(
                split, deserialize_method=_RAW, file_format=_FORMAT
            )
        except NotImplementedError as error:
            raise ValueError(
                f"{config.path} is stored as {builder.info.file_format.value}, which has no random "
                "access; build it with --file_format=array_record (or tfds convert_format)"
            ) from error
        except ValueError as error:
            raise ValueError(f"{config.path}: {error}") from None
        self._place = f"{builder.info.full_name}@{split}"
        self._pictures = sorted(k for k, feature in self._features.items() if _has_images(feature))
        self._image = self._image_field()
        self.missing: list[tuple[str, str]] = []  # would take reading all of it
        if not len(self):
            raise ValueError(f"{config.path} has no records")
        self.fingerprint = self._fingerprint(builder, split)
        try:
            self[0]
        except ValueError as error:
            hint = "its fields become one by the source's question= and answer="
            raise ValueError(f"{error}; {hint}" * (not config.answer) or str(error)) from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Raises ValueError, with the place and the field, for a record that is no conversation."""
        place = f"{self._place}[{index}]"
        try:
            raw = self._parser.parse_example(self._records[index])
        except RuntimeError as error:  # ArrayRecord's, for a damaged file
            raise ValueError(f"{place}: {error}") from error
        values = plain(self._features, raw)
        entry = {"id": place} | {k: v for k, v in values.items() if k not in self._pictures}
        stored = _stored_media(values)
        files = values[self._image] if self._image else []
        files = files if isinstance(files, list) else [files]
        images = {f"{place}#{number}": file for number, file in enumerate(files)}
        if images:
            entry |= {"image": "", "images": list(images)}
        if "media" in values:
            for kind in ("video", "image"):
                entry[kind] = [medium["id"] for medium in values["media"] if medium["kind"] == kind]
        if self._config.answer:
            entry = self._exchange(entry, place)
        record = read_record(entry, place)
        store = RecordMedia(images, stored) if images or stored else None
        return replace(record, store=store)

    def _fingerprint(self, builder: Any, split: str) -> str:
        """Of name, version, split, templates, what TFDS knows of the files, and a few records."""
        digest, config = hashlib.sha256(), self._config
        for name in ("dataset_info.json", "features.json"):
            facts = json.loads((tfds.core.Path(builder.data_dir) / name).read_text())
            facts.pop("moduleName", None)  # where the builder's code lay
            digest.update(json.dumps(facts, sort_keys=True).encode())
        how = [builder.info.full_name, split, config.image, config.question, config.answer]
        digest.update(repr(how).encode())
        for index in np.linspace(0, len(self) - 1, _SAMPLED).astype(int).tolist():
            # Built again, records differ where lengths do not; their bytes differ every time.
            raw = self._parser.parse_example(self._records[index])
            digest.update(_bytes(plain(self._features, raw)))
        return digest.hexdigest()[:16]

    def _image_field(self) -> str:
        """The field with the pictures, '' if there is none."""
        wanted, there = self._config.image, [p for p in self._pictures if p != "frames"]
        if wanted and wanted not in self._pictures:
            raise ValueError(
                f"{self._config.path} has no pictures in a field {wanted!r}; it has some in "
                f"{', '.join(there) or 'none'}"
            )
        if not wanted and len(there) > 1:
            raise ValueError(
                f"{self._config.path} has pictures in {', '.join(there)}; choose one by image="
            )
        return wanted or next(iter(there), "")

    def _exchange(self, entry: dict[str, Any], place: str) -> dict[str, Any]:
        """The entry of one question and answer, from the templates."""
        templates = (self._config.question, self._config.answer)
        try:
            question, answer = (template.format_map(entry) for template in templates)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            asked = " or ".join(map(repr, templates))
            raise ValueError(
                f"{place}: {asked} asks for what it has not ({error!r}); its fields are "
                f"{', '.join(sorted(self._features))}"
            ) from None
        media = {k: entry[k] for k in ("id", "sampling", "video", "image", "images") if k in entry}
        if not PLACEHOLDER.search(templates[0]):
            return media | {"question": question, "answer": answer}
        turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
        return media | {"turns": turns}


def plain(feature: Any, value: Any) -> Any:
    """A parsed field as text, numbers, names of classes, lists and dicts; pictures as files."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {k: plain(feature[k], v) for k, v in value.items()}
    if isinstance(feature, (tfds.features.Sequence, tfds.features.Dataset)):
        inner = feature.feature
        if isinstance(inner, tfds.features.FeaturesDict):  # columns -> rows
            rows = zip(*value.values(), strict=True)
            return [plain(inner, dict(zip(value, row, strict=True))) for row in rows]
        return [plain(inner, item) for item in value]
    if isinstance(feature, tfds.features.ClassLabel) and value >= 0:
        return feature.int2str(value)
    if isinstance(value, bytes) and not isinstance(feature, tfds.features.Image):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def _bytes(value: Any) -> bytes:
    """The same for the same values, whatever the order of their fields."""
    if isinstance(value, dict):
        return b"".join(_bytes(item) for item in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return b"(%s)" % b"".join(map(_bytes, value))
    if isinstance(value, np.ndarray):
        return _bytes(value.tolist())
    return value if isinstance(value, bytes) else repr(value).encode()


def _has_images(feature: Any) -> bool:
    image = tfds.features.Image
    return isinstance(feature, image) or isinstance(getattr(feature, "feature", None), image)


def _stored_media(values: dict[str, Any]) -> dict[str, tuple[MediaInfo, list[bytes]]]:
    """Media with their frames, as in tfds_video_conversations.py."""
    if "media" not in values or "frames" not in values:
        return {}
    frames = iter(values["frames"])
    infos = [MediaInfo(**{fact: medium[fact] for fact in _FACTS}) for medium in values["media"]]
    return {info.id: (info, list(islice(frames, info.stored_frames))) for info in infos}


def _builder(name: str, config: SourceConfig) -> Any:
    """The dataset's builder, from its files alone."""
    if (Path(name) / "features.json").is_file():
        return read_only_builder.builder_from_directory(name)
    try:
        return read_only_builder.builder_from_files(name, data_dir=config.data_dir or None)
    except tfds.core.DatasetNotFoundError:
        where = config.data_dir or "TFDS's default folder"
        raise FileNotFoundError(
            f"{config.path}: no such dataset in {where}{_there(config.data_dir)}; the source's "
            "data_dir says where it was built"
        ) from None
    except ValueError:  # TFDS says all that a name may be
        raise FileNotFoundError(
            f"{config.path}: there is no dataset in the folder {name} (no features.json), and no "
            "dataset has such a name; write tfds:NAME[/CONFIG][:VERSION]@SPLIT or "
            "tfds:FOLDER@SPLIT"
        ) from None


def _there(data_dir: str) -> str:
    """Names of the datasets in a folder, for messages."""
    found = Path(data_dir).glob("*/**/features.json") if data_dir else ()
    names = sorted(str(path.parent.relative_to(data_dir)) for path in found)
    return f", which has {', '.join(names)}" if names else ""
