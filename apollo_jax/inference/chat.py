# SPDX-License-Identifier: Apache-2.0
"""A conversation about a video in the terminal; the decoder's cache is kept from turn to turn.

Y layers, S cached positions, B = 1 row.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.markup import escape

from apollo_jax.inference.decoding import (
    PADDING,
    Draw,
    bucket,
    collate,
    decode,
    encode,
    new_token_limits,
)
from apollo_jax.inference.generate import add_arguments, load_model
from apollo_jax.inference.processor import Media, Processor, question
from apollo_jax.models.apollo import Apollo
from apollo_jax.models.qwen2 import KVCache
from data_pipeline.conversation import Turn

TOKENS_AT_A_TIME = 16  # an answer is printed in pieces of this many
HELP = "/video FILE and /image FILE change the subject, /reset forgets what was said, /quit"


class Chat:
    """Questions and answers about at most one video or image, which stands in the first turn."""

    def __init__(
        self,
        model: Apollo,
        processor: Processor,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
    ):
        self.model, self.processor = model, processor
        self.parts = nnx.split(model)
        self.draw = Draw.new(temperature, top_p, seed)
        self.max_new_tokens = max_new_tokens
        self.show(None)

    def show(self, media: Media | None) -> None:
        """Start a new conversation, about `media`."""
        self.media = media
        self.visual = None if media is None else encode(self.model, media.pixels)
        self.reset()

    def reset(self) -> None:
        """Forget what was said, keep the video."""
        self.turns: list[Turn] = []
        self.cache: KVCache | None = None
        self.pending: list[int] = []  # end of the last answer, which nothing has followed yet

    def ask(self, text: str) -> Iterator[str]:
        """The answer, in pieces as they come; an answer not read to its end was never given.

        Raises ValueError if the conversation no longer fits the model's context.
        """
        turns = [*self.turns, question(text, None if self.turns else self.media)]
        rendered = self.processor.render(turns, self.media)
        # The cache holds what the model said; only what follows it is new.
        answered = np.flatnonzero(rendered.loss_weights)
        tail = slice(answered[-1] + 1 if len(answered) else 0, None)
        tokens = np.array([*self.pending, *rendered.tokens[tail]], np.int32)
        index = np.concatenate([np.full(len(self.pending), -1), rendered.visual_index[tail]])
        ids: list[int] = []
        shown, cache = "", self.cache
        for piece, longer in self._decode(tokens, index.astype(np.int32)):
            ids, cache = ids + piece, longer
            answer = self.processor.tokenizer.decode(ids)
            if not answer.endswith("\ufffd"):  # half a character
                yield answer[len(shown) :]
                shown = answer
        ended = ids[-1] in self.processor.stop
        self.pending = [*([] if ended else ids[-1:]), self.processor.tokenizer.eos_id]
        self.cache = cache
        self.turns = [*turns, Turn("assistant", shown)]

    def _decode(self, tokens: np.ndarray, index: np.ndarray) -> Iterator[tuple[list[int], KVCache]]:
        """Pieces of the answer and the cache after each; the last of a piece is not yet in it."""
        cache, visual, length = self.cache, self.visual, bucket(len(tokens))
        used = 0 if cache is None else int(cache.length[0])
        left = int(new_token_limits(self.model, [used + len(tokens)], self.max_new_tokens)[0])
        size = bucket(used + len(tokens) + left)
        for piece in range(left):
            cache = cache if cache is None else grow(cache, size)
            prompts = collate([(tokens, visual if cache is None else None, index)], length)
            limit = np.array([min(left, TOKENS_AT_A_TIME)], np.int32)
            key = jax.random.fold_in(self.draw.key, len(self.turns) * self.max_new_tokens + piece)
            out, cache = decode(
                *self.parts,
                cache,
                prompts,
                self.draw._replace(key=key),
                limit,
                np.asarray(self.processor.stop, np.int32),
                budget=TOKENS_AT_A_TIME,
            )
            ids = [int(i) for i in np.asarray(out)[0] if i != PADDING]
            left -= len(ids)
            yield ids, cache
            if ids[-1] in self.processor.stop or left < 1:
                return
            tokens, index, length = np.array(ids[-1:], np.int32), np.full(1, -1, np.int32), 1


def grow(cache: KVCache, size: int) -> KVCache:
    """The cache with room for at least `size` positions."""
    more = max(0, size - cache.k.shape[2])
    if not more:
        return cache
    k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)]) for x in cache[:2])
    return KVCache(k, v, cache.length)


def main(argv: Sequence[str] | None = None) -> None:
    """`apollo-jax chat`."""
    parser = argparse.ArgumentParser("apollo-jax chat", description="Chat about a video.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    processor = Processor.from_pretrained(args.checkpoint)
    media = watch(console, processor, video=args.video, image=args.image)
    with console.status(f"loading {args.checkpoint}"):
        chat = Chat(
            load_model(args.checkpoint),
            processor,
            temperature=args.temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
            seed=args.seed,
        )
        chat.show(media)
    console.print(HELP, style="dim", markup=False)
    converse(console, chat)


def converse(console: Console, chat: Chat) -> None:
    """Reads questions and commands until /quit or the end of the input."""
    while True:
        try:
            line = console.input("[bold cyan]you >[/] ").strip()
        except EOFError:
            return
        try:
            if line == "/quit":
                return
            if line:
                respond(console, chat, line)
        except KeyboardInterrupt:
            console.print("\n(stopped; the question is forgotten)", style="dim")
        except (ValueError, OSError) as error:
            console.print(f"[bold red]error:[/] {escape(str(error))}")


def respond(console: Console, chat: Chat, line: str) -> None:
    """One command or one question."""
    command, _, file = line.partition(" ")
    file = file.strip().strip("\"'")
    if command in ("/video", "/image") and file:
        chat.show(watch(console, chat.processor, **{command[1:]: file}))
    elif command == "/reset":
        chat.reset()
        console.print("(a new conversation)", style="dim")
    elif command.startswith("/"):
        console.print(HELP, style="dim", markup=False)
    else:
        console.print("[bold green]apollo >[/] ", end="")
        for piece in chat.ask(line):
            console.print(piece, end="", markup=False, soft_wrap=True)
        console.print()


def watch(console: Console, processor: Processor, **file: Any) -> Media | None:
    """Read a file, if one is given, and say what was seen of it."""
    name = next((f for f in file.values() if f), "")
    with console.status(f"watching {escape(name)}"):
        media = processor.media(**file)
    if media is not None:
        count, duration = len(media.clips.timestamps), media.clips.duration
        what = f"{count} clips from {duration:.1f} s" if duration else "image"
        console.print(f"({name}: {what})", style="dim", markup=False)
    return media
