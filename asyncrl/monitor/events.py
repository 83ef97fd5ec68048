"""The events of a run, as they happen: `events.jsonl` in the run folder, one JSON object a line.

    {"run_s": 812.4, "timestamp": 1764601234.5, "kind": "death", "subject": "rollout 2", "alarm": true,
     "message": "rollout 2 died: killed by signal 9; replacement 1 of 3 is starting", "facts": {"cause": "signal 9"}}

Whatever a person should hear of goes through `Events.emit`: the console, the live view, the report page and the
Prometheus gauges follow it. A step's numbers are no event: they are in metrics.jsonl.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from asyncrl.monitor.plain import plain

NAME = "events.jsonl"
_TAIL_BYTES = 2**16

KINDS: dict[str, str] = {
    "start": "the run, or a part of it, begins or goes on",
    "death": "a rollout actor is gone",
    "replacement": "another rollout actor is started, joins or leaves",
    "outage": "no rollout actor is alive, or one is again",
    "failure": "an attempt, a save or an evaluation came to nothing; the first of its kind is told",
    "alarm": "a number or a state that somebody should look at",
    "stall": "a wait took longer than its bound",
    "save": "a checkpoint is written",
    "evaluation": "held-out prompts were scored",
    "decision": "the run changed its course: staleness, a skipped step, a prompt that was given up",
    "note": "anything else that a person may want to read",
    "stop": "somebody asked the run to stop",
    "end": "the run ended",
}
"""Every kind of event, with its meaning."""

ALARMS = frozenset({"death", "outage", "failure", "alarm", "stall"})
"""Kinds that are alarms unless their event says otherwise."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that happened. `run_s`: seconds that the run has gone on for, on a clock that never runs backwards and
    goes on in a resume; `timestamp`: Unix time. `message` is one line; `facts` hold what programs may want, and raw
    texts."""

    run_s: float
    timestamp: float
    kind: str
    subject: str
    message: str
    alarm: bool = False
    facts: dict[str, Any] = {}

    @property
    def line(self) -> str:
        """As the console shows it."""
        return plain(f"alarm: {self.message}" if self.alarm else self.message)


class Emit(Protocol):
    """`Events.emit`, as parts of a run are given it."""

    def __call__(
        self, kind: str, message: str, *, subject: str = ..., alarm: bool | None = ..., **facts: Any
    ) -> object: ...


def nowhere(kind: str, message: str, *, subject: str = "", alarm: bool | None = None, **facts: Any) -> None:
    """An `Emit` that nobody listens to."""


class Events:
    """Appends events to the file and hands each to the listeners. `emit` may be called from any thread.

    The file is best effort: a disk that is full ends no run here, and `error` holds the first failure.
    """

    def __init__(self, folder: Path | None, now: Callable[[], float] = time.monotonic) -> None:
        """`now` gives the seconds of the run. Without a folder nothing is written."""
        self._now = now
        self._lock = threading.Lock()
        self.listeners: list[Callable[[Event], None]] = []
        self.error: OSError | None = None
        self._file: int | None = None
        if folder is not None:
            path = folder / NAME
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            if is_torn(self._file):  # a run that was killed while it wrote
                self._write(b"\n")

    def listen(self, listener: Callable[[Event], None]) -> None:
        """`listener` gets every event from here on, after it was written."""
        self.listeners.append(listener)

    def emit(self, kind: str, message: str, *, subject: str = "run", alarm: bool | None = None, **facts: Any) -> Event:
        """Records that something happened. `kind` is one of `KINDS`; `alarm` is by kind where it is not given."""
        if kind not in KINDS:
            raise RuntimeError(f"an event has no kind {kind!r}: {sorted(KINDS)}")
        alarming = kind in ALARMS if alarm is None else alarm
        event = Event(round(self._now(), 3), round(time.time(), 3), kind, subject, message, alarming, facts)
        self._write(_encoded(event) + b"\n")
        for listener in self.listeners:
            listener(event)
        return event

    def sync(self) -> None:
        """What was written so far survives a power failure once this returns. May run in another thread."""
        with self._lock:
            if self._file is not None:
                try:
                    os.fsync(self._file)
                except OSError as error:
                    self.error = self.error or error

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _write(self, line: bytes) -> None:
        with self._lock:
            if self._file is not None:
                try:
                    os.write(self._file, line)
                except OSError as error:
                    self.error = self.error or error


def _encoded(event: Event) -> bytes:
    try:
        return msgspec.json.encode(event, enc_hook=str)
    except (UnicodeEncodeError, TypeError, ValueError):  # text of a model may hold halves of characters
        facts = {"unwritable": ascii(event.facts)}
        return msgspec.json.encode(msgspec.structs.replace(event, message=plain(event.message), facts=facts))


def is_torn(file: int) -> bool:
    """Whether the last line of an open file has no end. Nothing else is read: the file may be large."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def read(folder: Path, last_bytes: int | None = None) -> list[Event]:
    """The events of a run folder, oldest first, or those in the last bytes of the file; lines that a crash tore and
    those of another schema are left out."""
    path = folder / NAME
    if not path.exists():
        return []
    return list(_decoded(tail(path, last_bytes)))


def tail(path: Path, last_bytes: int | None = None) -> list[bytes]:
    """The whole lines of a file that may still be written to, or those that lie in its last bytes."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        begin = 0 if last_bytes is None else max(0, size - last_bytes)
        file.seek(begin)
        lines = file.read().split(b"\n")
    return lines[1 if begin else 0 : -1]


def _decoded(lines: list[bytes]) -> Iterator[Event]:
    decode = msgspec.json.Decoder(Event).decode
    for line in lines:
        try:
            yield decode(line)
        except msgspec.MsgspecError:
            continue


def last_run_s(folder: Path) -> float:
    """The seconds that the run of this folder had gone on for at its last event; 0 without any."""
    return max((event.run_s for event in read(folder, _TAIL_BYTES)), default=0.0)
