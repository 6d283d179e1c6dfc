"""Output of ranks: kept a start, streamed where it matters, and quoted without secrets."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

from grace_core.launch.output import (
    first_error,
    first_failure,
    level_of,
    new_attempt,
    newest_logs,
    stream,
    tail,
)
from grace_core.launch.process_group import run_process_group
from grace_core.secrets import redacted


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("[default1]:2026-01-02 03:04:05,678 INFO grace_core.training.loop: going on", "INFO"),
        ("[default1]:2026-01-02 03:04:05,678 WARNING grace_core.training: slow", "WARNING"),
        ("[default3]:/lib/torch/x.py:12: UserWarning: not initialised", "WARNING"),
        ("[default1]:[rank1]: Traceback (most recent call last):", "ERROR"),
        ("[default1]:[rank1]: torch.OutOfMemoryError: CUDA out of memory.", "ERROR"),
        ("[default0]:error: stage bf16, step 4: cross_entropy is nan", "ERROR"),
        ("[default2]:KeyError", "ERROR"),
        ("[default1]:no warning, and no error either", "INFO"),
    ],
)
def test_a_line_has_the_level_it_was_written_at(line: str, level: str) -> None:
    assert logging.getLevelName(level_of(line)) == level


def test_warnings_of_every_rank_are_streamed_and_rank_0_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = (
        "import sys\n"
        "for line in ('[default0]:step 1', '[default1]:step 1', '[default1]:x WARNING y: z',\n"
        "             '[default12]:ValueError: bad row',\n"
        "             *[f'[default{rank}]:/lib/a.py:3: FutureWarning: old' for rank in (1, 0)]):\n"
        "    print(line, file=sys.stderr)\n"
    )
    with caplog.at_level(logging.INFO, "grace_core"):
        run_process_group(
            [sys.executable, "-c", program],
            stage="bf16",
            env=os.environ,
            log_folder=tmp_path,
            on_line=stream,
            poll_seconds=0.05,
        )
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "[default0]:step 1"),
        ("WARNING", "[default1]:x WARNING y: z"),
        ("ERROR", "[default12]:ValueError: bad row"),
        ("WARNING", "[default1]:/lib/a.py:3: FutureWarning: old"),
    ]


def test_the_first_error_is_the_cause_and_later_ones_its_consequences() -> None:
    lines = [
        "[default1]:2026-01-02 03:04:05,678 WARNING a: b",
        "[default1]:[rank1]: Traceback (most recent call last):",
        '[default1]:[rank1]:   File "x.py", line 3, in load',
        "[default1]:[rank1]: FileNotFoundError: [Errno 2] No such file: 'shard-7'",
        "[default1]:[rank1]: During handling of the above exception, another exception occurred:",
        "[default1]:[rank1]: RuntimeError: the loader died",
    ]
    assert first_error(lines) == "FileNotFoundError: [Errno 2] No such file: 'shard-7'"
    assert first_error(lines[:3]) is None


def test_the_agent_names_the_rank_that_failed_first() -> None:
    lines = [
        "E0102 torch/distributed/elastic] failed (exitcode: -9) local_rank: 3 (pid: 7) of binary",
        "E0102 torch/distributed/elastic] failed (exitcode: 1) local_rank: 0 (pid: 5) of binary",
    ]
    assert first_failure(lines) == ("3", -9)
    assert first_failure(["nothing of the kind"]) is None


def test_every_start_has_a_folder_of_its_own(tmp_path: Path) -> None:
    for number in (1, 2, 11):
        while (folder := new_attempt(tmp_path)).name != f"attempt-{number:03d}":
            folder.mkdir(parents=True)
        (folder / "id" / "0").mkdir(parents=True)
        (folder / "id" / "0" / "stderr.log").write_text(f"start {number}")
    (tmp_path / "stderr.log").write_text("of the launcher")
    assert [file.read_text() for file in newest_logs(tmp_path)] == ["start 11", "of the launcher"]


def test_a_tail_begins_with_a_whole_line_and_says_what_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "stderr.log"
    log.write_text("".join(f"line {number}\n" for number in range(10)))
    assert tail(log, 1000).splitlines()[0] == "line 0"
    shown = tail(log, 17).splitlines()  # 7 bytes a line: two and a part of a third
    assert shown[1:] == ["line 8", "line 9"]
    assert "53 bytes before this" in shown[0]


def test_values_of_secret_variables_are_never_shown() -> None:
    environment = {
        "HF_TOKEN": "hf_abcdefgh",
        "aws_secret_access_key": "hf_abcdefgh/longer",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": "/home/somebody",
    }
    text = "with hf_abcdefgh/longer, then hf_abcdefgh at /home/somebody: false"
    assert redacted(text, environment) == (
        "with [aws_secret_access_key], then [HF_TOKEN] at /home/somebody: false"
    )
