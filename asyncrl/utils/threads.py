"""Blocking calls in threads that nothing else waits for, and what belongs to the main thread: signal handlers.

`asyncio.to_thread` shares a few threads among everybody: a handful of calls that hang there hold up all others, and the
exit. Python cannot end a thread, but one that hangs here is only its own caller's loss.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


def started(function: Callable[[], T]) -> Future[T]:
    """What the function will return or raise, from a daemon thread."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()  # from here on it cannot be cancelled
    call = contextvars.copy_context().run

    def work() -> None:
        try:
            value = call(function)
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(value)

    threading.Thread(target=work, daemon=True).start()
    return result


async def in_thread(function: Callable[[], T]) -> T:
    """What the function returns or raises, from a daemon thread, which goes on if the caller is cancelled."""
    return await asyncio.wrap_future(started(function))


@contextmanager
def kept_handlers(*numbers: signal.Signals) -> Iterator[dict[signal.Signals, Any]]:
    """The handlers of these signals as they are, put back at the end whatever others installed meanwhile.

    Does nothing outside the main thread, which alone has a say in them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_heard: set[signal.Signals] = set()


@contextmanager
def heard_here(*numbers: signal.Signals) -> Iterator[None]:
    """The event loop handles these signals; a process that is forked meanwhile has them as a new process does.

    It would inherit handlers that do nothing, so that SIGTERM would not end it, and the pipe that tells the loop of a
    signal, so that its SIGTERM would reach the parent's loop.
    """
    _heard.update(numbers)
    try:
        yield
    finally:
        _heard.difference_update(numbers)


def _leave_parent_alone() -> None:
    if not _heard:
        return
    signal.set_wakeup_fd(-1)
    for number in _heard:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _heard.clear()


os.register_at_fork(after_in_child=_leave_parent_alone)


_refused: contextvars.ContextVar[list[int]] = contextvars.ContextVar("refused")


def notice_signals(function: Callable[[], T], refused: list[int]) -> T:
    """What the function returns or raises; `refused` takes up the signals that it set a handler of, in vain, as this is
    not the main thread. Many functions catch the error that says so, and go on with nothing."""
    _hook_signals()

    def work() -> T:
        _refused.set(refused)
        return function()

    return contextvars.copy_context().run(work)


@cache
def _hook_signals() -> None:
    """`signal.signal` calls its namesake in C, and no audit event tells of it."""
    module = sys.modules["_signal"]
    set_handler = module.signal

    def noticing(number: int, handler: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            _refused.get([]).append(number)
        return set_handler(number, handler)

    module.signal = noticing  # type: ignore[attr-defined]


class Threads:
    """Calls of somebody else's code, a few at once."""

    def __init__(self, most: int | None = None) -> None:
        self._room = asyncio.Semaphore(most or (os.cpu_count() or 1) + 4)

    async def run(self, function: Callable[[], T], timeout_s: float | None = None) -> T:
        """What the function returns or raises. Raises `TimeoutError` if it runs longer than `timeout_s`; the time that
        it waits for its turn does not count, and once it is given up it takes nobody's turn."""
        async with self._room, asyncio.timeout(timeout_s):
            return await in_thread(function)
