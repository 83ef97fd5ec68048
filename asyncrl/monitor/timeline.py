"""What every part of a run did, and when: spans on lanes, as JSON lines in the run folder and as a Perfetto trace.

    learner     | wait for groups |   step   | wait for groups |  step  | wait for weights | step | ...
    weight sync                              | update weights             ............. |
    rollout 0   | group 7 ........ | group 12 ....  (many at a time)    | update |
    evaluation  |      evaluation      |
    buffer      a number over time: groups that are ready

Times are seconds of the run on a clock that never runs backwards; a resume goes on from where the run was, in the same
file. Recording one span takes microseconds; lines are buffered and written once a step.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.monitor.events import tail

_NUM_RECENT = 100_000
_TAIL_BYTES = 2**16
_encode = msgspec.json.Encoder().encode


class Span(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that one lane did. A mark ends when it begins; a counter is a mark with a `value` among its facts."""

    lane: str
    name: str
    begin_s: float
    end_s: float
    facts: dict[str, Any] = {}


class Timeline:
    """Records spans. Without a path they are kept in memory only, the newest 100 000 of them."""

    def __init__(self, path: Path | None = None, begin_s: float = 0.0) -> None:
        """`begin_s`: the seconds that the run had gone on for before; what the file has beyond that counts, too."""
        if path is not None and path.exists():
            begin_s = max(begin_s, *(span.end_s for span in _newest(path)), 0.0)
        self._origin = begin_s - time.monotonic()
        self._open: dict[int, tuple[str, str, float, dict[str, Any]]] = {}
        self._recent: deque[Span] = deque(maxlen=_NUM_RECENT)
        self._next_key = 0
        self._file = None
        if path is not None:
            torn = path.exists() and _is_torn(path)
            self._file = path.open("ab", buffering=2**20)
            if torn:  # a run that was killed while it wrote: keep its half line apart from the next one
                self._file.write(b"\n")

    def now(self) -> float:
        return self._origin + time.monotonic()

    @contextmanager
    def span(self, lane: str, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Records the time inside; the caller may add to the facts. An exception is recorded by name and goes on."""
        key, self._next_key = self._next_key, self._next_key + 1
        begin = self.now()
        self._open[key] = (lane, name, begin, facts)
        try:
            yield facts
        except BaseException as error:
            facts["error"] = type(error).__name__
            raise
        finally:
            del self._open[key]
            self._record(Span(lane, name, begin, self.now(), facts))

    def mark(self, lane: str, name: str, **facts: Any) -> None:
        """Something without a duration."""
        now = self.now()
        self._record(Span(lane, name, now, now, facts))

    def count(self, lane: str, name: str, value: float) -> None:
        """The new value of something that is counted."""
        self.mark(lane, name, value=value)

    def since(self, begin_s: float) -> list[Span]:
        """Spans that reach beyond `begin_s`, those still open included and ended now. Older ones are forgotten."""
        while self._recent and self._recent[0].end_s < begin_s:
            self._recent.popleft()
        now = self.now()
        unfinished = [Span(lane, name, begin, now, facts) for lane, name, begin, facts in self._open.values()]
        return [*(span for span in self._recent if span.end_s >= begin_s), *unfinished]

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _record(self, span: Span) -> None:
        self._recent.append(span)
        if self._file is not None:
            self._file.write(_encode(span) + b"\n")


def _is_torn(path: Path) -> bool:
    """Whether the last line has no end. Nothing else is read: the file of a long run is large."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        return file.read() not in (b"\n", b"")


def _newest(path: Path) -> list[Span]:
    """The last spans of a file; only its end is read."""
    spans = []
    for line in tail(path, _TAIL_BYTES):
        with suppress(msgspec.MsgspecError):
            spans.append(msgspec.json.decode(line, type=Span))
    return spans


def read(path: Path) -> tuple[list[Span], int]:
    """The spans of a file that may still be written to, and how many lines could not be read.

    A run that was killed leaves half a line; nothing else should ever be unreadable.
    """
    spans, num_damaged = [], 0
    decode = msgspec.json.Decoder(Span).decode
    with path.open("rb") as lines:
        for line in lines:
            try:
                spans.append(decode(line))
            except msgspec.DecodeError:
                num_damaged += bool(line.strip())
    return spans, num_damaged


def covered_s(intervals: Iterable[tuple[float, float]], begin_s: float, end_s: float) -> float:
    """Seconds of [begin_s, end_s] that lie inside at least one of the intervals."""
    total, reached = 0.0, begin_s
    for begin, end in sorted(intervals):
        start, stop = max(begin, reached), min(end, end_s)
        if stop > start:
            total += stop - start
            reached = stop
    return total


LANES = ("learner", "weight sync", "buffer", "evaluation", "outage", "rollout", "evaluator")
"""Kinds of lanes, in the order in which they are shown."""


def lane_order(lane: str) -> tuple[int, int, str]:
    """Sorts lanes by kind, those of one kind by number."""
    kind, _, number = lane.partition(" ") if lane not in LANES else (lane, "", "")
    return LANES.index(kind) if kind in LANES else len(LANES), int(number) if number.isdecimal() else 0, lane


_OVERLAPPING = ("group", "evaluation")
"""Spans of which one lane has several at a time."""


def perfetto(spans: Iterable[Span]) -> dict[str, Any]:
    """The trace in the Trace Event Format, for ui.perfetto.dev or chrome://tracing.

    Groups of one lane overlap, and evaluations overlap updates, so each becomes a pair of asynchronous events; counters
    become counter tracks. Process and threads count from 1: 0 is the idle task to Perfetto.
    """
    ordered = sorted(spans, key=lambda span: span.begin_s)
    lanes = {lane: number for number, lane in enumerate(sorted({span.lane for span in ordered}, key=lane_order), 1)}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "asyncrl"}}]
    for lane, number in lanes.items():
        events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": lane}})
        events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_sort_index", "args": {"sort_index": number}})
    origin = ordered[0].begin_s if ordered else 0.0
    for number, span in enumerate(ordered):
        common = {"pid": 1, "tid": lanes[span.lane], "name": span.name, "cat": span.lane}
        begin, end = (round(1e6 * (at - origin), 3) for at in (span.begin_s, span.end_s))
        if "value" in span.facts:
            events.append({**common, "ph": "C", "ts": begin, "args": {span.name: span.facts["value"]}})
        elif begin == end:
            events.append({**common, "ph": "i", "s": "t", "ts": begin, "args": span.facts})
        elif span.name in _OVERLAPPING:
            events.append({**common, "ph": "b", "id": number, "ts": begin, "args": span.facts})
            events.append({**common, "ph": "e", "id": number, "ts": end})
        else:
            events.append({**common, "ph": "X", "ts": begin, "dur": round(end - begin, 3), "args": span.facts})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
