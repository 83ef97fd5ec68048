"""Prompt -> group on one engine, and the pool of rollout actors that the driver spreads prompts over.

    driver: RolloutPool.run(prompt)  --least loaded-->  actor: Rollout.run(prompt)
                                                          |- env.play x G, all at once --> engine.generate
                                                          '- Group (metadata) + trajectories

A rollout that raises is tried again on another actor and counted; a prompt that used up its attempts fails the run.
An actor that died leaves the pool; its prompts are tried elsewhere and the others form a new broadcast group.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from asyncrl.engine.base import Engine
from asyncrl.envs.base import Env
from asyncrl.types import Completion, Group, Prompt, Sampling, Trajectory, Version
from asyncrl.weights import Bucket, Rendezvous


class RolloutFailed(RuntimeError):
    """A prompt used up its attempts."""


class ActorDied(RuntimeError):
    """The process behind a rollout actor is gone."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What a rollout actor says after a weight update. Times in seconds since the actor started."""

    digest: str
    pause_s: float
    now_s: float
    busy_s: float
    num_tokens: int


class Rollout:
    """One engine and one environment: what lives in a rollout actor."""

    def __init__(self, engine: Engine, env: Env, sampling: Sampling, group_size: int, seed: int) -> None:
        self._engine, self._env = engine, env
        self._sampling, self._group_size, self._seed = sampling, group_size, seed
        self._started = time.monotonic()
        self._num_tokens = 0

    @property
    def num_ranks(self) -> int:
        """Ranks that the engine takes in the broadcast group."""
        return self._engine.num_ranks

    async def run(self, prompt: Prompt) -> Group:
        """Plays the prompt G times at once. The prompt's id seeds the samples, so a second try repeats the first."""
        trajectories = await asyncio.gather(*(self._play(prompt, sample) for sample in range(self._group_size)))
        return make_group(prompt, trajectories)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[float]:
        """Rewards of one greedy attempt a prompt."""
        greedy = Sampling(self._sampling.max_new_tokens, 0.0, stop_token_ids=self._sampling.stop_token_ids)

        async def generate(token_ids: Sequence[int]) -> Completion:
            return await self._engine.generate(token_ids, greedy, 0)

        trajectories = await asyncio.gather(*(self._env.play(prompt, generate) for prompt in prompts))
        return [trajectory.reward for trajectory in trajectories]

    async def join(self, where: Rendezvous, first_rank: int) -> None:
        await self._engine.join(where, first_rank)

    async def update_weights(self, buckets: Sequence[Bucket], version: Version) -> UpdateReport:
        """Receives one whole version while requests stay in flight."""
        begin = time.monotonic()
        await self._engine.pause()
        for bucket in buckets:
            await self._engine.receive(bucket)
        digest = await self._engine.resume(version)
        now = time.monotonic()
        return UpdateReport(digest, now - begin, now - self._started, self._engine.busy_s, self._num_tokens)

    async def close(self) -> None:
        await self._engine.close()

    async def _play(self, prompt: Prompt, sample: int) -> Trajectory:
        turn = 0

        async def generate(token_ids: Sequence[int]) -> Completion:
            nonlocal turn
            parts: list[Completion] = []
            while not parts or parts[-1].finish == "abort":
                made = [int(token) for part in parts for token in part.token_ids]
                sampling = replace(self._sampling, max_new_tokens=self._sampling.max_new_tokens - len(made))
                seed = sample_seed(self._seed, prompt.id, sample, turn)
                turn += 1
                parts.append(await self._engine.generate([*token_ids, *made], sampling, seed))
                self._num_tokens += len(parts[-1].token_ids)
            return parts[0] if len(parts) == 1 else _joined(parts)

        return await self._env.play(prompt, generate)


def _joined(parts: Sequence[Completion]) -> Completion:
    """One completion from the pieces of a request that weight updates aborted and that was issued again."""
    return Completion(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        versions=np.concatenate([part.versions for part in parts]),
        finish=parts[-1].finish,
        digests={version: digest for part in parts for version, digest in part.digests.items()},
    )


