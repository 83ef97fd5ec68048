"""Actors as the driver sees them: `RolloutHandle` and `LearnerHandle` over Ray.

Token columns stay in the object store: a rollout actor returns them as a second value, whose reference the driver
passes on to the learner without reading it. `exchange.py` puts several prompts and groups into one call.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from asyncrl.engines.base import EngineDied
from asyncrl.envs.attempt import EnvFault
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.runtime.batched_calls import Answer, Exchange, Numbered, unite
from asyncrl.runtime.handles import ActorDied, TokensLost
from asyncrl.runtime.rollout_worker import UpdateReport
from asyncrl.types import Group, Prompt, Version
from asyncrl.weights.broadcast import Audience, Rendezvous
from asyncrl.weights.buckets import Bucket

_CLOSE_S = 60.0  # an engine waits for its processes for 30
_ALIKE_S = 10.0
"""Within which the ranks of a learner all find that tokens are lost, or some of them have copies."""
_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,  # Ray's memory monitor ended it, which Ray does not call a death
    ray.exceptions.NodeDiedError,
    EngineDied,  # without its engine an actor is of no use
)


_KILLED = (
    "its process was killed by a signal or crashed (kill -9, the kernel's killer where memory is out, or native code)"
)
_EXITS = {
    "SYSTEM_ERROR": _KILLED,
    "NODE_OUT_OF_MEMORY": "out of memory: Ray ended its process, as its node had little left",
    "INTENDED_USER_EXIT": "its process exited by itself",
    "INTENDED_SYSTEM_EXIT": "it was ended on purpose (ray.kill, or the end of its job)",
    "USER_ERROR": "an exception ended its process",
}
"""What Ray's exit type of a worker means."""


def cause_of_death(error: BaseException) -> str:
    """Why a process is gone, in one line of our own words; Ray's text goes on for a page."""
    text = str(error)
    first = next(filter(None, map(str.strip, text.splitlines())), type(error).__name__)
    exit_type = re.search(r"[Ee]xit type: (\w+)", text)
    known = {
        f"its engine ended: {first}": isinstance(error, EngineDied),
        _EXITS["NODE_OUT_OF_MEMORY"]: isinstance(error, ray.exceptions.OutOfMemoryError),
        "its node was lost": isinstance(error, ray.exceptions.NodeDiedError) or "node has died" in text,
        "an exception where it was made, see its raw text": getattr(error, "actor_init_failed", False),
        "its process cannot be reached": isinstance(error, ray.exceptions.ActorUnavailableError),
        _EXITS["INTENDED_SYSTEM_EXIT"]: "killed by `ray.kill`" in text,
        _EXITS.get(exit_type[1], first) if exit_type else first: True,
    }
    return next(cause for cause, found in known.items() if found)


class RemoteRollout:
    """A rollout actor as the driver sees it."""

    def __init__(self, name: str, actor: Any, facts: dict[str, Any]) -> None:
        self.name = name
        self.actor = actor
        self.facts = facts
        self.num_ranks: int = facts["num_ranks"]
        self._exchange = Exchange(self._call, self._explain)

    async def run(self, prompt: Prompt) -> Group:
        with self._dying():
            return await self._exchange.run(prompt)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[Group | EnvFault]:
        played: list[Group | EnvFault] = await self._reply(self.actor.evaluate.remote(prompts))
        return played

    async def join(self, where: Rendezvous, first_rank: int) -> None:
        await self._reply(self.actor.join.remote(where, first_rank))

    async def release(self) -> None:
        await self._reply(self.actor.release.remote())

    async def ping(self) -> None:
        await self._reply(self.actor.ping.remote())

    async def update_weights(self, buckets: Sequence[Bucket], version: Version) -> UpdateReport:
        report: UpdateReport = await self._reply(self.actor.update_weights.remote(buckets, version))
        return report

    async def close(self) -> None:
        """Ends the process, also one that is not heard of any more."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._reply(self.actor.close.remote())
        finally:
            ray.kill(self.actor)

    async def _reply(self, reference: Any) -> Any:
        with self._dying():
            return await reference

    @contextmanager
    def _dying(self) -> Iterator[None]:
        try:
            yield
        except _DEATHS as error:
            raise self._explain(error) from error

    def _call(self, prompts: list[Numbered]) -> tuple[asyncio.Future[list[Answer]], Any]:
        answers, tokens = self.actor.exchange.remote(prompts)
        return asyncio.wrap_future(answers.future()), tokens

    def _explain(self, error: BaseException) -> Exception:
        if isinstance(error, _DEATHS):
            return ActorDied(cause_of_death(error), str(error))  # whose name is told by whoever takes it out
        return RuntimeError(f"{self.name}: {error}")


class RemoteLearner:
    """The learner as the driver sees it. `ranks` are its actors, whose first one answers; `facts` are of each."""

    def __init__(
        self, ranks: Sequence[Any], version: Version, buckets: Sequence[Bucket], facts: list[dict[str, Any]]
    ) -> None:
        self.ranks = ranks
        self.version = version
        self.buckets = buckets
        self.facts = facts

    async def gradient(self, groups: Sequence[Group]) -> None:
        places, batches = unite(groups)
        calls = self._calls("gradient", places, *batches)
        gone = "the node that held tokens of finished groups is gone"
        try:
            await asyncio.gather(*calls)
        except ray.exceptions.ObjectLostError as error:  # which Ray finds before it calls the learner
            _, begun = await asyncio.wait(calls, timeout=_ALIKE_S)
            if begun or not all(isinstance(call.exception(), ray.exceptions.ObjectLostError) for call in calls):
                # One that had a copy is in the step, and would take the others' next one for it.
                raise RuntimeError(
                    f"{gone}, and some ranks of the learner had copies and others not: go on from the last checkpoint, "
                    "with --resume"
                ) from error
            raise TokensLost(gone) from error

    async def apply(self) -> dict[str, float]:
        metrics: dict[str, float]
        self.version, metrics = await self._all("apply")
        return metrics

    async def rendezvous(self, world_size: int, audience: Audience = "rollouts") -> Rendezvous:
        where: Rendezvous = await self.ranks[0].rendezvous.remote(world_size, audience)
        return where

    async def join(self, audience: Audience = "rollouts") -> None:
        await self.ranks[0].join.remote(audience)

    async def prepare(self, audience: Audience = "rollouts") -> None:
        await self._all("prepare", audience)

    async def broadcast(self, audience: Audience = "rollouts") -> str:
        digest: str = await self._all("broadcast", audience)
        return digest

    async def save(self, folder: Path, cursor: Cursor) -> None:
        await self._all("save", folder, cursor)

    async def _all(self, method: str, *arguments: Any) -> Any:
        """Calls every rank; raises the first failure of any, as the others may then wait for ever."""
        answers = await asyncio.gather(*self._calls(method, *arguments))
        return answers[0]

    def _calls(self, method: str, *arguments: Any) -> list[asyncio.Future[Any]]:
        return [asyncio.ensure_future(getattr(rank, method).remote(*arguments)) for rank in self.ranks]
