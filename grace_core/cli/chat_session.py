"""The terminal's side of `grace chat`: lines are questions or commands, answers are streamed."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from grace_core.errors import GraceError

if TYPE_CHECKING:
    from PIL import Image

    from grace_core.inference.chat import Answer, Chat

_HELP = """\
/image FILE   add a picture to the next question
/reset        forget the conversation and its pictures
/help         this
/quit         end, as Ctrl-D does
Ctrl-C ends an answer; twice, the chat. A question that begins with / takes a space before it."""

_MAX_DECODED_PIXELS = 100_000_000


class ChatSession:
    """Reads what a person types, until they leave."""

    def __init__(self, chat: Chat, *, max_new_tokens: int, aside: Console) -> None:
        """aside: for all that is no answer."""
        self._chat = chat
        self._max_new_tokens = max_new_tokens
        self._aside = aside
        self._pictures: list[Image.Image] = []
        self._interrupted = False

    def attach(self, name: str, picture: Image.Image) -> None:
        """Add a picture to the next question."""
        self._pictures.append(picture)
        tokens = self._chat.picture_tokens(picture)
        self._say(f"{name}: {picture.width} x {picture.height} pixels, {tokens:,} tokens")

    def run(self) -> None:
        """The conversation, until /quit, the end of the input, or Ctrl-C twice."""
        with suppress(ImportError):  # keys that edit a line and bring back earlier ones
            __import__("readline")
        while True:
            try:
                line = input("> ")
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                self._say("")
                if self._interrupted:
                    return
                self._interrupted = True
                self._say("Ctrl-C once more ends the chat")
                continue
            self._interrupted = False
            try:
                if not self._go_on(line):
                    return
            except KeyboardInterrupt:  # in the midst of an answer's end
                return

    def _go_on(self, line: str) -> bool:
        """Do what a line says; False where it ends the chat."""
        try:
            if line.startswith("/"):
                return self._command(line)
            if line.strip():
                self._answer(line.strip())
        except GraceError as error:
            self._say(f"error: {error}", style="red")
        return True

    def _command(self, line: str) -> bool:
        name, _, argument = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name == "/image":
            file = _path(argument)
            self.attach(file.name, read_picture(file))
        elif name == "/reset":
            self._chat.reset()
            self._pictures = []
            self._say("the conversation is forgotten")
        elif name == "/help":
            self._say(_HELP)
        else:
            self._say(f"there is no command {name}; /help lists them", style="red")
        return True

    def _answer(self, text: str) -> None:
        ask = self._chat.ask(text, self._pictures, max_new_tokens=self._max_new_tokens)
        try:
            with closing(ask) as pieces:
                for piece in pieces:
                    self._pictures = []  # part of the conversation now
                    sys.stdout.write(printable(piece))
                    sys.stdout.flush()
        except KeyboardInterrupt:
            self._interrupted = True
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._say(told(self._chat.answer), style="dim")

    def _say(self, text: str, style: str | None = None) -> None:
        self._aside.print(text, style=style, markup=False)


def told(answer: Answer) -> str:
    """One line on an answer: how long, how fast."""
    speed = answer.tokens_per_second
    parts = [
        f"{answer.tokens:,} tokens" + ("" if speed is None else f", {speed:,.1f} tokens/s"),
        f"{answer.read:,} read in {answer.read_seconds:.2f} s",
    ]
    if not answer.complete:
        parts.append("cut short")
    return "; ".join(parts)


def printable(text: str) -> str:
    """Without what a terminal would obey: a model may say anything."""
    return "".join(one for one in text if one in "\n\t" or one.isprintable() or one == "\u200d")


def read_picture(file: Path) -> Image.Image:
    """An upright RGB picture. Raises GraceError where there is none, or none of a known format."""
    from grace_core.data.pictures import open_picture
    from grace_core.data.sharegpt4v import UnusableRecord

    if not file.is_file():
        raise GraceError(f"there is no picture {file}; give the path of a file")
    try:
        return open_picture(file, _MAX_DECODED_PIXELS)
    except UnusableRecord as error:
        raise GraceError(
            f"{file} cannot be used as a picture ({error.detail}); give another, or make it a PNG "
            f"or JPEG of at most {_MAX_DECODED_PIXELS:,} pixels"
        ) from error


def _path(argument: str) -> Path:
    """A path as typed: with quotes or without, whatever spaces it holds."""
    argument = argument.strip()
    if not argument:
        raise GraceError("/image takes the path of a picture: /image cat.jpg")
    if argument[0] in "'\"":
        with suppress(ValueError):  # quotes that do not close are part of the name
            argument = " ".join(shlex.split(argument))
    return Path(argument).expanduser()
