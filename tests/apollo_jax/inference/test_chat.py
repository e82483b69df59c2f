# SPDX-License-Identifier: Apache-2.0
import dataclasses
import io

import numpy as np
import pytest

from apollo_jax.inference import chat as command
from apollo_jax.inference import generate
from apollo_jax.inference.chat import Chat
from apollo_jax.inference.decoding import collate, encode, generate_tokens
from data_pipeline.conversation import Turn


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(command, "TOKENS_AT_A_TIME", 4)


@pytest.fixture
def media(processor, official):
    return processor.media(frames=official["video"], fps=10.0)


@pytest.fixture
def chat(model, processor, media):
    chat = Chat(model, processor, max_new_tokens=10)
    chat.show(media)
    return chat


def say(chat: Chat, *questions: str) -> list[str]:
    return ["".join(chat.ask(question)) for question in questions]


class Recorder:
    """A tokenizer that remembers the ids it was last asked to decode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids):
        self.ids = list(ids)
        return self.tokenizer.decode(ids)


@pytest.fixture
def recorded(model, processor, media):
    """A chat, and the ids of its latest answer."""
    recorder = Recorder(processor.tokenizer)
    chat = Chat(model, dataclasses.replace(processor, tokenizer=recorder), max_new_tokens=10)
    chat.show(media)
    return chat, recorder


def test_the_kept_cache_answers_as_the_whole_conversation_does(model, processor, media, recorded):
    chat, recorder = recorded
    tokenizer = processor.tokenizer
    first = processor.render([Turn("user", "<video>\nWhat moves?")], media)
    history, visual = first.tokens.tolist(), encode(model, media.pixels)
    for question in ("What moves?", "Where to?", "Why, and for how long will it go on?"):
        if history[-1] == tokenizer.eos_id:
            turn = f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            history += tokenizer.encode(turn)
        index = np.full(len(history), -1, np.int32)
        index[: len(first.tokens)] = first.visual_index
        row = (np.array(history, np.int32), visual, index)
        wanted = generate_tokens(model, *collate([row]), stop=processor.stop, max_new_tokens=10)[0]
        say(chat, question)
        assert recorder.ids == [i for i in wanted.tolist() if i >= 0]
        history += [i for i in recorder.ids if i not in processor.stop] + [tokenizer.eos_id]


def test_pieces_join_to_the_answer(chat, model, processor, official):
    example = processor(frames=official["video"], fps=10.0, prompt="What moves?")
    pieces = list(chat.ask("What moves?"))
    assert len(pieces) > 1
    wanted = generate.answer(model, processor, example, max_new_tokens=10)
    assert "".join(pieces).strip() == wanted.rstrip("\ufffd")


def test_an_answer_ends_at_the_stop_token_and_the_chat_goes_on(recorded):
    chat, recorder = recorded
    say(chat, "What moves?")
    stop = recorder.ids[5]  # in the second piece
    end = recorder.ids.index(stop) + 1
    recorder.eos_id = stop
    chat.reset()
    say(chat, "What moves?")
    assert len(recorder.ids) == end
    assert chat.pending == [stop]
    say(chat, "And?")
    assert int(chat.cache.length[0]) > 112 + end


def test_an_interrupted_answer_was_never_given(chat):
    before = say(chat, "What moves?")
    undisturbed = say(chat, "Why?")
    chat.reset()
    assert say(chat, "What moves?") == before
    interrupted = chat.ask("Something else?")
    next(interrupted)
    interrupted.close()
    assert say(chat, "Why?") == undisturbed


def test_reset_and_show_start_anew(chat, media):
    first = say(chat, "What moves?")
    later = say(chat, "What moves?")
    chat.reset()
    assert say(chat, "What moves?") == first != later
    chat.show(None)
    text_only = say(chat, "What moves?")
    assert text_only not in (first, later)
    chat.show(media)
    assert say(chat, "What moves?") == first


def test_a_draw_differs_between_turns_but_not_between_chats(model, processor):
    def three() -> list[str]:
        chat = Chat(model, processor, temperature=5.0, max_new_tokens=12, seed=1)
        return [say(chat, "Hm?")[0] for _ in range(3)]

    answers = three()
    assert len(set(answers)) == 3
    assert three() == answers


def test_a_conversation_ends_with_the_context(chat):
    chat.max_new_tokens = 2
    question = "And what about this one, what does it do? " * 4
    with pytest.raises(ValueError, match="the model reads at most 512"):
        say(chat, *[question] * 20)
    kept = list(chat.turns)
    with pytest.raises(ValueError, match="at most 512"):
        say(chat, "word " * 600)
    assert chat.turns == kept
    chat.reset()
    assert say(chat, "And now?")


@pytest.fixture
def loaded(model, monkeypatch):
    """The command finds the model loaded and compiled already."""
    monkeypatch.setattr(command, "load_model", lambda _: model)


def run(monkeypatch, capsys, lines: list[str], *arguments: object) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    monkeypatch.setenv("COLUMNS", "1000")  # paths of any length stay on one line
    command.main([*map(str, arguments), "--max-new-tokens", "3"])
    return capsys.readouterr().out


def test_terminal(monkeypatch, capsys, checkpoint, video, loaded):
    lines = [f"/video {video}", "What moves?", "", "/reset", "What moves?", "/nonsense"]
    out = run(monkeypatch, capsys, [*lines, "/quit", "never read"], "--checkpoint", checkpoint)
    told = out.replace("\n", "")
    assert "video.mp4: 2 clips from 3.7 s" in told
    answers = [part.partition("you >")[0] for part in told.split("apollo > ")[1:]]
    assert len(answers) == 2
    assert answers[0] == answers[1].replace("(a new conversation)", "")
    assert told.count("/reset forgets") == 2  # at the start and after the nonsense


def test_terminal_with_a_video_until_the_input_ends(monkeypatch, capsys, checkpoint, video):
    out = run(monkeypatch, capsys, ["Hm?"], "--checkpoint", checkpoint, "--video", video)
    assert out.count("apollo >") == 1


def test_terminal_says_what_is_wrong_and_goes_on(monkeypatch, capsys, checkpoint, loaded):
    lines = ["/video nowhere.mp4", "/image nowhere.png", "<image> what?", "word " * 600, "Hm?"]
    out = run(monkeypatch, capsys, lines, "--checkpoint", checkpoint).replace("\n", "")
    assert "error: nowhere.mp4: there is no such file" in out
    assert "error: nowhere.png: there is no such file" in out
    assert "speaks of <image> but neither video nor image" in out
    assert "the model reads at most 512" in out
    assert "\ufffd" not in out.rpartition("apollo > ")[2][:1]
    with pytest.raises(ValueError, match=r"nowhere\.mp4"):
        run(monkeypatch, capsys, [], "--checkpoint", checkpoint, "--video", "nowhere.mp4")
