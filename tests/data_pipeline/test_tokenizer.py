# SPDX-License-Identifier: Apache-2.0
"""Both kinds of tokenizer: ids, round trips, special tokens, saving, errors."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data_pipeline.tokenizer import CHATML, Tokenizer, train_sentencepiece

LLM = Path(__file__).parents[1] / "fixtures" / "apollo-tiny-a" / "checkpoint" / "llm"
TEXTS = [
    f"What colour is the {colour} {shape}?\nThe {shape} moves {way}."
    for colour in ("red", "blue", "green")
    for shape in ("square", "circle")
    for way in ("left", "right", "up")
]
AWKWARD = "<|im_start|>user\n\nHow  many  é𝄞   red\r\n squares, 1234?\t<|im_end|>\n  x "


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    train_sentencepiece(TEXTS, path, 340)
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A model as others train them: control tokens, dummy prefix, no ChatML."""
    path = tmp_path_factory.mktemp("foreign") / "spiece.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=30, minloglevel=2
        )
    return path


def test_qwen2_files_give_the_official_ids():
    tokenizer = Tokenizer.from_path(LLM)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (404, 401, 403)
    assert tokenizer.encode("<|im_start|>user\n") == [402, 345, 198]
    assert tokenizer.encode("moving.<|im_end|>")[-1] == 403
    assert tokenizer.decode(tokenizer.encode(AWKWARD), skip_special=False) == AWKWARD
    assert tokenizer.decode([402, 345, 403, 9999]) == "user"


def test_a_folder_above_and_each_file_name_the_same_tokenizer():
    one = Tokenizer.from_path(LLM)
    for path in (LLM.parent, LLM / "vocab.json", LLM / "merges.txt"):
        assert Tokenizer.from_path(path).fingerprint == one.fingerprint


def test_tokenizer_json_and_the_pair_of_files_agree(tmp_path):
    pair = Tokenizer.from_path(LLM)
    pair._model._tokenizer.save(str(tmp_path / "tokenizer.json"))  # pyright: ignore
    single = Tokenizer.from_path(tmp_path)
    assert single.encode(AWKWARD) == pair.encode(AWKWARD)
    assert (single.pad_id, single.eos_id) == (pair.pad_id, pair.eos_id)


def test_added_tokens_are_read_from_either_file_and_must_fit(tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(LLM / name, tmp_path)
    assert Tokenizer.from_path(tmp_path).eos_id == 403
    (tmp_path / "added_tokens.json").write_text(json.dumps({CHATML[0]: 500}))
    with pytest.raises(ValueError, match=r"added_tokens\.json.*should be id"):
        Tokenizer.from_path(tmp_path)


@pytest.mark.parametrize("kind", ["qwen2", "trained", "foreign"])
def test_save_carries_every_file(kind, tmp_path, request):
    source = LLM if kind == "qwen2" else request.getfixturevalue(kind)
    before = Tokenizer.from_path(source)
    before.save(tmp_path / "export")
    after = Tokenizer.from_path(tmp_path / "export")
    assert after.fingerprint == before.fingerprint
    assert after.encode(AWKWARD) == before.encode(AWKWARD)
    if kind == "qwen2":
        saved = {path.name for path in (tmp_path / "export").iterdir()}
        assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= saved


def test_a_trained_model_is_lossless_and_splits_digits(trained):
    tokenizer = Tokenizer.from_path(trained.parent)
    assert tokenizer.decode(tokenizer.encode(AWKWARD), skip_special=False) == AWKWARD
    assert tokenizer.encode(" square") == [tokenizer.token_id("▁square")]
    assert len(tokenizer.encode("1234")) == 4
    assert [tokenizer.encode(token) for token in CHATML] == [[1], [2], [3]]
    assert tokenizer.decode([2, *tokenizer.encode("red"), 3]) == "red"


def test_training_is_repeatable_and_never_larger_than_asked(trained, tmp_path):
    train_sentencepiece(TEXTS, tmp_path / "again.model", 340)
    assert (tmp_path / "again.model").read_bytes() == trained.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))
    assert Tokenizer.from_path(trained).vocab_size <= 340
    with pytest.raises(ValueError, match="model of 100"):
        train_sentencepiece(TEXTS, tmp_path / "small.model", 100)


def test_a_foreign_model_gets_chatml_after_its_last_piece(foreign):
    tokenizer = Tokenizer.from_path(foreign)
    assert tokenizer.vocab_size == 33
    assert tokenizer.encode("<|endoftext|><|im_start|>a<|im_end|>")[:2] == [30, 31]
    assert tokenizer.eos_id == 32
    assert tokenizer.token_id("</s>") == 2
    ids = tokenizer.encode("the square<|im_end|>")
    assert ids[-1] == 32
    assert tokenizer.decode(ids) == "the square"
    assert tokenizer.decode(ids, skip_special=False) == "the square<|im_end|>"


def test_errors_say_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Tokenizer.from_path(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json.*\*\.model"):
        Tokenizer.from_path(tmp_path)
    with pytest.raises(ValueError, match=r"no token '<\|im_ned\|>'; did you mean '<\|im_end\|>'"):
        Tokenizer.from_path(LLM).token_id("<|im_ned|>")
    broken = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    broken.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="endoftext"):
        Tokenizer.from_path(tmp_path)


def test_how_two_differ_is_said(trained, tmp_path):
    def difference(texts: str, others: str) -> str:
        for name, text in (("a", texts), ("b", others)):
            train_sentencepiece([text], tmp_path / f"{name}.model", 300)
        a, b = (Tokenizer.from_path(tmp_path / f"{name}.model") for name in "ab")
        return a.difference(b)

    assert not Tokenizer.from_path(trained).difference(Tokenizer.from_path(trained.parent))
    said = "271 and 271 tokens, 6 with another id, like 'ab': 260 and 261"
    assert difference("ab ab ab cd cd", "cd cd cd ab ab") == said
    assert "only in one" in difference("ab ab", "cd cd")
    other = shutil.copytree(LLM, tmp_path / "llm")
    merges = (other / "merges.txt").read_text().splitlines(keepends=True)
    (other / "merges.txt").write_text("".join([*merges[:-2], *reversed(merges[-2:])]))
    published = Tokenizer.from_path(LLM)
    said = published.difference(Tokenizer.from_path(other))
    assert said.endswith(" tokens, the same, but other rules")


def test_the_same_in_other_files_does_not_differ(tmp_path):
    """Qwen publishes both tokenizer.json and vocab.json with merges.txt."""
    published = Tokenizer.from_path(LLM)
    content = json.loads(published._model._tokenizer.to_str())  # pyright: ignore
    for name, normalizer in (("same", content["normalizer"]), ("other", {"type": "Lowercase"})):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "tokenizer.json"
        file.write_text(json.dumps(content | {"normalizer": normalizer}))
    same, other = (Tokenizer.from_path(tmp_path / name) for name in ("same", "other"))
    assert not published.difference(same)
    assert same.fingerprint != published.fingerprint
    assert published.difference(other).endswith("the same, but other rules")
