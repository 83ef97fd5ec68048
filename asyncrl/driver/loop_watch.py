"""An event loop that one call holds up: nothing else goes on in its process, and nothing there can say so.

held_loop(loop, thread)       asked from another thread: is it, and by what?
with watched_loop(tell): ...  a thread beside the running loop asks again and again
"""

from __future__ import annotations

import asyncio
import site
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sys import _current_frames

HELD_S = 30.0
"""From which on a loop counts as held up."""
_GRACE_S = 1.0
"""Beyond that: the whole process may have been stopped, and its loop with it."""
_CORE = f"{Path(__file__).parents[1]}/"
_ENVS = f"{_CORE}envs/"
_ATTEMPT = f"{_ENVS}attempt.py"
_LIBRARIES = tuple({*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages(), "<frozen"})


@dataclass(frozen=True, slots=True)
class HeldLoop:
    """A loop that has not answered."""

    message: str
    """By what it is held up, and the remedy, in one line."""
    stack: str


def held_loop(loop: asyncio.AbstractEventLoop, thread: int, bound_s: float = HELD_S) -> HeldLoop | None:
    """Waits until `loop`, which runs in `thread`, has answered, or has not for `bound_s`."""
    return _asked(loop, thread, bound_s)[0]


@contextmanager
def watched_loop(tell: Callable[[HeldLoop], None], bound_s: float = HELD_S) -> Iterator[None]:
    """The running loop is asked; `tell` hears, in another thread, of each call that holds it up, once."""
    loop, thread, ended = asyncio.get_running_loop(), threading.get_ident(), threading.Event()

    def watch() -> None:
        while not ended.wait(bound_s / 8):
            held, answered = _asked(loop, thread, bound_s)
            if held and not ended.is_set():
                tell(held)
            while not (answered.wait(bound_s) or ended.is_set()):
                pass

    threading.Thread(target=watch, name="loop watch", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _asked(loop: asyncio.AbstractEventLoop, thread: int, bound_s: float) -> tuple[HeldLoop | None, threading.Event]:
    answered, began = threading.Event(), time.monotonic()
    try:
        loop.call_soon_threadsafe(answered.set)
    except RuntimeError:  # it is closed
        answered.set()
    if answered.wait(bound_s) or answered.wait(_GRACE_S):
        return None, answered
    frames = traceback.extract_stack(_current_frames().get(thread))
    return HeldLoop(_told(frames, time.monotonic() - began), "".join(frames.format()).rstrip()), answered


def _told(frames: traceback.StackSummary, held_s: float) -> str:
    where = _culprit(frames)
    played = any(frame.filename == _ATTEMPT for frame in frames)
    remedy = "in what play() calls, await, or use asyncio.to_thread" if played else "stacks in stalls.txt"
    return (
        f"the event loop has been held up for {held_s:.0f} s by {where.name}() in {where.filename}:{where.lineno}, so "
        f"that nothing else goes on in its process; {remedy}"
    )


def _culprit(frames: traceback.StackSummary) -> traceback.FrameSummary:
    """The innermost frame outside libraries, or what that called if it is our own and no environment's."""
    own = [number for number, frame in enumerate(frames) if not _is_library(frame)]
    innermost = own[-1] if own else len(frames) - 1
    name = frames[innermost].filename
    if name.startswith(_CORE) and (not name.startswith(_ENVS) or name == _ATTEMPT):
        innermost = min(innermost + 1, len(frames) - 1)
    return frames[innermost]


def _is_library(frame: traceback.FrameSummary) -> bool:
    return not frame.filename.startswith(_CORE) and frame.filename.startswith(_LIBRARIES)
