"""The rollout actors that take weight updates together: their broadcast group with the learner, an update of all of
them, and what it found and cost.

A group has the members that it began with. When one of them died or somebody is to be added, the pool makes another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar

from asyncrl.driver.watchdog import Watchdog, watched
from asyncrl.monitor.timeline import Timeline
from asyncrl.runtime.handles import ActorDied, Publisher, RolloutHandle
from asyncrl.runtime.rollout_worker import UpdateReport
from asyncrl.types import Version
from asyncrl.utils.threads import in_thread
from asyncrl.weights.broadcast import BroadcastFailed, Rendezvous, abandon

T = TypeVar("T")
Reports: TypeAlias = dict[RolloutHandle, UpdateReport]

_AT_START = UpdateReport(
    digest="", settle_s=0.0, receive_s=0.0, pause_s=0.0, now_s=0.0, busy_s=0.0, held_s=0.0, num_tokens=0
)
"""Before an actor's first report."""


class UpdateGroup:
    """Rollout actors in one broadcast group with the learner."""

    def __init__(self, actors: Sequence[RolloutHandle], timeline: Timeline, watchdog: Watchdog | None = None) -> None:
        """`watchdog` is told of what the learner and each of the actors is waited for."""
        self.actors = list(actors)
        self._timeline, self._watchdog = timeline, watchdog
        self._where: Rendezvous

    async def form(self, learner: Publisher) -> list[Any]:
        """Joins all of them. Returns what became of it: an exception or None for each actor.

        Raises `RuntimeError` if anyone could not join for another reason than an actor's death, `BroadcastFailed` if
        nothing but the broadcast group failed.
        """
        self._where = await learner.rendezvous(1 + sum(actor.num_ranks for actor in self.actors))
        joins, rank = [], 1
        for actor in self.actors:
            joins.append(self._join(actor, rank))
            rank += actor.num_ranks
        joining = self._sending(learner.join, "to join the broadcast group")
        joined = await asyncio.gather(joining, *joins, return_exceptions=True)
        if not any(isinstance(result, ActorDied) for result in joined[1:]):
            names = ["the learner", *(actor.name for actor in self.actors)]
            if (failed := first_failure(joined)) is not None:
                kind = BroadcastFailed if isinstance(failed, BroadcastFailed) else RuntimeError
                raise kind(f"{names[joined.index(failed)]} could not join the weight broadcast: {failed}") from failed
        return joined[1:]

    async def update(self, learner: Publisher) -> tuple[Any, list[Any]]:
        """Sends the learner's version to all of them. Returns the digest that was sent, and a report for each actor.

        If an actor died, exceptions are among them, and the digest may be one. Otherwise raises `BroadcastFailed` if
        nothing but the broadcast failed, and what else failed first, with the actor's name.
        """
        await self._sending(learner.prepare, f"to prepare version {learner.version}")  # before any engine pauses
        updates = (self._update(actor, learner) for actor in self.actors)
        sending = self._sending(learner.broadcast, f"to send version {learner.version}")
        sent, *reports = results = await asyncio.gather(sending, *updates, return_exceptions=True)
        failed = first_failure(results)
        if failed is None or any(isinstance(report, ActorDied) for report in reports):
            return sent, reports
        if failed is sent or isinstance(failed, BroadcastFailed):
            raise failed
        name = self.actors[reports.index(failed)].name
        raise RuntimeError(f"{name} failed to take weights version {learner.version}: {failed}") from failed

    def check(self, sent: str, reports: Sequence[Any], version: Version) -> Reports:
        """The actors' reports. Raises `RuntimeError` where one holds other weights than were `sent`."""
        for actor, report in zip(self.actors, reports, strict=True):
            if report.digest != sent:
                raise RuntimeError(
                    f"{actor.name} holds other weights than were sent for version {version}: digest {report.digest}, "
                    f"sent {sent}"
                )
        return dict(zip(self.actors, reports, strict=True))

    async def _sending(self, work: Callable[[], Awaitable[T]], what: str) -> T:
        with watched(self._watchdog, "send", f"the learner {what}"):
            return await work()

    async def _join(self, actor: RolloutHandle, rank: int) -> None:
        async with self._announced(actor):
            watch = watched(self._watchdog, "update", f"{actor.name} to join the broadcast group", actor)
            with watch, self._timeline.span(actor.name, "join"):
                await actor.join(self._where, rank)

    async def _update(self, actor: RolloutHandle, learner: Publisher) -> UpdateReport:
        async with self._announced(actor):
            watch = watched(self._watchdog, "update", f"{actor.name} to take version {learner.version}", actor)
            with watch, self._timeline.span(actor.name, "update", version=learner.version) as facts:
                report = await actor.update_weights(learner.buckets, learner.version)
                facts |= {"pause_s": report.pause_s, "settle_s": report.settle_s, "receive_s": report.receive_s}
            return report

    @asynccontextmanager
    async def _announced(self, actor: RolloutHandle) -> AsyncIterator[None]:
        """The others of the broadcast group hear of a death: they wait, and only some transports notice it."""
        try:
            yield
        except ActorDied:
            await in_thread(partial(abandon, self._where, f"{actor.name} died"))
            raise


def first_failure(results: Sequence[Any]) -> BaseException | None:
    """Of what failed, something that is no consequence of others: a broadcast fails at everybody."""
    failures = [result for result in results if isinstance(result, BaseException)]
    return min(failures, key=lambda failure: isinstance(failure, BroadcastFailed), default=None)


def measure(reports: Reports, before: Mapping[RolloutHandle, UpdateReport]) -> dict[str, float]:
    """What this update cost, and what the engines' time since the reports `before`, or since their start, went into."""
    slowest = max(reports.values(), key=lambda report: report.pause_s)
    pairs = [(report, before.get(actor, _AT_START)) for actor, report in reports.items()]
    busy = sum(report.busy_s - last.busy_s for report, last in pairs)
    held = sum(report.held_s - last.held_s for report, last in pairs)
    span = sum(report.now_s - last.now_s for report, last in pairs)
    tokens = sum(report.num_tokens - last.num_tokens for report, last in pairs)
    return {
        "sync/pause_s": slowest.pause_s,
        "sync/settle_s": slowest.settle_s,
        "sync/receive_s": slowest.receive_s,
        "rollout/idle": max(0.0, 1 - busy / max(span, 1e-9)),
        "rollout/held": held / max(span, 1e-9),
        "rollout/num_tokens": float(tokens),
        "rollout/num_actors": float(len(reports)),
    }
