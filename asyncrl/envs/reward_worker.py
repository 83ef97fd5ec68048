"""Processes that call a reward function in their main thread, where signals work.

A time limit by `signal.alarm`, as math_verify has one, cannot be set in another thread, and many functions catch the
error that tells so. A process is started when none is idle and used again; one that takes too long is killed. The
function is imported there by its path, so what it keeps between calls it keeps once a process.

    actor: RewardProcesses.call --(arguments)--> process: function(**arguments) --(returned, or what it raised)-->
"""

from __future__ import annotations

import importlib
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from asyncrl.utils.quote import quote

_START_S = 300.0
"""For the interpreter and the imports of the function's module, which do not count as the function's time."""


class RewardFailed(Exception):
    """The text says what the function raised, and where."""


class RewardProcesses:
    """Any number of processes for one function: as many as there are calls at once. Called from threads."""

    def __init__(self, path: str) -> None:
        """`path`: `module:name` of the function, whose name may have dots."""
        self._path = path
        self._idle: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._ended = weakref.finalize(self, _end_all, self._idle)

    def call(self, arguments: dict[str, Any], timeout_s: float) -> Any:
        """As `call_here`, for no longer than `timeout_s`. Raises `RewardFailed`, and `TimeoutError`."""
        process, pipe = self._idle.pop() if self._idle else self._start()
        try:
            pipe.send(arguments)
            if not pipe.poll(timeout_s):
                raise TimeoutError
            good, value = pipe.recv()
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                _end(process, pipe)
                raise
            raise RewardFailed(f"ended its process, with code {_end(process, pipe)}") from error
        except BaseException:
            _end(process, pipe)
            raise
        self._idle.append((process, pipe))
        if not good:
            raise RewardFailed(value)
        return value

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        pipe, theirs = Pipe()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), self._path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(folder or os.curdir for folder in sys.path)},
            start_new_session=True,  # Ctrl-C is for the run alone, which may still want scores
        )
        theirs.close()
        try:
            if not pipe.poll(_START_S):
                raise RewardFailed(f"could not be imported in a process of its own within {_START_S:g} s")
            if failed := pipe.recv():
                raise RewardFailed(f"cannot be imported in a process of its own: {failed}")
        except EOFError as error:
            code = _end(process, pipe)
            raise RewardFailed(f"cannot be imported in a process of its own, which ended with code {code}") from error
        except BaseException:
            _end(process, pipe)
            raise
        return process, pipe


def import_path(function: Any) -> str:
    """`module:name` under which another process finds this very object; empty if there is none."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or module == "__main__" or "<" in name:
        return ""
    try:
        found = _imported(f"{module}:{name}")
    except (ImportError, AttributeError):
        return ""
    return f"{module}:{name}" if found is function else ""


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return reduce(getattr, name.split("."), importlib.import_module(module))


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> int:
    pipe.close()
    process.kill()
    return process.wait()


def _end_all(idle: list[tuple[subprocess.Popen[bytes], Connection]]) -> None:
    while idle:
        _end(*idle.pop())


@dataclass(frozen=True)
class TrainerState:
    """The part of `transformers.TrainerState` that a rollout actor knows."""

    global_step: int
    """Learner steps in the newest weights that generated an attempt."""


def log_extra(column: str, values: list[Any]) -> None:
    """TRL's: a column of its table of completions, which has no counterpart here."""


class MetricLog:
    """TRL's `log_metric`: keeps what a function logs, and travels with it."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def __call__(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(float(value))


def call_here(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, MetricLog | None]:
    """What the function returns, and its log, if it was given one as `log_metric`. Raises `RewardFailed` for whatever
    the function raises, a `TimeoutError` of its own too."""
    from asyncrl.utils.importing import line_of

    try:
        return function(**arguments), arguments.get("log_metric")
    except Exception as error:
        raise RewardFailed(f"raised {quote(error, 400)}{line_of(error)}") from error


def main() -> None:
    """Serves calls until the other end of the pipe is closed, which ends this process even amid a call."""
    pipe = Connection(int(sys.argv[1]))
    calls: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                calls.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)

    try:
        function = _imported(sys.argv[2])
    except Exception as error:
        pipe.send(quote(error, 400))
        return
    pipe.send("")
    threading.Thread(target=receive, daemon=True).start()
    while True:
        try:
            pipe.send((True, call_here(function, calls.get())))
        except Exception as error:  # also of what cannot be sent
            pipe.send((False, str(error)))


if __name__ == "__main__":
    main()
