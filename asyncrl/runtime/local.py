"""Everything in one process: for debugging and for tests that need determinism. The loop above is the same.

Each engine runs in the driver's event loop; the learner works in a thread, so generation goes on beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from asyncrl.config import cores
from asyncrl.config.schema import Config
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.runtime.build import LearnerPart, build_rollout
from asyncrl.runtime.placement import plan
from asyncrl.runtime.rollout_worker import Rollout
from asyncrl.types import Group, Version
from asyncrl.utils import gc_freeze as garbage
from asyncrl.weights.broadcast import Audience, Rendezvous
from asyncrl.weights.buckets import Bucket

T = TypeVar("T")


class LocalLearner:
    """A learner that is an object; its calls run in threads."""

    def __init__(self, part: LearnerPart) -> None:
        self._part, self._learner = part, part.learner
        self.buckets: Sequence[Bucket] = self._learner.buckets
        # Threads of its own, as an environment may fill or shut down those that asyncio shares out. One computes, which
        # torch wants to be the same one each time, and one sends weights meanwhile.
        self._working, self._sending = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    @property
    def version(self) -> Version:
        return self._learner.version

    async def gradient(self, groups: Sequence[Group]) -> None:
        await self._work(partial(self._learner.gradient, [group.trajectories for group in groups]))

    async def apply(self) -> dict[str, float]:
        return await self._work(self._learner.apply)

    async def rendezvous(self, world_size: int, audience: Audience = "rollouts") -> Rendezvous:
        return self._learner.rendezvous(world_size, audience)

    async def join(self, audience: Audience = "rollouts") -> None:
        await self._send(partial(self._learner.join, audience))

    async def prepare(self, audience: Audience = "rollouts") -> None:
        await self._send(partial(self._learner.prepare, audience))

    async def broadcast(self, audience: Audience = "rollouts") -> str:
        return await self._send(partial(self._learner.broadcast, audience))

    async def save(self, folder: Path, cursor: Cursor) -> None:
        await self._work(partial(self._part.save, folder, cursor))

    async def _work(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._working, call)

    async def _send(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._sending, call)


async def start_rollout(config: Config, folder: str, store: Path | None, number: int) -> Rollout:
    """One more rollout actor."""
    return await build_rollout(config, folder, plan(config, num_gpus=0), name=f"rollout {number}", store=store)


def check_number(_config: Config, _num_actors: int) -> None:
    """Any will do: they take turns in one process."""


async def stacks(_learner: LocalLearner, _rollouts: Sequence[Rollout]) -> str:
    """The actors' stacks are among those of this process."""
    return "all in the driver's process"


def kill(rollout: Rollout) -> None:
    """Refused: an actor of this runtime has no process of its own."""
    raise RuntimeError(f"{rollout.name} cannot be killed: it lives in this process; set runtime=cluster")


@asynccontextmanager
async def open_actors(
    config: Config, folder: str, resume: Path | None, store: Path | None = None
) -> AsyncIterator[tuple[LocalLearner, list[Rollout]]]:
    """The learner and the rollout actors, closed on the way out. The last `eval.num_actors` are the evaluators. `store`
    is where finished groups are written."""
    torch.set_num_threads(cores.here(config).learner)
    learner = LocalLearner(LearnerPart(config, folder, resume, plan(config, num_gpus=0)))
    rollouts = [await start_rollout(config, folder, store, number) for number in range(config.num_engines)]
    try:
        with garbage.settled():
            yield learner, rollouts
    finally:
        await asyncio.gather(*(rollout.close() for rollout in rollouts))
