"""What runs in the processes that Ray starts: a rollout actor, and a rank of the learner.

A rollout actor is a `Rollout` behind an `Outbox`, a rank is a `LearnerPart`. The driver's side is in `remotes.py`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from asyncrl.config import cores
from asyncrl.config.schema import Config
from asyncrl.envs.attempt import EnvFault
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.runtime.batched_calls import Answer, Numbered, Outbox, Tokens, separate
from asyncrl.runtime.build import LearnerPart, build_rollout
from asyncrl.runtime.placement import Placement
from asyncrl.runtime.rollout_worker import UpdateReport
from asyncrl.runtime.stacks import offer_stacks
from asyncrl.training import sharding
from asyncrl.training.sharding import join_ranks
from asyncrl.types import Group, Prompt, Version
from asyncrl.utils import gc_freeze as garbage
from asyncrl.weights.broadcast import Audience, Rendezvous, open_rendezvous
from asyncrl.weights.buckets import Bucket

SENDING = "sending"
"""The concurrency group of a learner rank's calls that send weights."""


class RolloutActor:
    """A rollout actor's process: its own event loop and its own engine."""

    def __init__(self, config: Config, folder: str, placement: Placement, store: Path | None) -> None:
        torch.set_num_threads(cores.share(config, cores.count()).engine)
        self._arguments = config, folder, placement
        self._store = store

    async def start(self) -> dict[str, Any]:
        """Builds the engine, in the actor's own event loop. Tells the ranks it takes, and facts about the process."""
        self._rollout = await build_rollout(*self._arguments, address=_own_address(), store=self._store)
        self._outbox = Outbox(self._rollout.run)
        garbage.settle()
        loop = type(asyncio.get_running_loop()).__module__
        return {"num_ranks": self._rollout.num_ranks, "loop": loop, **_process_facts()}

    @ray.method(num_returns=2)
    async def exchange(self, prompts: Sequence[Numbered]) -> tuple[list[Answer], list[Tokens]]:
        return await self._outbox.exchange(prompts)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[Group | EnvFault]:
        return await self._rollout.evaluate(prompts)

    async def join(self, where: Rendezvous, first_rank: int) -> None:
        await self._rollout.join(where, first_rank)

    async def release(self) -> None:
        await self._rollout.release()

    async def ping(self) -> None:
        """Answers, from the event loop that everything else runs on."""

    async def update_weights(self, buckets: Sequence[Bucket], version: Version) -> UpdateReport:
        return await self._rollout.update_weights(buckets, version)

    async def close(self) -> None:
        await self._rollout.close()


class LearnerActor:
    """The process of one learner rank. Weights go out from a thread of their own, beside a gradient."""

    def __init__(self, config: Config, folder: str, resume: Path | None, placement: Placement) -> None:
        torch.set_num_threads(cores.share(config, cores.count()).learner)
        self._arguments = config, folder, resume, placement

    def open(self, num_ranks: int) -> Rendezvous:
        """The meeting point of the learner ranks, at the first of them."""
        where, self._store = open_rendezvous(_own_address(), num_ranks, sharding.TIMEOUT_S)
        return where

    def start(self, where: Rendezvous | None, rank: int) -> tuple[Version, list[Bucket], dict[str, Any]]:
        """Meets the other ranks, if there are any, and builds the learner."""
        ranks = None
        if where is not None:
            store = self._store if rank == 0 else None
            ranks = join_ranks(where, rank, self._arguments[-1].device, _own_address(), store)
        self._part = LearnerPart(*self._arguments, address=_own_address(), ranks=ranks)
        self._learner = self._part.learner
        garbage.settle()
        return self._learner.version, self._learner.buckets, _process_facts()

    def gradient(self, places: Sequence[tuple[int, int]], *batches: Sequence[Any]) -> None:
        self._learner.gradient(separate(places, batches))

    def apply(self) -> tuple[Version, dict[str, float]]:
        metrics = self._learner.apply()
        return self._learner.version, metrics

    @ray.method(concurrency_group=SENDING)
    def rendezvous(self, world_size: int, audience: Audience) -> Rendezvous:
        return self._learner.rendezvous(world_size, audience)

    @ray.method(concurrency_group=SENDING)
    def join(self, audience: Audience) -> None:
        self._learner.join(audience)

    @ray.method(concurrency_group=SENDING)
    def prepare(self, audience: Audience) -> None:
        self._learner.prepare(audience)

    @ray.method(concurrency_group=SENDING)
    def broadcast(self, audience: Audience) -> str:
        return self._learner.broadcast(audience)

    def save(self, folder: Path, cursor: Cursor) -> None:
        self._part.save(folder, cursor)


def _process_facts() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "node": ray.get_runtime_context().get_node_id(),
        "address": _own_address(),
        "stacks": offer_stacks(),
    }


def _own_address() -> str:
    return str(ray.util.get_node_ip_address())
