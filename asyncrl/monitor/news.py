"""What the live view tells of a run's newest events, and of its silence."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from asyncrl.monitor.events import Event
from asyncrl.monitor.plain import plain

_NUM_ALARMS = 3


def outage(news: Sequence[Event]) -> str:
    """That no rollout actor is alive, for how long, and what is waited for; nothing while one is."""
    since, waits_for = math.nan, ""
    for event in news:
        waits_for = event.facts.get("waits_for", waits_for)
        if event.kind in ("start", "end") or event.facts.get("over"):
            since = math.nan
        elif event.kind == "outage" and math.isnan(since):
            since = event.timestamp
    if math.isnan(since):
        return ""
    return f"no rollout actor alive for {max(0.0, time.time() - since):.0f} s, waiting for {plain(str(waits_for))}"


def alarms(news: Sequence[Event]) -> list[RenderableType]:
    """The newest alarms, each with the time of day."""
    newest = [event for event in news if event.alarm][-_NUM_ALARMS:]
    if not newest:
        return []
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for event in newest:
        at = time.strftime("%H:%M:%S", time.localtime(event.timestamp))
        table.add_row(Text(at, style="dim"), Text(plain(event.message), style="red"))
    return [Text(), Text("alarms", style="bold"), table]


class Silence:
    """How long a file has not grown: by this process's own clock, and by the file's time for what was before."""

    def __init__(self, path: Path) -> None:
        self._path, self._since = path, 0.0
        self._seen: tuple[int, float] | None = None

    def seconds(self) -> float:
        """0 while there is no file."""
        if not self._path.exists():
            return 0.0
        found = self._path.stat()
        if (seen := (found.st_size, found.st_mtime)) != self._seen:
            before_s = max(0.0, time.time() - found.st_mtime) if self._seen is None else 0.0
            self._seen, self._since = seen, time.monotonic() - before_s
        return time.monotonic() - self._since