def sample_seed(run_seed: int, prompt_id: int, sample: int, turn: int) -> int:
    """63 bits that depend on nothing but what is being sampled."""
    text = f"{run_seed} {prompt_id} {sample} {turn}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def make_group(prompt: Prompt, trajectories: Sequence[Trajectory]) -> Group:
    """The group's metadata, with its trajectories."""
    digests: dict[Version, str] = {}
    metrics: Counter[str] = Counter()
    for trajectory in trajectories:
        digests |= trajectory.digests
        metrics.update(trajectory.metrics)
        metrics["truncated"] += trajectory.finish == "length"
    versions = [trajectory.versions[trajectory.mask] for trajectory in trajectories]
    return Group(
        prompt=prompt,
        rewards=tuple(trajectory.reward for trajectory in trajectories),
        lengths=tuple(int(trajectory.mask.sum()) for trajectory in trajectories),
        oldest=min(int(column.min()) for column in versions),
        newest=max(int(column.max()) for column in versions),
        digests=digests,
        metrics={name: total / len(trajectories) for name, total in metrics.items()},
        trajectories=trajectories,
    )


class RolloutHandle(Protocol):
    """A rollout actor as the driver sees it; both runtimes have one. Raises `ActorDied` when the process is gone."""

    name: str
    num_ranks: int

    async def run(self, prompt: Prompt) -> Group: ...
    async def evaluate(self, prompts: Sequence[Prompt]) -> list[float]: ...
    async def join(self, where: Rendezvous, first_rank: int) -> None: ...
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


