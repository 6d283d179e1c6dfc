"""`grace chat`: talk to a release or checkpoint, in the terminal or from a script."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from grace_core.cli.app import INTERRUPTED, app
from grace_core.errors import GraceError

if TYPE_CHECKING:
    from PIL import Image

    from grace_core.inference.chat import Chat
    from grace_core.models.loading import CheckpointFolder

_aside = Console(stderr=True, highlight=False, soft_wrap=True)
"""For all but answers, so that these alone are on standard output."""


@app.command(
    rich_help_panel="Checkpoints",
    epilog="Examples:\n\n"
    "grace chat runs/demo/releases/Toy-GRACE-W4G128                 a conversation\n\n"
    "grace chat Qwen/Qwen3-VL-2B-Instruct --image cat.jpg           about a picture\n\n"
    'grace chat MODEL --image cat.jpg --prompt "What is this?"      one answer\n\n'
    "grace chat MODEL < question.txt > answer.txt                   the same, from a file",
)
def chat(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a release or checkpoint, or repository `owner/name` of the Hub.",
            show_default=False,
        ),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture of the first question; repeatable.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Answer this and end; without a terminal, standard input is the prompt."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0, help="0 takes the likeliest token; 1 draws with the model's own probabilities."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of drawing, where temperature is not 0.")] = 0,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Make larger pictures smaller, where the model's pictures differ in size: fewer "
            "tokens. By default, the checkpoint's own limit.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit of the Hub's repository.", show_default=False)
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = (
        "auto"
    ),
) -> None:
    """Talk to a release or checkpoint: BF16, W8, W4, and W4 as AWQ.

    In the terminal, answers appear as they are made. /image FILE adds a
    picture to the next question, /help lists what else there is. Ctrl-C ends
    an answer; twice, the chat.

    With --prompt, or where standard input is no terminal, there is one answer,
    alone on standard output. Quantized layers stay packed; see docs/inference.md.
    """
    from grace_core.cli.chat_session import ChatSession, read_picture

    # Nothing is lost when a chat is ended; and Ctrl-C, which it is otherwise turned into, is not
    # the end of one.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    pictures = [(file, read_picture(file)) for file in image or []]
    alone = prompt is not None or not sys.stdin.isatty()
    text = "" if not alone else _standard_input() if prompt is None else prompt
    if alone and not text.strip():
        raise GraceError("the question is empty; give --prompt TEXT, or text on standard input")
    try:
        made, title = _loaded(model, revision, device, max_pixels, temperature, seed)
        if alone:
            _answer(made, text, [picture for _, picture in pictures], max_new_tokens)
            return
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    session = ChatSession(made, max_new_tokens=max_new_tokens, aside=_aside)
    _aside.print(f"{title}. /help lists commands.", markup=False)
    for file, picture in pictures:
        session.attach(file.name, picture)
    session.run()


def _loaded(
    model: str,
    revision: str | None,
    device: Literal["auto", "cpu", "cuda"],
    max_pixels: int | None,
    temperature: float,
    seed: int,
) -> tuple[Chat, str]:
    """The conversation, and one line on who answers."""
    import transformers

    from grace_core.bench.device import bench_device
    from grace_core.config.models import CheckpointSource
    from grace_core.inference.chat import Chat
    from grace_core.inference.loading import load_release
    from grace_core.models.loading import locate_checkpoint

    where = bench_device(device)
    checkpoint = locate_checkpoint(CheckpointSource(path=model, revision=revision))  # with its bars
    transformers.utils.logging.disable_progress_bar()
    with _aside.status("loading the model"):
        loaded = load_release(checkpoint.path, where)
    made = Chat(loaded, checkpoint, max_pixels=max_pixels, temperature=temperature, seed=seed)
    return made, _title(checkpoint, str(where))


def _title(checkpoint: CheckpointFolder, device: str) -> str:
    from grace_core.inference.loading import describe

    return f"{checkpoint.path.name} ({describe(checkpoint)}) on {device}"


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise GraceError(f"standard input is no {error.encoding} text ({error})") from error


def _answer(chat: Chat, text: str, pictures: Sequence[Image.Image], max_new_tokens: int) -> None:
    from grace_core.cli.chat_session import told

    for piece in chat.ask(text, pictures, max_new_tokens=max_new_tokens):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    _aside.print(told(chat.answer), style="dim", markup=False)
