"""What operators see of a flow run while it runs and when it fails; nothing here delays a stage.

Prefect gets two artifacts, `progress` and `numbers`, from a thread of their own every ten seconds,
the lines of rank 0 as the run's logs, and `failure` when the run ends early. A server that is slow
or away makes these late; it never holds up a training.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect import get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.logging.handlers import APILogHandler

from grace_core.config import GraceConfig
from grace_core.events import Event
from grace_core.failure import (
    MARKDOWN_FILE,
    Failure,
    Kind,
    failure_of,
    logs_of,
    remove_failure,
    write_failure,
)
from grace_core.launch.output import newest_logs, tail
from grace_core.plan import Goal
from grace_core.progress import RunMeter, left_text, position_text
from tasks.board import Board, Drawing
from tasks.commands import commands_to_continue
from tasks.forwarding import TrackingUnavailable
from tasks.mlflow_runs import StageRun

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 8.0  # of the 30 between a cancellation and SIGKILL, the launcher has 20
_LOG_BYTES = 1_000_000  # of each rank's output, at most
_STREAMED = ("grace_core", "tasks")  # loggers whose lines become the flow run's


class Watch:
    """The position of a flow run, and its report when it ends early; safe to use in threads."""

    def __init__(self, config: GraceConfig, goal: Goal) -> None:
        self._config = config
        self._meter = RunMeter(config, goal)
        self._lock = threading.Lock()
        self._commands = commands_to_continue()
        self._error: BaseException | None = None
        self._failure: Failure | None = None
        self._finished = False
        self.parent_run: str | None = None
        """The MLflow run that a report on a failure goes to."""

    def started(self, stage: str) -> str:
        """Returns the position in words."""
        with self._lock:
            self._meter.started(stage)
            progress = self._meter.progress
        assert progress is not None
        return f"{stage} ({position_text(progress)})"

    def ended(self, stage: str) -> None:
        with self._lock:
            self._meter.ended(stage)

    def take(self, event: Event) -> None:
        with self._lock:
            self._meter.take(event)

    def failed(self, error: BaseException) -> Failure:
        """The report on what ends this run; its files are written once for each error."""
        if error is not self._error or self._failure is None:
            tracking = isinstance(error, TrackingUnavailable | MlflowException)
            self._error = error
            self._failure = failure_of(
                error,
                self._config.run_dir,
                stage=self._meter.stage,
                since=self._meter.stage_began,
                finished=self._meter.finished,
                commands=self._commands,
                kind=Kind.TRACKING if tracking else None,
            )
            try:
                write_failure(self._failure, self._config.run_dir)
            except OSError as unwritten:
                logger.warning("the report on the failure was not written: %s", unwritten)
        return self._failure

    def finished(self) -> None:
        """The run came to its end."""
        self._finished = True

    def draw(self) -> Drawing:
        with self._lock:
            progress, values = self._meter.progress, dict(self._meter.values)
        if self._finished:
            return Drawing(100.0, "all stages done", "All stages are done.")
        if progress is None:
            return Drawing(0.0, "between stages", "Between stages.")
        stage = progress.stage
        words = f"{stage.stage}, {position_text(progress)}"
        if stage.total:
            words += f": {stage.done:.0f} of {stage.total:.0f}, {left_text(stage.seconds_left)}"
        lines = [f"**{words}**", f"Whole run: {left_text(progress.seconds_left)}."]
        shown = {name: value for name, value in values.items() if name not in _SAID_ALREADY}
        if shown:
            rows = [f"| {name} | {value:.6g} |" for name, value in shown.items()]
            lines.append("\n".join(["| now | |", "|---|---|", *rows]))
        percent = round(100.0 * (progress.fraction or 0.0), 1)
        return Drawing(percent, words, "\n\n".join(lines), stage.stage)


_SAID_ALREADY = ("steps", "done", "total")
_CURRENT: ContextVar[Watch | None] = ContextVar("watch", default=None)


def current_watch() -> Watch | None:
    """That of the flow run at work; None outside of one."""
    return _CURRENT.get()


@contextmanager
def watched_flow(config: GraceConfig, goal: Goal) -> Iterator[Watch]:
    """Show a flow run while it runs, and report on its failure; the error stays the one raised."""
    watch = Watch(config, goal)
    board = Board(watch.draw)
    token = _CURRENT.set(watch)
    try:
        with _streamed_logs():
            board.start()
            try:
                yield watch
            except BaseException as error:
                failure = watch.failed(error)
                before_deadline("report on the failure", lambda: _report(failure, watch.parent_run))
                get_run_logger().error(failure.to_line())
                board.close(_REPORT_SECONDS)
                raise
            watch.finished()
            board.close(_REPORT_SECONDS)
            remove_failure(config.run_dir)
    finally:
        _CURRENT.reset(token)


def attach_logs(run: StageRun, config: GraceConfig, stage: str, since: float) -> None:
    """Put the end of a failed stage's logs, without secrets, beside its MLflow run's metrics."""
    logs = logs_of(config.run_dir, stage, since)
    if logs is None:
        return

    def send() -> None:
        client = MlflowClient()
        for file in newest_logs(logs):
            name = file.relative_to(logs).as_posix()
            client.log_text(run.open(), tail(file, _LOG_BYTES), f"logs/{name}")

    before_deadline(f"logs of stage {stage}", send)


def before_deadline(what: str, work: Callable[[], None]) -> None:
    """Do `work` in a thread and wait for it, for a few seconds at most; failures are logged.

    For what is worth saying while a run ends, but not worth holding up its end.
    """

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            logger.warning("%s: not told to the servers: %s", what, error)

    thread = threading.Thread(target=copy_context().run, args=(guarded,), daemon=True)
    thread.start()
    thread.join(_REPORT_SECONDS)
    if thread.is_alive():
        logger.warning("%s: the servers did not answer within %g s", what, _REPORT_SECONDS)


def _report(failure: Failure, parent_run: str | None) -> None:
    create_markdown_artifact(failure.to_markdown(), key="failure", description=failure.title)
    if parent_run is not None:
        MlflowClient().log_text(parent_run, failure.to_markdown(), MARKDOWN_FILE)


@contextmanager
def _streamed_logs() -> Iterator[None]:
    """Inside a flow run, our loggers' lines of level INFO are the run's logs, however it began."""
    handler = APILogHandler()
    changed: list[tuple[logging.Logger, int, bool]] = []
    for name in _STREAMED if runtime.flow_run.id is not None else ():
        ours = logging.getLogger(name)
        # PREFECT_LOGGING_EXTRA_LOGGERS adds the handler, but leaves the level at WARNING.
        missing = not any(isinstance(one, APILogHandler) for one in ours.handlers)
        changed.append((ours, ours.level, missing))
        if missing:
            ours.addHandler(handler)
        ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        for ours, level, added in changed:
            ours.setLevel(level)
            if added:
                ours.removeHandler(handler)