class RolloutPool:
    """The rollout actors of a run."""

    def __init__(self, actors: Sequence[RolloutHandle], max_attempts: int) -> None:
        self._load: dict[RolloutHandle, int] = dict.fromkeys(actors, 0)
        self._max_attempts = max_attempts
        self._grouped = False
        self._reports: dict[RolloutHandle, UpdateReport] = {}
        self.failures: Counter[str] = Counter()
        self.published: dict[Version, str] = {}
        """Digest of every version that was ever live."""

    @property
    def actors(self) -> list[RolloutHandle]:
        return list(self._load)

    async def run(self, prompt: Prompt) -> Group:
        """The prompt's group, from the least loaded actor; other actors are tried when one fails."""
        tried: set[RolloutHandle] = set()
        for attempt in range(1, self._max_attempts + 1):
            actor = self._least_loaded(tried)
            try:
                return await self._run_on(actor, prompt)
            except ActorDied as error:
                self._remove(actor, error)
            except Exception as error:
                self.failures[type(error).__name__] += 1
                tried.add(actor)
                if attempt == self._max_attempts:
                    raise RolloutFailed(
                        f"prompt {prompt.id} failed {attempt} times, last on {actor.name}: {error!r}; "
                        "rollout.max_attempts bounds the attempts"
                    ) from error
        raise RolloutFailed(f"prompt {prompt.id}: {self._max_attempts} rollout actors died while running it")

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[float]:
        """Greedy rewards, the prompts spread evenly over all actors, generation going on beside them."""
        while True:
            actors = self.actors
            shares = [prompts[index :: len(actors)] for index in range(len(actors))]
            rewards: list[Any] = await asyncio.gather(
                *(actor.evaluate(part) for actor, part in zip(actors, shares, strict=True)), return_exceptions=True
            )
            if self._handle_deaths(actors, rewards):
                continue
            for part in rewards:
                if isinstance(part, BaseException):
                    raise part
            return [reward for part in rewards for reward in part]

    async def update_weights(self, learner: Publisher) -> dict[str, float]:
        """Makes the learner's version live on every actor and checks its digest there.

        Actors that died are left out. Anything else that goes wrong ends the run with a `RuntimeError` that names the
        actor: an engine on old weights would look like staleness for ever after.
        """
        while True:
            if not self._grouped:
                await self._form_group(learner)
            actors = self.actors
            begin = time.monotonic()
            await learner.prepare()  # before any engine pauses
            results: list[Any] = await asyncio.gather(
                learner.broadcast(),
                *(actor.update_weights(learner.buckets, learner.version) for actor in actors),
                return_exceptions=True,
            )
            sent, reports = results[0], results[1:]
            if self._handle_deaths(actors, reports):
                continue
            if isinstance(sent, BaseException):
                raise sent
            self._check(actors, reports, sent, learner.version)
            return self._measure(actors, reports, time.monotonic() - begin)

    async def close(self) -> None:
        await asyncio.gather(*(actor.close() for actor in self.actors), return_exceptions=True)

    def _least_loaded(self, tried: set[RolloutHandle]) -> RolloutHandle:
        if not self._load:
            raise RolloutFailed(f"every rollout actor died: {dict(self.failures)}")
        fresh = [actor for actor in self._load if actor not in tried]
        return min(fresh or self._load, key=self._load.__getitem__)

    async def _run_on(self, actor: RolloutHandle, prompt: Prompt) -> Group:
        self._load[actor] += 1
        try:
            return await actor.run(prompt)
        finally:
            if actor in self._load:
                self._load[actor] -= 1

    def _remove(self, actor: RolloutHandle, error: ActorDied) -> None:
        if self._load.pop(actor, None) is not None:
            self.failures["actor died"] += 1
            self._grouped = False
            if not self._load:
                raise RolloutFailed(f"the last rollout actor, {actor.name}, died: {error}") from error

    def _handle_deaths(self, actors: list[RolloutHandle], results: Sequence[object]) -> bool:
        dead = [(a, r) for a, r in zip(actors, results, strict=True) if isinstance(r, ActorDied)]
        for actor, error in dead:
            self._remove(actor, error)
        return bool(dead)

    async def _form_group(self, learner: Publisher) -> None:
        actors = self.actors
        where = await learner.rendezvous(1 + sum(actor.num_ranks for actor in actors))
        joins, rank = [], 1
        for actor in actors:
            joins.append(actor.join(where, rank))
            rank += actor.num_ranks
        joined = await asyncio.gather(learner.join(), *joins, return_exceptions=True)
        if self._handle_deaths(actors, joined[1:]):
            await self._form_group(learner)
            return
        for name, result in zip(["the learner", *(actor.name for actor in actors)], joined, strict=True):
            if isinstance(result, BaseException):
                raise RuntimeError(f"{name} could not join the weight broadcast: {result}") from result
        self._grouped = True

    def _check(self, actors: list[RolloutHandle], reports: list[Any], sent: str, version: Version) -> None:
        for actor, report in zip(actors, reports, strict=True):
            if isinstance(report, BaseException):
                raise RuntimeError(f"{actor.name} failed to take weights version {version}: {report}") from report
            if report.digest != sent:
                raise RuntimeError(
                    f"{actor.name} holds other weights than were sent for version {version}: digest {report.digest}, "
                    f"sent {sent}"
                )
        self.published[version] = sent

    def _measure(self, actors: list[RolloutHandle], reports: list[UpdateReport], sync_s: float) -> dict[str, float]:
        """Idle share of the engines since the update before, and what this update cost."""
        busy, span, tokens = 0.0, 0.0, 0
        for actor, report in zip(actors, reports, strict=True):
            before = self._reports.get(actor)
            busy += report.busy_s - (before.busy_s if before else 0.0)
            span += report.now_s - (before.now_s if before else 0.0)
            tokens += report.num_tokens - (before.num_tokens if before else 0)
            self._reports[actor] = report
        return {
            "sync/total_s": sync_s,
            "sync/pause_s": max(report.pause_s for report in reports),
            "rollout/idle": max(0.0, 1 - busy / max(span, 1e-9)),
            "rollout/num_tokens": float(tokens),
            "rollout/num_actors": float(len(actors)),
            "rollout/failures": float(sum(self.failures.values())),
        }
