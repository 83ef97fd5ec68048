"""The Python stacks of another process on this node, even if it hangs outside Python: a signal makes it write them."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
from pathlib import Path

_SIGNAL = signal.SIGUSR1
_WAIT_S = 5.0


def offer_stacks() -> str:
    """From now on this process writes the stacks of its threads to the returned file at each signal."""
    handle, path = tempfile.mkstemp(prefix="asyncrl-stacks-")
    os.unlink(path)  # nothing to tidy up: it is reached through the process that holds it open
    faulthandler.register(_SIGNAL, file=handle, all_threads=True)
    return f"/proc/{os.getpid()}/fd/{handle}"


def dump_stacks(pid: int, path: str) -> str:
    """What the process `pid`, which offered `path`, writes now. Says so if it is gone or writes nothing."""
    try:
        return _dump(pid, Path(path))
    except (FileNotFoundError, ProcessLookupError):
        return f"process {pid} is gone"


def _dump(pid: int, file: Path) -> str:
    before = file.stat().st_size
    os.kill(pid, _SIGNAL)
    end, size = time.monotonic() + _WAIT_S, -1
    while time.monotonic() < end and (size <= before or size != file.stat().st_size):
        size = file.stat().st_size
        time.sleep(0.1)
    written = file.read_bytes()[before:].decode(errors="replace")
    return f"process {pid}\n{written}" if written else f"process {pid} did not answer within {_WAIT_S:g} s"
