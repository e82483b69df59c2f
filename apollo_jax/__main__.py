# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax COMMAND ...`: the table of commands, each a module with `main(argv)`."""

import difflib
import importlib
import os
import sys

COMMANDS = {
    "demo": ("apollo_jax.demo", "build, train and question a tiny Apollo, in minutes on a CPU"),
    "predecode": ("data_pipeline.predecode", "videos to shards of frames at a fixed rate"),
    "shards": ("data_pipeline.shards", "list, show, verify and repair shards of frames"),
    "data": ("apollo_jax.data", "check the data of an experiment before training, look at samples"),
    "train": ("apollo_jax.training.train", "train one stage, or continue it"),
    "contrastive": ("apollo_jax.training.contrastive", "pretrain encoders on clips and captions"),
    "critical-batch": (
        "apollo_jax.training.critical_batch",
        "how large a batch may be from a checkpoint on, by forking the run",
    ),
    "evaluate": ("apollo_jax.evaluation.evaluate", "score a checkpoint on a benchmark"),
    "generate": ("apollo_jax.inference.generate", "answer a question about a video"),
    "chat": ("apollo_jax.inference.chat", "talk about a video in the terminal"),
    "convert": ("apollo_jax.checkpoints.convert", "to and from the published checkpoint layout"),
    "plan": (
        "apollo_jax.planning.plan",
        "what a recipe needs of a TPU slice, found by compiling it",
    ),
}


def main() -> None:
    """Run the command; a wrong input becomes one line and exit code 2 (--debug: the traceback)."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments or os.environ.get("APOLLO_DEBUG") == "1"
    command, *rest = [a for a in arguments if a != "--debug"] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(usage())
        return
    try:
        run(command, rest)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if debug:
            raise
        sys.exit(_fail(command, error))


def run(command: str, arguments: list[str]) -> None:
    """Import the command's module and call it. ValueError for an unknown command."""
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        guess = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
        raise ValueError(f"no such command; {guess}")
    importlib.import_module(COMMANDS[command][0]).main(arguments)


def usage() -> str:
    """The help text."""
    lines = [f"  {name:<14} {what}" for name, (_, what) in COMMANDS.items()]
    head = "usage: apollo-jax COMMAND ...   (apollo-jax COMMAND --help says more)"
    return "\n".join([head, "", *lines, "", "--debug with any command: show tracebacks"])


def _fail(command: str, error: Exception) -> int:
    print(f"apollo-jax {command}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
