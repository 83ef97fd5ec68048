"""What the driver holds of the other processes: rollout actors and the learner. Both runtimes implement these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from asyncrl.envs.attempt import EnvFault
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.runtime.rollout_worker import UpdateReport
from asyncrl.types import Group, Prompt, Version
from asyncrl.weights.broadcast import Audience, Rendezvous
from asyncrl.weights.buckets import Bucket


class ActorDied(RuntimeError):
    """The process behind a rollout actor, or one behind its engine, is gone. Its text is the cause, in one line."""

    fate = "died"

    def __init__(self, cause: str, raw: str = "") -> None:
        """`raw`: what the runtime said of it."""
        super().__init__(cause)
        self.raw = raw or cause


class ActorSilent(ActorDied):
    """The process behind a rollout actor does not answer: it is stopped, swapped out, or cut off."""

    fate = "fell silent"


class TokensLost(RuntimeError):
    """The tokens of finished groups are gone, with the node that held them."""


class RolloutHandle(Protocol):
    """A rollout actor as the driver sees it; both runtimes have one. Raises `ActorDied` when the process is gone."""

    name: str
    num_ranks: int

    async def run(self, prompt: Prompt) -> Group: ...
    async def evaluate(self, prompts: Sequence[Prompt]) -> list[Group | EnvFault]: ...
    async def join(self, where: Rendezvous, first_rank: int) -> None: ...
    async def release(self) -> None: ...
    async def ping(self) -> None: ...
    async def update_weights(self, buckets: Sequence[Bucket], version: Version) -> UpdateReport: ...
    async def close(self) -> None: ...


class Publisher(Protocol):
    """The learner's side of a weight update, as the driver sees it."""

    version: Version
    buckets: Sequence[Bucket]

    async def rendezvous(self, world_size: int) -> Rendezvous: ...
    async def join(self) -> None: ...
    async def prepare(self) -> None: ...
    async def broadcast(self) -> str: ...


class LearnerLink(Protocol):
    """The learner's side of weight updates, to either audience."""

    version: Version
    buckets: Sequence[Bucket]

    async def rendezvous(self, world_size: int, audience: Audience = ...) -> Rendezvous: ...
    async def join(self, audience: Audience = ...) -> None: ...
    async def prepare(self, audience: Audience = ...) -> None: ...
    async def broadcast(self, audience: Audience = ...) -> str: ...


class LearnerHandle(LearnerLink, Protocol):
    """The learner as the driver sees it; both runtimes have one."""

    async def gradient(self, groups: Sequence[Group]) -> None:
        """Raises `TokensLost`, the learner being as it was, when no rank of it can have those of a group any more."""

    async def apply(self) -> dict[str, float]: ...
    async def save(self, folder: Path, cursor: Cursor) -> None: ...


class ToEvaluators:
    """The learner as the evaluators' pool sees it: the same weights, through a broadcast group of their own."""

    def __init__(self, learner: LearnerLink) -> None:
        self._learner = learner
        self.version, self.buckets = learner.version, learner.buckets

    async def rendezvous(self, world_size: int) -> Rendezvous:
        return await self._learner.rendezvous(world_size, "evaluators")

    async def join(self) -> None:
        await self._learner.join("evaluators")

    async def prepare(self) -> None:
        await self._learner.prepare("evaluators")

    async def broadcast(self) -> str:
        return await self._learner.broadcast("evaluators")
