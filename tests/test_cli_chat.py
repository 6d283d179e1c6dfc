"""`grace chat`: a conversation in a terminal, one answer without, and how mistakes end."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from grace_core.cli import main
from grace_core.cli.chat_session import ChatSession, printable
from grace_core.errors import GraceError
from grace_core.inference.chat import Answer, Chat
from grace_core.inference.loading import load_release
from grace_core.models.loading import read_checkpoint
from tests.engine_models import lively
from tests.packed_releases import packed_release
from tests.tiny_models import save_tiny

ROOT = Path(__file__).resolve().parent.parent
INTERRUPT = "\x03"

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Runs `grace chat` in this process, with some bytes on standard input."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object, given: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            main(["chat", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int | None)
        return ended.value.code or 0, out, " ".join(err.split())

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(lively("qwen3_vl"), tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("my pictures") / "a ramp.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(file)
    return file


def expected(folder: Path, text: str, pictures: Sequence[Path], limit: int) -> str:
    chat = Chat(load_release(folder, "cpu"), read_checkpoint(folder))
    opened = [Image.open(file).convert("RGB") for file in pictures]
    return "".join(chat.ask(text, opened, max_new_tokens=limit))


def test_one_answer_alone_on_standard_output(cli: Cli, folder: Path, picture: Path) -> None:
    options = ("--device", "cpu", "--max-new-tokens", 9)
    code, out, err = cli(folder, *options, "--image", picture, "--prompt", "What is this?")
    assert (code, out) == (0, expected(folder, "What is this?", [picture], 9) + "\n")
    assert "9 tokens," in err and "read in" in err and "cut short" in err
    code, out, _ = cli(folder, *options, given="Grüße?\n".encode())
    assert (code, out) == (0, expected(folder, "Grüße?\n", [], 9) + "\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_packed_releases_and_sampling(cli: Cli, tmp_path: Path) -> None:
    release = packed_release(tmp_path, "llava", 4)
    options = ("--device", "cpu", "--max-new-tokens", 9, "--prompt", "hi", "--temperature", 2)
    said = [cli(release, *options, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_mistakes_are_told_before_the_model_is_read(
    cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    monkeypatch.setattr("grace_core.cli.chat_command._loaded", lambda *_: pytest.fail("read"))
    for image, said in (
        (tmp_path / "none.png", "there is no picture"),
        (broken, "cannot be used as a picture (none of the formats"),
    ):
        code, out, err = cli(folder, "--image", image, "--prompt", "what?")
        assert (code, out) == (1, "") and said in err
    assert "the question is empty" in cli(folder, given=b" \n")[2]
    assert "standard input is no utf-8 text" in cli(folder, given=b"\xff\xfe")[2]


def test_mistakes_about_the_model(cli: Cli, folder: Path, tmp_path: Path) -> None:
    options = ("--prompt", "hi", "--device", "cpu")
    assert "give a directory or a Hub repository" in cli("no-such-model", *options)[2]
    assert "check the name" in cli("no/model", *options)[2]
    assert "holds no config.json" in cli(tmp_path, *options)[2]
    code, _, err = cli(folder, *options, "--max-new-tokens", 5000)
    assert code == 1 and "limit the answer (--max-new-tokens)" in err


class Scripted:
    """A `Chat` that answers with what it was asked."""

    def __init__(self) -> None:
        self.answer = Answer(tokens=2, complete=True)
        self.asked: list[tuple[str, int]] = []
        self.resets = 0

    def ask(self, text: str, pictures: Sequence[Any], *, max_new_tokens: int) -> Iterator[str]:
        if text == "fail":
            raise GraceError("it failed")
        self.asked.append((text, len(pictures)))
        yield text
        if text == "interrupt":
            raise KeyboardInterrupt
        yield "\x1b[2J!"

    def reset(self) -> None:
        self.resets += 1

    def picture_tokens(self, _: Any) -> int:
        return 1234


def session(
    lines: Sequence[str | type[BaseException]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[Scripted, str, str, int]:
    """What was asked, both outputs, and the lines that were left."""
    left = list(lines)

    def typed(_: str) -> str:
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    chat, aside = Scripted(), io.StringIO()
    console = Console(file=aside, soft_wrap=True)
    ChatSession(chat, max_new_tokens=5, aside=console).run()  # type: ignore[arg-type]
    return chat, capsys.readouterr().out, aside.getvalue(), len(left)


def test_lines_are_questions_and_commands(
    picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "one",
        "",
        f"/image {picture}",
        f"/image '{picture}'",
        "/image /none.png",
        "/image",
        "/dance",
        "fail",
        "two",
        " /three ",
        f"/image {picture}",
        "/reset",
        "four",
        "/help",
        "/quit",
        "never",
    ]
    chat, out, aside, left = session(lines, monkeypatch, capsys)
    assert chat.asked == [("one", 0), ("two", 2), ("/three", 0), ("four", 0)]
    assert chat.resets == 1 and left == 1
    assert out == "".join(f"{text}[2J!\n" for text, _ in chat.asked), "no escape goes out"
    assert aside.count("a ramp.png: 64 x 48 pixels, 1,234 tokens") == 3
    for said in ("no picture /none.png", "/image cat.jpg", "no command /dance", "it failed"):
        assert said in aside
    assert "/reset        forget" in aside


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        ([KeyboardInterrupt, KeyboardInterrupt, "x"], 1),
        ([KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt], 0),
        (["interrupt", KeyboardInterrupt, "x"], 1),
        (["interrupt", "one", EOFError, "x"], 1),
    ],
)
def test_interrupts_end_an_answer_and_twice_the_chat(
    lines: Sequence[Any],
    left: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert session(lines, monkeypatch, capsys)[3] == left


class Terminal:
    """A process in a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "grace_core.cli", "chat", *map(str, arguments)],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_takes_the_terminal,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, text: str, seconds: float = 120.0) -> str:
        """What has come since the last call, up to this text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} came, only {self.seen!r}"
            self.seen += os.read(self._ours, 4096).decode(errors="replace").replace("\r\n", "\n")
        before, _, self.seen = self.seen.partition(text)
        return before


def _takes_the_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_a_conversation_in_a_terminal(folder: Path, picture: Path) -> None:
    terminal = Terminal(folder, "--device", "cpu", "--max-new-tokens", 3000)
    try:
        assert "(qwen3_vl, dense) on cpu. /help lists commands." in terminal.until("> ")
        terminal.type("/help\n")
        assert "/image FILE" in terminal.until("> ")
        terminal.type(f"/image {picture}\n")
        assert "a ramp.png: 64 x 48 pixels, 20 tokens" in terminal.until("> ")
        terminal.type("What is this?\n")
        terminal.until("What is this?\n")
        beginning = printable(expected(folder, "What is this?", [picture], 24))[:16]
        terminal.until(beginning)
        terminal.type(INTERRUPT)
        terminal.until("tokens/s; ")
        assert "cut short" in terminal.until("> ")
        terminal.type(INTERRUPT)
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
