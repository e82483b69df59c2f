# SPDX-License-Identifier: Apache-2.0
"""Tokenizer: Qwen2 byte-level BPE and sentencepiece models behind one small class.

Both know the three ChatML tokens. A sentencepiece model without them (any published one) gets
them on the ids after its last piece, so that any model by path can be trained and chatted with.
"""

import difflib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

PAD, TURN_START, TURN_END = CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# How Qwen2 cuts text before merging bytes (as published in its tokenizer.json).
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BPE_FILES = ("vocab.json", "merges.txt")
_SIDE_FILES = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")


class Tokenizer:
    """Text to ids and back; `pad_id` is <|endoftext|>, `eos_id` the end of a turn, <|im_end|>."""

    def __init__(self, model: "_Bpe | _Sentencepiece", files: dict[str, bytes]):
        self._model = model
        self._files = files
        self._short = lru_cache(maxsize=1 << 16)(model.encode)  # "1.7-3.2 seconds: " and its kin
        self.vocab_size = model.vocab_size
        self.pad_id = self.token_id(PAD)
        self.eos_id = self.token_id(TURN_END)
        digest = hashlib.sha256()
        for name in sorted(set(files) - set(_SIDE_FILES[1:])):  # those that decide the ids
            digest.update(name.encode() + b"\0" + files[name])
        self.fingerprint = digest.hexdigest()[:16]

    @classmethod
    def from_path(cls, path: str | os.PathLike) -> "Tokenizer":
        """The tokenizer in a folder (or its `llm` sub-folder); a file stands for its folder.

        Reads tokenizer.json, else vocab.json + merges.txt, else one sentencepiece *.model.
        Raises FileNotFoundError naming what was looked for.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"tokenizer {path} does not exist")
        folder = path if path.is_dir() else path.parent
        pieces = [path] if path.suffix == ".model" else sorted(folder.glob("*.model"))
        if path.suffix != ".model":
            if (folder / "tokenizer.json").is_file():
                return cls(_Bpe.from_json(folder), _read(folder, "tokenizer.json", *_BPE_FILES))
            if all((folder / name).is_file() for name in _BPE_FILES):
                return cls(_Bpe.from_vocabulary(folder), _read(folder, *_BPE_FILES))
        if len(pieces) == 1:
            content = pieces[0].read_bytes()
            return cls(_Sentencepiece(content), {pieces[0].name: content})
        if (folder / "llm").is_dir():
            return cls.from_path(folder / "llm")
        raise FileNotFoundError(
            f"{path} holds no tokenizer: expected tokenizer.json, vocab.json + merges.txt, or one "
            f"sentencepiece *.model (found {len(pieces)})"
        )

    def difference(self, other: "Tokenizer") -> str:
        """What tells two tokenizers apart; "" if they give the same ids, from whatever files."""
        if self.fingerprint == other.fingerprint:
            return ""
        ours, theirs = ({t: m.token_id(t) for t in m.tokens()} for m in (self._model, other._model))
        both = ours.keys() & theirs.keys()
        moved = sorted((ours[t], theirs[t], t) for t in both if ours[t] != theirs[t])
        if ours == theirs and self._model.rules() == other._model.rules():
            text = self.decode(range(self.vocab_size), skip_special=False)
            if self.encode(text) == other.encode(text):  # so they cut it alike
                return ""
        said = [f"{self.vocab_size} and {other.vocab_size} tokens"]
        if alone := len(ours.keys() ^ theirs.keys()):
            said.append(f"{alone} of them only in one")
        if moved:
            was, now, token = moved[0]
            said.append(f"{len(moved)} with another id, like {token!r}: {was} and {now}")
        return ", ".join(said if alone or moved else [*said, "the same, but other rules"])

    def encode(self, text: str) -> list[int]:
        """Ids of `text`: nothing is added, special tokens spelt in the text are recognised."""
        return list(self._short(text) if len(text) < 64 else self._model.encode(text))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; ids beyond the vocabulary (a padded embedding's rows) are ignored."""
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._model.decode(known, skip_special)

    def token_id(self, token: str) -> int:
        """The id of one token by its spelling; ValueError with near misses if there is none."""
        index = self._model.token_id(token)
        if index is None:
            near = difflib.get_close_matches(token, self._model.tokens(), n=3, cutoff=0.6)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"the tokenizer has no token {token!r}{hint}")
        return index

    def save(self, path: str | os.PathLike) -> None:
        """Writes the files it was read from into the folder `path` (exports carry them)."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            _write(folder / name, content)


def train_sentencepiece(
    texts: Iterable[str],
    model_path: str | os.PathLike,
    vocab_size: int,
    symbols: Sequence[str] = CHATML,
) -> None:
    """Trains a lossless BPE model with byte fallback on `texts` and writes it atomically.

    The vocabulary may end up smaller than `vocab_size` when `texts` have fewer pieces to offer.
    Raises ValueError if it cannot even hold the bytes, the symbols and the characters.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",  # of a few hundred sentences a unigram model keeps hardly a word
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            user_defined_symbols=list(symbols),
            byte_fallback=True,
            split_by_number=False,  # "0.0-1.5" and " (B)" may become one piece
            split_by_unicode_script=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # the same texts give the same model
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"cannot train a sentencepiece model of {vocab_size}: {error}") from error
    _write(Path(model_path), model.getvalue())


