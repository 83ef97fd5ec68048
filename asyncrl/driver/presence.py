"""Who of a pool is alive: each death in words, and the outage, the time in which nobody is.

    actor:    alive ........................ | died
    another:  alive ................... | died                       alive ...........
                                               | outage ............ |
Both are spans of the timeline, which tell waits for actors that do not exist from other waits (`monitor/blame.py`), and
events, which the console, the live view and the report page follow.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from asyncrl.monitor.bottleneck import ALIVE, OUTAGE
from asyncrl.monitor.events import Emit, nowhere
from asyncrl.monitor.timeline import Timeline
from asyncrl.runtime.handles import ActorDied

_TOLD_CHARACTERS = 300
"""Of why an actor died; the whole text is among the event's facts."""
_FIRST_REMINDER_S = 30.0


class Presence:
    """Belongs to one pool. Actors are known by their handles, and named as they are called now."""

    def __init__(self, timeline: Timeline) -> None:
        self.emit: Emit = nowhere
        self.outlook: Callable[[], str] = lambda: "nobody takes its place"
        """What becomes of the place of an actor that just died."""
        self.waits_for: Callable[[], str] = lambda: "another one"
        """What an outage waits for."""
        self._timeline = timeline
        self._alive: dict[Any, ExitStack] = {}
        self._outage = ExitStack()
        self._since: float | None = None  # the outage
        self._reminder_s = _FIRST_REMINDER_S

    @property
    def outage_s(self) -> float:
        """Seconds that no actor has been alive for; 0 while one is."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def came(self, actor: Any) -> None:
        """The actor gets prompts from here on."""
        self._alive[actor] = span = ExitStack()
        span.enter_context(self._timeline.span(actor.name, ALIVE))
        if self._since is not None:
            lasted_s, self._since, self._reminder_s = self.outage_s, None, _FIRST_REMINDER_S
            self._outage.close()
            message = f"{actor.name} plays prompts: no rollout actor was alive for {lasted_s:.0f} s"
            self.emit("outage", message, alarm=False, over=True, lasted_s=round(lasted_s, 1), alive=1)

    def left(self, actor: Any) -> None:
        """The actor gets no more prompts, whatever the reason."""
        if span := self._alive.pop(actor, None):
            span.close()

    def died(self, actor: Any, error: ActorDied, *, expects_more: bool) -> None:
        """Tells of the death, and of the outage if it was the last one and another will come."""
        self.left(actor)
        alive = len(self._alive)
        cause = textwrap.shorten(str(error), _TOLD_CHARACTERS, placeholder=" ...")
        known = {name: value for name, value in getattr(actor, "facts", {}).items() if name in ("pid", "address")}
        message = f"{actor.name} {error.fate}: {cause}; {self.outlook()}"
        self.emit("death", message, subject=actor.name, cause=cause, raw=error.raw, alive=alive, **known)
        if not alive and expects_more and self._since is None:
            self._since = time.monotonic()
            self._outage.enter_context(self._timeline.span(OUTAGE, "no rollout actor alive"))
            self._tell_outage("no rollout actor is alive")

    def remind(self) -> None:
        """Says that the outage goes on, ever more rarely. To be called now and then."""
        if self.outage_s >= self._reminder_s:
            self._reminder_s = 2 * self.outage_s
            self._tell_outage(f"no rollout actor has been alive for {self.outage_s:.0f} s")

    def _tell_outage(self, told: str) -> None:
        waits_for = self.waits_for()
        self.emit("outage", f"{told}: waiting for {waits_for}", alive=0, waits_for=waits_for)
