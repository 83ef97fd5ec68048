"""Places for programs: as many as there are processors, among all processes of one user on one machine.

A place is a file in a folder of this user's, and whoever has its lock (`flock`) has the place. The kernel gives it back
however the process ends. Those who wait look again and again, a few files at a time, so that many waiting processes
cost little; there is no order among them.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_LOOK_S = 0.05
_NUM_LOOKS = 8
_held: set[int] = set()


@asynccontextmanager
async def place() -> AsyncIterator[None]:
    """Waits for a place and has it within. Raises `RuntimeError` if the folder of places is another user's."""
    folder, count = _folder(), len(os.sched_getaffinity(0))
    while (held := _taken(folder, count)) is None:
        await asyncio.sleep(_LOOK_S * random.uniform(0.5, 1.5))
    _held.add(held)
    try:
        yield
    finally:
        if held in _held:  # not in a forked process
            _held.discard(held)
            fcntl.flock(held, fcntl.LOCK_UN)  # a process that is being started may have the file open, too
            os.close(held)


def _taken(folder: str, count: int) -> int | None:
    """The open file of a place that was free, or None."""
    for number in random.sample(range(count), min(count, _NUM_LOOKS)):
        file = os.open(f"{folder}/{number}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
        else:
            return file
    return None


def _folder() -> str:
    folder = os.path.join(tempfile.gettempdir(), f"asyncrl-places-{os.getuid()}")
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RuntimeError(f"{folder} must be a folder of this user, for the places of sandboxes: remove it")
    return folder


def _forget() -> None:
    """In a forked process: its parent may end before it does, and the place must be free then."""
    for held in _held:
        os.close(held)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
