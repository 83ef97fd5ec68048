"""Watches every wait of the driver: each has a name and a bound, and one that takes too long is explained.

    with watchdog.wait("step", "the learner"): ...     the loop, at each of its waits
    watchdog.run()                                     beside it: looks, and acts on the first wait that is overdue

A stall says which stage waits, since when and for what, and lists all other waits, as the cause is often among them.
The stacks of the driver's tasks and threads and of every actor go to `stalls.txt` in the run folder. Then, by
`watchdog.action`: "warn" goes on, and says so again when the wait has doubled; "restart" kills the rollout actor that
is waited for, whose prompts are played elsewhere; "stop" ends the run, with a checkpoint if the learner is not what
hangs: what the learner does at that time is given its own time first.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from asyncrl.driver.loop_watch import HeldLoop
from asyncrl.monitor.events import Emit

Action: TypeAlias = Literal["warn", "restart", "stop"]

_LEARNER_STAGES = {"step", "send", "save"}
"""A "sync" is none: it waits for the learner to "send" and for each actor to "update"."""
_STACKS_TIMEOUT_S = 20.0
_EARLY = 0.1
"""Share of the bound after which it is said, once a run, that the learner is still without groups."""


class Stalled(RuntimeError):
    """A wait took longer than its bound, and the run is to stop. `learner_hangs`: nothing can be saved any more."""

    def __init__(self, text: str, *, learner_hangs: bool) -> None:
        super().__init__(text)
        self.learner_hangs = learner_hangs


@dataclass(slots=True, eq=False)
class Wait:
    """Something that is being waited for."""

    stage: str
    waits_for: str
    actor: Any = None
    """The rollout actor that it depends on, if it is one."""
    since: float = field(default_factory=time.monotonic)
    reported_s: float = 0.0
    """How long it had taken when it was last reported."""

    @property
    def taken_s(self) -> float:
        return time.monotonic() - self.since

    def __str__(self) -> str:
        return f"{self.stage} has waited {self.taken_s:.1f} s for {self.waits_for}"


class Watchdog:
    """Belongs to the driver's event loop."""

    def __init__(
        self,
        folder: Path,
        *,
        timeout_s: float,
        action: Action,
        emit: Emit,
        stacks: Callable[[], Awaitable[str]],
        kill: Callable[[Any], None],
    ) -> None:
        """`stacks` asks every actor for its stacks; `kill` ends the process of a rollout actor."""
        self._path = folder / "stalls.txt"
        self._timeout_s, self._action = timeout_s, action
        self._emit, self._stacks, self._kill = emit, stacks, kill
        self._waits: dict[int, Wait] = {}
        self._numbers = itertools.count()
        self._said_early = False

    @contextmanager
    def wait(self, stage: str, waits_for: str, actor: Any = None) -> Iterator[None]:
        """What is awaited within is watched under this name."""
        number = next(self._numbers)
        self._waits[number] = Wait(stage, waits_for, actor)
        try:
            yield
        finally:
            del self._waits[number]

    async def run(self) -> None:
        """Until cancelled. Raises `Stalled` if the action is to stop."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 4))
            self._say_early()
            if overdue := self._overdue():
                await self._act(overdue)

    def _say_early(self) -> None:
        """A first run is watched for minutes, and the bound is half an hour: a play that hangs should show."""
        starving = [wait for wait in self._waits.values() if wait.stage == "take"]
        if self._said_early or not starving or starving[0].taken_s < _EARLY * self._timeout_s:
            return
        self._said_early = True
        oldest = next((f"; {wait}" for wait in self._waits.values() if wait.stage == "produce"), "")
        told = f"still waiting: {starving[0]}{oldest} (a stall from watchdog.timeout_s, {self._timeout_s:g} s, on)"
        self._emit("stall", told, subject="take", alarm=False)

    def _overdue(self) -> list[Wait]:
        latest = time.monotonic() - self._timeout_s
        old = itertools.takewhile(lambda wait: wait.since < latest, self._waits.values())  # in order of their begin
        return [wait for wait in old if wait.taken_s > 2 * wait.reported_s]

    async def _act(self, overdue: list[Wait]) -> None:
        for wait in overdue:
            wait.reported_s = wait.taken_s
        told = "; ".join(str(wait) for wait in overdue[:3])
        if len(overdue) > 3:
            told += f"; and {len(overdue) - 3} more waits"
        told = f"{told} (watchdog.timeout_s is {self._timeout_s:g}); stacks in {self._path}"
        await self._write_report(told)
        self._emit("stall", told, subject=overdue[0].stage, taken_s=round(overdue[0].taken_s, 1))
        actors = {wait.actor for wait in overdue if wait.actor is not None}
        if self._action == "restart" and actors:
            for actor in actors:
                self._emit("stall", f"{actor.name} is killed and replaced", subject=actor.name)
                self._kill(actor)
        elif self._action != "warn" and not (self._action == "restart" and self._waits_for_actors()):
            raise Stalled(told, learner_hangs=await self._learner_hangs())

    async def _learner_hangs(self) -> bool:
        """Whether what the learner does now takes too long, once that is known: others that wait for it may have begun
        to wait before, and nothing can be saved while it hangs."""
        at_work = {number: wait for number, wait in self._waits.items() if wait.stage in _LEARNER_STAGES}
        while at_work := {number: wait for number, wait in at_work.items() if number in self._waits}:
            if any(wait.taken_s > self._timeout_s for wait in at_work.values()):
                return True
            await asyncio.sleep(min(1.0, self._timeout_s / 4))
        return False

    def _waits_for_actors(self) -> bool:
        """Whether what hangs may yet be one of the rollout actors, each of which has the same time."""
        learner = any(wait.stage in _LEARNER_STAGES for wait in self._waits.values() if wait.reported_s)
        return not learner and any(wait.actor is not None for wait in self._waits.values())

    async def _write_report(self, told: str) -> None:
        try:
            async with asyncio.timeout(_STACKS_TIMEOUT_S):
                actors = await self._stacks()
        except Exception as error:  # whatever it is: what hangs may also be what should answer here
            actors = f"the actors' stacks could not be had: {error!r}"
        waits = sorted(self._waits.values(), key=lambda wait: wait.since)
        self._keep(
            told,
            *(f"  {wait}" for wait in waits),
            "---- tasks of the driver",
            *_task_stacks(),
            "---- threads of the driver",
            *_thread_stacks(),
            "---- actors",
            actors,
        )

    def loop_held(self, held: HeldLoop, subject: str = "driver") -> None:
        """The event loop of this process, or of a rollout actor, is held up. May run in any thread."""
        self._keep(f"{subject}: {held.message}", held.stack)
        self._emit("stall", held.message, subject=subject)

    def _keep(self, told: str, *parts: str) -> None:
        try:
            with self._path.open("a") as file:
                file.write("\n".join([time.strftime("==== %Y-%m-%d %H:%M:%S ") + told, *parts]) + "\n")
        except OSError as error:  # of a full disk, say, which is no reason to end a run that is to go on
            self._emit("failure", f"{self._path} could not be written: {error}")


def watched(watchdog: Watchdog | None, stage: str, waits_for: str, actor: Any = None) -> AbstractContextManager[None]:
    """`Watchdog.wait`, where there may be nobody who watches."""
    return watchdog.wait(stage, waits_for, actor) if watchdog is not None else nullcontext()


def _task_stacks() -> Iterator[str]:
    for task in asyncio.all_tasks():
        text = io.StringIO()
        task.print_stack(limit=8, file=text)
        yield text.getvalue().rstrip()


def _thread_stacks() -> Iterator[str]:
    for thread, frame in sys._current_frames().items():
        yield f"thread {thread}\n{''.join(traceback.format_stack(frame, limit=12)).rstrip()}"
