"""A flow run and Prefect stay of one mind, whoever else has died.

A cancellation is carried out by the worker that started the run. When that worker was killed, its
runs go on and nobody ends them. And a run whose heartbeats did not arrive for a while, because the
server was away, is taken for dead although it is alive. So the run looks at its own state now and
then: it ends itself when it is being cancelled and nobody does it, or when it was ended or deleted
by hand; and it takes back that it had crashed. A signal to end it is sent again where Python lost
it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

import httpx
import prefect
from prefect import Flow, get_client, runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError, TerminationSignal
from prefect.states import Cancelled, Running

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

LOOK_SECONDS = 10.0
PATIENCE_SECONDS = 40.0
"""A worker that carries out a cancellation has killed the run after 30."""
INSIST_SECONDS = 1.0
"""Of work that goes on after a signal to end it, twice."""
DELETED = "Deleted"
"""Name of the final state that stands for a run which the server no longer has."""

_ended_as: State[Any] | None = None
"""The state this process ended itself for; Prefect would call it crashed."""


def guarded_flow(name: str) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Make a function one of the pipeline's flows; its stages must run within `guarded`."""

    def decorate(function: Callable[P, R]) -> Flow[P, R]:
        return prefect.flow(
            name=name, persist_result=True, result_serializer="json", on_crashed=[_set_right]
        )(function)

    return decorate


@contextmanager
def guarded() -> Iterator[None]:
    """Around the work of a flow run: its state in Prefect is looked at while it goes on."""
    flow_run_id = runtime.flow_run.id
    if flow_run_id is None:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(
        # The context holds Prefect's settings, and so the address of its server.
        target=copy_context().run,
        args=(_look, UUID(flow_run_id), over),
        name="guard",
        daemon=True,
    )
    thread.start()
    with _signals_seen() as seen:
        threading.Thread(target=_insist, args=(seen, over), name="insist", daemon=True).start()
        try:
            yield
        except Exception as error:  # the run's own failure; else a signal, seen to already
            if signal.SIGTERM in seen():
                raise TerminationSignal(signal.SIGTERM) from error
            _carry_out_cancellation(over, UUID(flow_run_id))
            raise
        else:
            _carry_out_cancellation(over, UUID(flow_run_id))
        finally:
            over.set()  # the thread may be waiting for a server that is away: not waited for


@contextmanager
def _signals_seen() -> Iterator[Callable[[], bytes]]:
    """Which signals came since then, one byte each; of them Python tells the main thread alone.

    Prefect turns SIGTERM into an exception, wherever the main thread is. Compiled code that was
    calling Python just then may answer with an exception of its own, and the run would count as
    failed by that. Prefect looks whether its handler is in place, so ours cannot be.
    """
    if threading.current_thread() is not threading.main_thread():
        yield bytes
        return
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    came, lock, is_open = bytearray(), threading.Lock(), True

    def seen() -> bytes:
        with lock, suppress(BlockingIOError):
            if is_open:
                came.extend(os.read(reader, 4096))
        return bytes(came)

    try:
        yield seen
    finally:
        signal.set_wakeup_fd(before)
        with lock:
            is_open = False
            os.close(reader)
            os.close(writer)


def _insist(seen: Callable[[], bytes], over: threading.Event) -> None:
    """Send SIGTERM again where the exception that Prefect makes of it got lost.

    It is raised wherever the main thread is. In a finalizer or the callback of a weak reference
    Python prints it ("Exception ignored in") and goes on, and so would the run.
    """
    looks = 0
    while not over.wait(INSIST_SECONDS):
        ending = signal.SIGTERM not in seen() or _main_thread_handles_an_exception()
        looks = 0 if ending else looks + 1
        if looks == 2:
            logger.warning("a signal to end this run was lost within Python: sent again")
            os.kill(os.getpid(), signal.SIGTERM)
            looks = 0


def _main_thread_handles_an_exception() -> bool:
    """Whether it is on its way out: ending its processes and records takes a while."""
    current = sys._current_exceptions().get(threading.main_thread().ident or 0)
    # Until Python 3.12 what sys.exc_info() returns.
    return current not in (None, (None, None, None))


def _carry_out_cancellation(over: threading.Event, flow_run_id: UUID) -> None:
    """At the end of the work: Prefect would leave a run that is being cancelled as it is."""
    over.set()
    with get_client(sync_client=True) as client:
        state = _state(client, flow_run_id)
    if state is not None and state.is_cancelling():
        _end_this_process(state)
        signal.pause()  # the signal is on its way


def _look(flow_run_id: UUID, over: threading.Event) -> None:
    cancelling_since: float | None = None
    with get_client(sync_client=True) as client:
        while not over.wait(LOOK_SECONDS):
            try:
                state = _state(client, flow_run_id)
                if state is None or over.is_set():
                    continue
                if state.is_crashed():
                    _take_back(client, flow_run_id)
                    continue
            except Exception:  # of a kind that nobody foresaw: told, and looked at again
                logger.exception("the guard could not look at the state of this run")
                continue
            now = time.monotonic()
            cancelling_since = (cancelling_since or now) if state.is_cancelling() else None
            neglected = cancelling_since is not None and now - cancelling_since > PATIENCE_SECONDS
            if neglected or state.is_final():
                _end_this_process(state)
                return


def _state(client: SyncPrefectClient, flow_run_id: UUID) -> State[Any] | None:
    """As the server knows it; None where it does not answer."""
    state = None
    with _server_may_be_away():
        try:
            state = client.read_flow_run(flow_run_id).state
        except ObjectNotFound:
            client.hello()  # a proxy whose server is away may answer the same
            state = Cancelled(name=DELETED)
    return state


def _take_back(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    logger.warning("this run was marked as crashed, but it is alive: marked as running again")
    message = "Alive: its heartbeats had not arrived"
    with _server_may_be_away():
        client.set_flow_run_state(flow_run_id, Running(message=message), force=True)


@contextmanager
def _server_may_be_away() -> Iterator[None]:
    """A server that does not answer is told, and must not end a run or hide what ended it."""
    try:
        yield
    except (httpx.HTTPError, PrefectHTTPStatusError, ValueError) as error:  # ValueError: no JSON
        logger.warning("Prefect does not answer about the state of this run: %s", error)


def _end_this_process(state: State[Any]) -> None:
    global _ended_as
    if state.name == DELETED:
        logger.warning("this run was deleted in Prefect; it ends now")
    elif state.is_final():
        logger.warning("this run was marked as %s; it ends now", state.name)
        _ended_as = state
    else:
        logger.warning("this run is being cancelled, and no worker has done it: it ends now")
        _ended_as = Cancelled(message="Ended by itself: no worker carried out the cancellation")
    os.kill(os.getpid(), signal.SIGTERM)


def _set_right(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Prefect has marked the run as crashed because of the signal; say what really ended it."""
    if _ended_as is not None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, _ended_as, force=True)
