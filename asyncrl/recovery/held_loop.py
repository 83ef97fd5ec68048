"""Tells when the driver's event loop is held: by a `play()` that blocks, as a rule.

While it is held nothing else of the driver happens, no watchdog's look and no stop at the first Ctrl-C. So a thread
looks, and names the line of code that the loop is in.
"""

from __future__ import annotations

import asyncio
import sys
import sysconfig
import threading
import traceback

from asyncrl.monitor.events import Emit

_LOOK_S = 1.0
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


class HeldLoop:
    """Belongs to the driver's event loop."""

    def __init__(self, emit: Emit, bound_s: float = 10.0) -> None:
        """`bound_s`: seconds that the loop may be held without a word."""
        self._emit, self._bound_s = emit, bound_s
        self._look_s = min(_LOOK_S, bound_s / 4)
        self._num_beats = 0
        self._ended = threading.Event()

    async def run(self) -> None:
        """Until cancelled."""
        thread = threading.get_ident()
        threading.Thread(target=self._watch, args=(thread,), name="held loop", daemon=True).start()
        try:
            while True:
                self._num_beats += 1
                await asyncio.sleep(self._look_s)
        finally:
            self._ended.set()

    def _watch(self, thread: int) -> None:
        seen, num_looks = 0, 0  # looks, not the clock: the whole process may have been stopped meanwhile
        bound = round(self._bound_s / self._look_s)
        while not self._ended.wait(self._look_s):
            num_looks = num_looks + 1 if self._num_beats == seen else 0
            seen = self._num_beats
            if num_looks == bound:
                told = f"the driver's event loop has been held for {self._bound_s:g} s in {_place(thread)}"
                remedy = "nothing else happens meanwhile: put what blocks into `await in_thread(...)` (asyncrl.threads)"
                self._emit("stall", f"{told}; {remedy}", subject="driver")


def _place(thread: int) -> str:
    """The innermost line of the thread that is no library's."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<"))]
    frame = (own or frames)[-1]
    return f"{frame.name} ({frame.filename}:{frame.lineno})"
