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

from asyncrl import durable
from asyncrl.handles import RolloutHandle
from asyncrl.imports import check_run
from asyncrl.pool import RolloutPool
from asyncrl.recovery import journal

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
        say: Callable[[str], None],
        check_number: Callable[[int], None] = lambda _num_actors: None,
    ) -> None:
        """`check_number` raises `ValueError` if there is no room for so many rollout actors."""
        self._pool, self._start, self._folder = pool, start, folder
        self._target, self._left = target, max_replacements
        self._say, self._check_number = say, check_number
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
            self._say(f"alarm: {path} is ignored: {error}")
        else:
            self._say(f"rollout actors: {self._num_actors} -> {wanted}")
            self._check_room(wanted)
            self._left += max(0, wanted - self._num_actors)
            self._target, self._told_of_lack = wanted, False
        path.unlink()

    def _check_room(self, wanted: int) -> None:
        """It is the person's choice: who asks for too many hears it, and gets what can be started."""
        try:
            self._check_number(wanted)
        except ValueError as error:
            self._say(f"alarm: {error}")

    def _stop_surplus_starts(self) -> None:
        """Before actors that work are retired. No replacement is given back: who asks for more allows their starts."""
        while self._starting and self._num_actors > self._target:
            number, task = self._starting.popitem()  # the newest
            task.cancel()
            self._say(f"rollout actor {number} is not wanted any more: its start is stopped")

    def _start_missing(self) -> None:
        while self._num_actors < self._target and self._left > 0:
            self._left -= 1
            self._starting[self._next_number] = asyncio.create_task(self._start_one(self._next_number))
            self._next_number += 1
        if 0 < self._num_actors < self._target and not self._told_of_lack:
            self._told_of_lack = True
            self._say(
                f"alarm: {self._num_actors} of {self._target} rollout actors are left and rollout.max_replacements are "
                f"used up: launch/scale.py {self._folder} {self._target} allows as many starts as are missing"
            )
        self._pool.expect(self._left > 0 or bool(self._starting) or self._pool.num_joining > 0)

    def _retire_surplus(self) -> None:
        while len(self._pool.actors) + self._pool.num_joining > self._target:
            self._say(f"{self._pool.retire().name} gets no more prompts")

    async def _start_one(self, number: int) -> None:
        try:
            actor = await self._start(number)
        except Exception as error:  # whatever it is, the run goes on with the others
            self._pool.failures["actor not started"] += 1
            self._say(f"alarm: rollout actor {number} did not start: {error!r}")
        else:
            self._say(f"{actor.name} is ready and gets its weights at the next update")
            self._pool.add(actor)
        finally:  # in the same turn as the addition, so that nobody counts the actor twice
            self._starting.pop(number, None)
