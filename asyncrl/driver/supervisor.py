"""Keeps the number of rollout actors: starts new ones for those that died, and follows `launch/scale.py`.

    look, twice a second ---> too few: start one (in the background) ---> pool.add ---> weights, digest checked
                         `--> too many: stop a start that is under way, the newest first; then
                              pool.retire: no more prompts, closed when its last one is finished
The others generate all the time. A newcomer gets its weights at the learner's next update, or at once while the learner
waits for groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from asyncrl.driver.rollout_pool import RolloutPool
from asyncrl.monitor.events import Emit
from asyncrl.recovery import journal
from asyncrl.runtime.handles import RolloutHandle
from asyncrl.utils import durable
from asyncrl.utils.importing import check_run

_LOOK_S = 0.5
_CONTROL = "control.json"

Start = Callable[[int], Awaitable[RolloutHandle]]
"""Starts the rollout actor of a number that no other one ever had."""


class Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a person asks of a run in progress."""

    num_rollout_actors: int


def request(folder: Path, num_rollout_actors: int) -> None:
    """Asks the run of this folder for another number of rollout actors. Raises `ValueError` if it cannot be."""
    check_run(folder)
    if num_rollout_actors < 1:
        raise ValueError(f"a run needs at least 1 rollout actor, got {num_rollout_actors}")
    if not journal.in_use(folder / "journal.bin"):
        raise ValueError(f"{folder} is the folder of a run that has ended: go on with launch/run.py --resume {folder}")
    durable.write(folder / _CONTROL, msgspec.json.encode(Control(num_rollout_actors)))


class Supervisor:
    """Owns the target and the actors that are being started."""

    def __init__(
        self,
        pool: RolloutPool,
        start: Start,
        folder: Path,
        *,
        target: int,
        first_number: int,
        max_replacements: int,
        emit: Emit,
        check_number: Callable[[int], None] = lambda _num_actors: None,
    ) -> None:
        """`check_number` raises `ValueError` if there is no room for so many rollout actors."""
        self._pool, self._start, self._folder = pool, start, folder
        self._target, self._left, self._used = target, max_replacements, 0
        self._emit, self._check_number = emit, check_number
        pool.presence.outlook, pool.presence.waits_for = self._outlook, self._waits_for
        self._next_number = first_number
        self._starting: dict[int, asyncio.Task[None]] = {}  # by the actor's number
        self._told_of_lack = False  # since somebody asked last
        pool.expect(max_replacements > 0)
        (folder / _CONTROL).unlink(missing_ok=True)  # asked of an earlier life

    async def run(self, updating: asyncio.Lock, synchronize: Callable[[], Awaitable[object]]) -> None:
        """Until cancelled. `updating` is held by whoever steps the learner or updates weights."""
        adjusting: asyncio.Task[None] | None = None  # beside the looking: a newcomer that dies in it is replaced
        try:
            while True:
                self._read_target()
                self._stop_surplus_starts()
                self._start_missing()
                self._pool.presence.remind()
                if adjusting is not None and adjusting.done():
                    adjusting.result()
                    adjusting = None
                surplus = self._num_actors > self._target
                if adjusting is None and (surplus or (self._pool.num_joining and not updating.locked())):
                    adjusting = asyncio.create_task(self._adjust(updating, synchronize))
                await asyncio.sleep(_LOOK_S)
        finally:
            for task in (*self._starting.values(), *([adjusting] if adjusting else [])):
                task.cancel()
            self._pool.expect(False)

    async def _adjust(self, updating: asyncio.Lock, synchronize: Callable[[], Awaitable[object]]) -> None:
        async with updating:
            self._retire_surplus()
            if self._pool.num_joining:
                await synchronize()

    @property
    def _num_actors(self) -> int:
        return len(self._pool.actors) + self._pool.num_joining + len(self._starting)

    def _read_target(self) -> None:
        path = self._folder / _CONTROL
        if not path.exists():
            return
        try:
            wanted = msgspec.json.decode(path.read_bytes(), type=Control).num_rollout_actors
        except msgspec.MsgspecError as error:
            self._emit("alarm", f"{path} is ignored: {error}")
        else:
            self._emit("decision", f"rollout actors: {self._num_actors} -> {wanted}", wanted=wanted)
            self._check_room(wanted)
            self._left += max(0, wanted - self._num_actors)
            self._target, self._told_of_lack = wanted, False
        path.unlink()

    def _check_room(self, wanted: int) -> None:
        """It is the person's choice: who asks for too many hears it, and gets what can be started."""
        try:
            self._check_number(wanted)
        except ValueError as error:
            self._emit("alarm", str(error))

    def _stop_surplus_starts(self) -> None:
        """Before actors that work are retired. No replacement is given back: who asks for more allows their starts."""
        while self._starting and self._num_actors > self._target:
            number, task = self._starting.popitem()  # the newest
            task.cancel()
            message = f"rollout actor {number} is not wanted any more: its start is stopped"
            self._emit("replacement", message, subject=f"rollout {number}")

    def _start_missing(self) -> None:
        while self._num_actors < self._target and self._left > 0:
            self._left -= 1
            self._used += 1
            number, self._next_number = self._next_number, self._next_number + 1
            self._starting[number] = asyncio.create_task(self._start_one(number))
            message = f"rollout actor {number} is being started: {self._replacement(self._used)}"
            self._emit("replacement", message, subject=f"rollout {number}")
        if 0 < self._num_actors < self._target and not self._told_of_lack:
            self._told_of_lack = True
            self._emit(
                "alarm",
                f"{self._num_actors} of {self._target} rollout actors are left and rollout.max_replacements are "
                f"used up: launch/scale.py {self._folder} {self._target} allows as many starts as are missing",
            )
        self._pool.expect(self._left > 0 or bool(self._starting) or self._pool.num_joining > 0)

    def _retire_surplus(self) -> None:
        while len(self._pool.actors) + self._pool.num_joining > self._target:
            name = self._pool.retire().name
            self._emit("replacement", f"{name} gets no more prompts", subject=name)

    def _replacement(self, number: int) -> str:
        return f"replacement {number} of {self._used + self._left}"

    def _outlook(self) -> str:
        """What becomes of the place of an actor that just died: the next look starts what is missing."""
        missing = self._target - self._num_actors
        if missing <= 0:
            return "it was to leave anyway"
        if missing > self._left:
            return "nobody takes its place, as rollout.max_replacements are used up"
        return f"{self._replacement(self._used + missing)} is started"

    def _waits_for(self) -> str:
        if self._pool.num_joining:
            return "the weights of an actor that is ready"
        first = self._used - len(self._starting) + 1
        return self._replacement(first)

    async def _start_one(self, number: int) -> None:
        try:
            actor = await self._start(number)
        except Exception as error:  # whatever it is, the run goes on with the others
            self._pool.failures["actor not started"] += 1
            told = next(iter(str(error).splitlines()), "") or type(error).__name__
            message = f"rollout actor {number} did not start: {told}"
            self._emit("failure", message, subject=f"rollout {number}", raw=repr(error))
        else:
            message = f"{actor.name} is ready and gets its weights at the next update"
            self._emit("replacement", message, subject=actor.name, waits_for=f"the weights of {actor.name}")
            self._pool.add(actor)
        finally:  # in the same turn as the addition, so that nobody counts the actor twice
            self._starting.pop(number, None)
