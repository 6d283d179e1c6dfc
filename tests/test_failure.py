"""Reports on failures: each kind provoked for real where that is cheap, and recognised."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grace_core.config import load_config
from grace_core.errors import GraceError
from grace_core.failure import (
    Kind,
    failure_of,
    logs_of,
    remove_failure,
    write_failure,
)
from grace_core.launch.process_group import run_process_group
from tests.conftest import ROOT

COMMANDS = ("grace run configs/toy.yaml --set 'run_dir=runs/my run'", "prefect deployment run x/y")


def run_program(folder: Path, program: str, timeout: float | None = None) -> None:
    run_process_group(
        [sys.executable, "-c", program],
        stage="w4",
        env=os.environ,
        log_folder=folder / "work" / "w4-0123456789ab" / "logs",
        grace_seconds=1.0,
        timeout_seconds=timeout,
        poll_seconds=0.05,
    )


def write_to_a_full_disk(_: Path) -> None:
    with open("/dev/full", "wb", buffering=0) as stream:
        stream.write(b"x")


def write_in_a_rank(folder: Path) -> None:
    run_program(folder, "open('/dev/full', 'wb', buffering=0).write(b'x')")


def ask_for_too_much(_: Path) -> None:
    bytearray(1 << 60)


def ask_torch_for_too_much(_: Path) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def ask_in_a_rank(folder: Path) -> None:
    run_program(folder, "bytearray(1 << 60)")


def be_killed(folder: Path) -> None:
    run_program(folder, f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")


def be_terminated(folder: Path) -> None:
    run_program(folder, f"import os; os.kill(os.getpid(), {int(signal.SIGTERM)})")


def take_too_long(folder: Path) -> None:
    run_program(folder, "import time; time.sleep(60)", timeout=0.2)


def mistype(_: Path) -> None:
    load_config(ROOT / "configs" / "toy.yaml", ["sead=3"])


def interrupt(_: Path) -> None:
    raise KeyboardInterrupt


def fail(folder: Path) -> None:
    run_program(folder, "print('0\\n1'); raise ValueError('bad row')")


def caught(provoke: Callable[[Path], None], folder: Path) -> BaseException:
    try:
        provoke(folder)
    except BaseException as error:
        return error
    raise AssertionError("nothing went wrong")


@pytest.mark.parametrize(
    ("provoke", "kind", "cause"),
    [
        (write_to_a_full_disk, Kind.DISK_FULL, "No space left on device"),
        (write_in_a_rank, Kind.DISK_FULL, "OSError: [Errno 28] No space left on device"),
        (ask_for_too_much, Kind.OUT_OF_MEMORY, "MemoryError"),
        (ask_torch_for_too_much, Kind.OUT_OF_MEMORY, "allocate"),
        (ask_in_a_rank, Kind.OUT_OF_MEMORY, "MemoryError"),
        (be_killed, Kind.KILLED, "SIGKILL"),
        (be_terminated, Kind.STOPPED, "SIGTERM"),
        (take_too_long, Kind.TIME_LIMIT, "did not end within 0.2 s"),
        (mistype, Kind.CONFIGURATION, "sead"),
        (interrupt, Kind.CANCELLED, "KeyboardInterrupt"),
        (fail, Kind.OTHER, "ValueError: bad row"),
    ],
)
def test_what_went_wrong_is_recognised(
    tmp_path: Path, provoke: Callable[[Path], None], kind: Kind, cause: str
) -> None:
    failure = failure_of(caught(provoke, tmp_path), tmp_path, stage="w4")
    assert failure.kind == kind, failure
    assert cause in failure.cause
    assert failure.remedy


def test_a_torch_error_of_a_gpu_is_out_of_memory(tmp_path: Path) -> None:
    """Its text as PyTorch 2.13 writes it; there is no GPU here to fill."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert failure_of(error, tmp_path, stage="w4").kind == Kind.OUT_OF_MEMORY


def test_the_reason_behind_an_error_counts(tmp_path: Path) -> None:
    def wrapped(folder: Path) -> None:
        try:
            write_to_a_full_disk(folder)
        except OSError as error:
            raise GraceError("the checkpoint was not written") from error

    failure = failure_of(caught(wrapped, tmp_path), tmp_path, stage="w4")
    assert (failure.kind, failure.cause) == (Kind.DISK_FULL, "the checkpoint was not written")


def interrupted_training(run_dir: Path) -> Path:
    """What a training of w4 leaves: two checkpoints, the newer being written, and logs."""
    work = run_dir / "work" / "w4-0123456789ab"
    for step in (20, 40):
        folder = work / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step}))
    (work / "checkpoints" / ".step-00000060.partial").mkdir()
    (work / "job.json").write_text("{}")
    return work


def test_it_says_what_is_kept_where_the_logs_are_and_how_to_go_on(tmp_path: Path) -> None:
    work = interrupted_training(tmp_path)
    failure = failure_of(
        caught(fail, tmp_path), tmp_path, stage="w4", finished=["data", "bf16"], commands=COMMANDS
    )
    assert failure.checkpoint == str(work / "checkpoints" / "step-00000040")
    assert (failure.checkpoint_step, failure.logs) == (40, str(work / "logs"))
    for told in (failure.to_text(), failure.to_markdown()):
        for part in (
            *("tage w4 failed: error", "ValueError: bad row", "inished stages: data, bf16"),
            *("up to step 40", str(work / "logs"), *COMMANDS),
        ):
            assert part in told
    assert all(command in failure.to_line() for command in COMMANDS)
    assert "\n" not in failure.to_line()


def test_what_an_earlier_run_left_is_not_of_this_one(tmp_path: Path) -> None:
    work = interrupted_training(tmp_path)
    os.utime(work / "job.json", (1000.0, 1000.0))
    now = time.time()
    failure = failure_of(ValueError("x"), tmp_path, stage="w4", since=now)
    assert (failure.checkpoint, failure.logs) == (None, None)
    assert logs_of(tmp_path, "w4", since=now) is None
    os.utime(work / "job.json", (now, now))
    assert logs_of(tmp_path, "w4", since=now) == work / "logs"
    assert logs_of(tmp_path, "w8", since=0.0) is None


def test_no_secret_stands_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_anyone")
    error = ValueError("401 for hf_not_for_anyone")
    failure = failure_of(error, tmp_path, stage=None, commands=["grace --x hf_not_for_anyone"])
    write_failure(failure, tmp_path)
    for file in tmp_path.iterdir():
        assert "hf_not_for_anyone" not in file.read_text()
    assert "401 for [HF_TOKEN]" in (tmp_path / "failure.md").read_text()


def test_a_report_is_replaced_and_removed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"  # nothing was written there yet
    for text in ("first", "second"):
        write_failure(failure_of(ValueError(text), run_dir, stage="data"), run_dir)
    assert sorted(file.name for file in run_dir.iterdir()) == ["failure.json", "failure.md"]
    report = json.loads((run_dir / "failure.json").read_text())
    assert (report["cause"], report["kind"], report["stage"]) == (
        *("ValueError: second", "error", "data"),
    )
    remove_failure(run_dir)
    assert list(run_dir.iterdir()) == []
    remove_failure(run_dir)