class _Bpe:
    """A model of the `tokenizers` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

    @classmethod
    def from_json(cls, folder: Path) -> "_Bpe":
        return cls(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))

    @classmethod
    def from_vocabulary(cls, folder: Path) -> "_Bpe":
        """Qwen2's pipeline around the older pair of files, ids as in transformers' tokenizer."""
        model = models.BPE.from_file(*(str(folder / name) for name in _BPE_FILES))
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        for token, index in _added_tokens(folder):
            tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False)])
            if tokenizer.token_to_id(token) != index:
                raise ValueError(
                    f"{folder / 'added_tokens.json'}: {token!r} should be id {index}, but the "
                    f"vocabulary gives it {tokenizer.token_to_id(token)}"
                )
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def tokens(self) -> list[str]:
        return list(self._tokenizer.get_vocab())

    def rules(self) -> list | None:
        """The merges, in the order in which they apply."""
        return json.loads(self._tokenizer.to_str())["model"].get("merges")


class _Sentencepiece:
    """A sentencepiece model, its text cut at the ChatML tokens first."""

    def __init__(self, content: bytes):
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        size = self._pieces.get_piece_size()
        self._special: dict[str, int] = {}
        for token in CHATML:
            own = self._piece_id(token)
            self._special[token] = size if own is None else own
            size += own is None
        self.vocab_size = size
        self._names = {index: token for token, index in self._special.items()}
        self._cut = re.compile("(" + "|".join(map(re.escape, CHATML)) + ")")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for run in filter(None, self._cut.split(text)):
            special = self._special.get(run)
            ids += self._pieces.encode(run) if special is None else [special]
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        text, run = "", []
        for index in [*ids, -1]:
            if index >= 0 and index not in self._names:
                run.append(index)
                continue
            text += self._pieces.decode(run)
            run = []
            if index >= 0 and not skip_special:
                text += self._names[index]
        return text

    def token_id(self, token: str) -> int | None:
        own = self._piece_id(token)
        return self._special.get(token) if own is None else own

    def tokens(self) -> list[str]:
        return [self._pieces.id_to_piece(i) for i in range(self._pieces.get_piece_size())]

    def rules(self) -> bytes:
        return self._pieces.serialized_model_proto()

    def _piece_id(self, token: str) -> int | None:
        index = self._pieces.piece_to_id(token)
        return index if self._pieces.id_to_piece(index) == token else None


def _added_tokens(folder: Path) -> list[tuple[str, int]]:
    """(token, id) by rising id, from added_tokens.json or tokenizer_config.json."""
    added: dict[str, int] = {}
    config = folder / "tokenizer_config.json"
    if config.is_file():
        decoder = json.loads(config.read_text()).get("added_tokens_decoder", {})
        added |= {entry["content"]: int(index) for index, entry in decoder.items()}
    if (folder / "added_tokens.json").is_file():
        added |= json.loads((folder / "added_tokens.json").read_text())
    return sorted(added.items(), key=lambda item: item[1])


def _read(folder: Path, *names: str) -> dict[str, bytes]:
    found = [folder / name for name in (*names, *_SIDE_FILES) if (folder / name).is_file()]
    return {path.name: path.read_bytes() for path in found}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
