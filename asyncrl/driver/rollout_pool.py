"""The rollout actors of a run, as the driver sees them: who gets the next prompt, what happens to failures, and who is
there for the weight update, which reaches all of them or ends the run (`update_group.py`).

Failures are counted by kind. An attempt that the environment spoils is made again by its actor, which tells with the
group; a prompt whose rollout raises is tried on another actor, and raises `RolloutFailed` once its attempts are used
up. An actor that died, or does not answer for long (`heartbeat.py`), leaves the pool; its prompts are tried elsewhere
and the others form a new broadcast group. An actor that was added gets its first prompt once a weight update has
reached it, its digest checked; the others generate meanwhile. One that was retired gets no more prompts; it takes
weight updates, which resume it, until nothing waits for it any more, and is closed then.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from asyncrl.driver import heartbeat
from asyncrl.driver.presence import Presence
from asyncrl.driver.watchdog import Watchdog, watched
from asyncrl.driver.weight_update import Reports, UpdateGroup, measure
from asyncrl.envs.attempt import EnvFault
from asyncrl.monitor.events import Emit
from asyncrl.monitor.timeline import Timeline
from asyncrl.runtime.handles import ActorDied, ActorSilent, Publisher, RolloutHandle
from asyncrl.types import Failure, Group, Prompt, Version
from asyncrl.utils.quote import quote
from asyncrl.weights.broadcast import BroadcastFailed

_MORE_TRIES = 2
"""At a weight update whose broadcast failed, unless it is the first: then something is wrong with the network."""


class RolloutFailed(RuntimeError):
    """A prompt used up its attempts."""


class AllActorsDied(RolloutFailed):
    """Nobody is left to generate, and nobody will come."""


class RolloutPool:
    """The rollout actors of a run."""

    def __init__(self, actors: Sequence[RolloutHandle], max_attempts: int, timeline: Timeline | None = None) -> None:
        self._timeline = timeline or Timeline()
        self.watchdog: Watchdog | None = None
        """Told of every prompt that is waited for."""
        self.kill: Callable[[RolloutHandle], None] = lambda _actor: None
        """Ends the process of an actor at once, also one that does not answer."""
        self.presence = Presence(self._timeline)
        self._load: dict[RolloutHandle, int] = dict.fromkeys(actors, 0)
        self._joining: list[RolloutHandle] = []  # without weights so far
        self._retired: list[RolloutHandle] = []  # those with prompts of before, and weights
        self._dead: set[RolloutHandle] = set()
        self._calls: Counter[RolloutHandle] = Counter()  # of any kind, that wait for an actor
        self._closing: set[asyncio.Future[Any]] = set()
        self._arrived = asyncio.Event()
        self._last: RolloutHandle | None = None  # that a prompt went to
        self._expects_more = False
        self._max_attempts = max_attempts
        self._group: UpdateGroup | None = None  # until somebody comes or goes
        self._reports: Reports = {}  # of the last update
        self.failures: Counter[str] = Counter()
        self.published: dict[Version, str] = {}
        """Digest of every version that was ever live."""
        for actor in actors:
            self.presence.came(actor)

    def gauges(self) -> dict[str, float | dict[str, float]]:
        """What is true now, also between steps and from another thread; failures by kind."""
        kinds = dict(self.failures)
        return {
            "rollout/num_actors": float(len(self._load)),
            "rollout/num_joining": float(len(self._joining)),
            "rollout/outage_s": self.presence.outage_s,
            "rollout/failures": float(sum(kinds.values())),
            "rollout/failures_by_kind": {kind: float(count) for kind, count in kinds.items()},
        }

    @property
    def actors(self) -> list[RolloutHandle]:
        """Those that get prompts."""
        return list(self._load)

    @property
    def members(self) -> list[RolloutHandle]:
        """Those and the retired that still have some: all that hold weights."""
        return [*self._load, *self._retired]

    @property
    def num_joining(self) -> int:
        """Actors that wait for their first weights."""
        return len(self._joining)

    def add(self, actor: RolloutHandle) -> None:
        """The actor takes part from the next weight update on."""
        self._joining.append(actor)
        self._group = None
        self._arrived.set()

    def retire(self) -> RolloutHandle:
        """Takes the least loaded actor out of the pool; it is closed once nothing waits for it."""
        actor = self._joining[-1] if self._joining else min(self._load, key=self._load.__getitem__)
        if actor in self._joining:
            self._joining.remove(actor)
        if self._load.pop(actor, None) is not None:
            self.presence.left(actor)
        self._retired.append(actor)
        self._close_if_left(actor)
        return actor

    def expect(self, more: bool) -> None:
        """Whether an actor may still be added: then the death of the last one is waited out. If not, what waits for an
        actor raises `AllActorsDied`."""
        self._expects_more = more
        if not more:
            self._arrived.set()

    async def run(self, prompt: Prompt) -> Group:
        """The prompt's group, from the least loaded actor; other actors are tried when one fails."""
        tried: set[RolloutHandle] = set()
        num_failed = 0
        for attempt in range(1, self._max_attempts + 1):
            actor = await self._least_loaded(tried)
            try:
                group = await self._run_on(actor, prompt)
            except ActorDied as error:
                self._remove(actor, error)
            except Exception as error:
                failures = _failures(error)
                self._count(failures)
                num_failed += len(failures)
                tried.add(actor)
                if attempt == self._max_attempts or (isinstance(error, EnvFault) and not self._others_than(tried)):
                    raise RolloutFailed(
                        f"{num_failed} attempts of prompt {prompt.id} failed, the last on {actor.name}: "
                        f"{quote(error, 1000)}; rollout.max_attempts bounds the attempts"
                    ) from error
            else:
                self._count(group.failures)
                return group
        raise RolloutFailed(f"prompt {prompt.id}: {self._max_attempts} rollout actors died while running it")

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[Group | EnvFault]:
        """Held-out attempts without their tokens, the prompts spread evenly over all actors, beside generation.

        In place of a prompt that the environment spoilt for good is its fault.
        """
        while True:
            await self._least_loaded(set())  # there is one
            actors = self.actors
            shares = [prompts[index :: len(actors)] for index in range(len(actors))]
            played: list[Any] = await asyncio.gather(
                *(self._evaluate_on(actor, part) for actor, part in zip(actors, shares, strict=True)),
                return_exceptions=True,
            )
            if self._handle_deaths(actors, played):
                continue
            for part in played:
                if isinstance(part, BaseException):
                    raise part
            return [group for part in played for group in part]

    async def release(self) -> None:
        """Every engine gives its GPU memory to the learner until the next update. Actors that died are left out."""
        actors = self.members
        with self._calling(*actors):
            released: list[Any] = await asyncio.gather(*(actor.release() for actor in actors), return_exceptions=True)
        self._handle_deaths(actors, released)
        for actor, result in zip(actors, released, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, ActorDied):
                raise RuntimeError(f"{actor.name} could not give its memory back: {result}") from result

    async def listen(self, timeout_s: float) -> None:
        """Until cancelled: an actor that does not answer for `timeout_s` is ended, and counts as dead. So one whose
        process was stopped does not come back into its place."""
        await heartbeat.listen(lambda: [*self.members, *self._joining], self._silence, timeout_s)

    async def update_weights(self, learner: Publisher) -> dict[str, float]:
        """Makes the learner's version live on every actor and checks its digest there.

        Actors that died are left out. A broadcast that failed while all live is made again, a few times. Anything else
        that goes wrong ends the run with a `RuntimeError` that names the actor: an engine on old weights would look
        like staleness for ever after.
        """
        tries_left = _MORE_TRIES if self.published else 0
        while True:
            await self._wait_while(lambda: not self._load and not self._joining)
            begin = time.monotonic()
            try:
                group = self._group
                if group is None:
                    await self._form_group(learner)
                    continue  # somebody may have come or gone meanwhile
                with self._calling(*group.actors):
                    sent, results = await group.update(learner)
            except BroadcastFailed as error:
                self._group = None
                if not tries_left:
                    raise
                tries_left -= 1
                told = " ".join(str(getattr(error, "cause", error)).split())
                message = f"version {learner.version} goes out again, as its broadcast failed: {told}"
                self._emit("failure", message, subject="weight sync", raw=str(error))
                continue
            if self._handle_deaths(group.actors, results):
                continue
            reports = group.check(sent, results, learner.version)
            self.published[learner.version] = sent
            self._admit_joined(group.actors)
            found = {"sync/total_s": time.monotonic() - begin, **measure(reports, self._reports)}
            self._reports = {actor: report for actor, report in reports.items() if actor in self.members}
            return found | {"rollout/failures": float(sum(self.failures.values()))}

    async def close(self) -> None:
        await asyncio.gather(*(actor.close() for actor in self.members), return_exceptions=True)

    @property
    def _emit(self) -> Emit:
        return self.presence.emit

    def _admit_joined(self, actors: list[RolloutHandle]) -> None:
        for actor in [actor for actor in self._joining if actor in actors]:
            self._joining.remove(actor)
            self._load[actor] = 0
            self.presence.came(actor)
        self._arrived.set()

    async def _least_loaded(self, tried: set[RolloutHandle]) -> RolloutHandle:
        """With room for a few in a row: prompts of one turn that go to the same actor are one call.

        An actor may get ahead of the least loaded one by an eighth of the mean load, by nothing where that is below 1.
        """
        await self._wait_while(lambda: not self._load)
        actors = [actor for actor in self._load if actor not in tried] or self.actors
        least = min(actors, key=self._load.__getitem__)
        room = sum(self._load.values()) // (8 * len(self._load))
        if self._last not in actors or self._load[self._last] >= self._load[least] + room:
            self._last = least
        return self._last

    async def _wait_while(self, nobody: Callable[[], bool]) -> None:
        while nobody():
            if not self._expects_more:
                raise AllActorsDied(f"every rollout actor died: {dict(self.failures)}")
            self._arrived.clear()
            await self._arrived.wait()

    async def _run_on(self, actor: RolloutHandle, prompt: Prompt) -> Group:
        self._load[actor] += 1
        what = f"{actor.name} to play prompt {prompt.id}"
        try:
            watch = watched(self.watchdog, "produce", what, actor)
            with watch, self._calling(actor), self._timeline.span(actor.name, "group", prompt=prompt.id) as facts:
                group = await actor.run(prompt)
                facts |= {"oldest": group.oldest, "newest": group.newest, "lengths": group.lengths}
                if group.scored:
                    facts["reward"] = sum(group.scored) / len(group.scored)
            return group
        finally:
            if actor in self._load:
                self._load[actor] -= 1

    @contextmanager
    def _calling(self, *actors: RolloutHandle) -> Iterator[None]:
        """Calls of these actors are under way: none of them is closed meanwhile."""
        self._calls.update(actors)
        try:
            yield
        finally:
            for actor in actors:
                self._calls[actor] -= 1
                self._close_if_left(actor)

    def _close_if_left(self, actor: RolloutHandle) -> None:
        if self._calls[actor] or not (actor in self._dead or actor in self._retired):
            return
        self._dead.discard(actor)
        if actor in self._retired:
            self._retired.remove(actor)
        self._group = None
        self._close(actor)

    def _close(self, actor: RolloutHandle) -> None:
        """Nothing of it is left, here or, if it has one, in its process."""
        del self._calls[actor]
        self._reports.pop(actor, None)
        closing = asyncio.gather(actor.close(), return_exceptions=True)
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _others_than(self, tried: set[RolloutHandle]) -> bool:
        """Whether there is an environment, or may be soon, that did not yet use up its attempts at a prompt."""
        return bool(self._joining) or not tried.issuperset(self._load) or not self._load

    def _count(self, failures: Sequence[Failure]) -> None:
        for failure in failures:
            if not self.failures[failure.kind]:
                first_line = next(iter(failure.text.splitlines()), failure.kind)
                told = f"{first_line}; such attempts are made again, within limits, and counted"
                self._emit("failure", told, of=failure.kind, raw=failure.text)
            self.failures[failure.kind] += 1

    async def _evaluate_on(self, actor: RolloutHandle, prompts: Sequence[Prompt]) -> list[Group | EnvFault]:
        with self._calling(actor), self._timeline.span(actor.name, "evaluation", num_prompts=len(prompts)):
            return await actor.evaluate(prompts)

    def _remove(self, actor: RolloutHandle, error: ActorDied) -> None:
        if actor in self._joining:
            self._joining.remove(actor)
        elif actor in self._retired:
            self._retired.remove(actor)
        elif self._load.pop(actor, None) is None:
            return  # known
        self._dead.add(actor)
        self._group = None
        self._close_if_left(actor)
        self.failures[f"actor {error.fate}"] += 1
        self.presence.died(actor, error, expects_more=self._expects_more)
        if not self._load and not self._expects_more:
            raise AllActorsDied(f"the last rollout actor, {actor.name}, {error.fate}: {error}") from error

    def _silence(self, actor: RolloutHandle, error: ActorSilent) -> None:
        self.kill(actor)
        self._remove(actor, error)

    def _handle_deaths(self, actors: list[RolloutHandle], results: Sequence[object]) -> bool:
        dead = [(a, r) for a, r in zip(actors, results, strict=True) if isinstance(r, ActorDied)]
        for actor, error in dead:
            self._remove(actor, error)
        return bool(dead)

    async def _form_group(self, learner: Publisher) -> None:
        actors = [*self.members, *self._joining]
        self._group = group = UpdateGroup(actors, self._timeline, self.watchdog)
        with self._calling(*group.actors):
            joined = await group.form(learner)
        self._handle_deaths(group.actors, joined)


def _failures(error: Exception) -> list[Failure]:
    """What came to nothing when a rollout raised."""
    if isinstance(error, EnvFault) and error.failures:
        return list(error.failures)
    return [Failure(getattr(error, "kind", type(error).__name__), str(error))]
