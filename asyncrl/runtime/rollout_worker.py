"""Prompt -> group on one engine: what lives in a rollout actor.

run(prompt)
  |- env.play x G, all at once --> engine.generate
  '- Group: metadata, with its trajectories
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from asyncrl.engines.base import Engine
from asyncrl.envs.attempt import UNBOUNDED, Bounds, EnvFault, Held, Patience, attempt, score_together
from asyncrl.envs.base import Env
from asyncrl.recovery import group_files as groups
from asyncrl.types import Completion, Failure, Group, Prompt, Sampling, Trajectory, Version
from asyncrl.utils.threads import in_thread
from asyncrl.weights.broadcast import Rendezvous
from asyncrl.weights.buckets import Bucket

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What a rollout actor says after a weight update. Times in seconds since the actor started."""

    digest: str
    settle_s: float
    """Until nothing of the old weights ran any more; an engine still generates in a part of it."""
    receive_s: float
    """Until the new weights were loaded."""
    pause_s: float
    """Until generation went on, the two above included."""
    now_s: float
    busy_s: float
    held_s: float
    """That the environment held the event loop, so that nothing else went on."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Attempts:
    """How prompts are attempted for an evaluation: n samples each, so many of them in flight at once."""

    sampling: Sampling
    num_samples: int = 1
    max_running: int = 64


class Rollout:
    """One engine and one environment: what lives in a rollout actor."""

    def __init__(
        self,
        engine: Engine,
        env: Env,
        sampling: Sampling,
        *,
        group_size: int,
        seed: int,
        name: str = "rollout",
        evaluation: Attempts | None = None,
        timeout_s: float = 300.0,
        max_attempts: int = 1,
        store: Path | None = None,
        bounds: Bounds = UNBOUNDED,
    ) -> None:
        """`evaluation`: greedy attempts, one a prompt, unless told otherwise. `timeout_s` bounds what an attempt takes
        beside generation, `max_attempts` how often one that the environment spoils is made before its fault is raised.
        `store`: the folder that finished groups are written to before they are handed over. `bounds`: of what the
        environment may give."""
        self.attempts = evaluation or Attempts(replace(sampling, temperature=0.0, top_p=1.0, top_k=0))
        self.name = name
        self._engine, self._env = engine, env
        self._sampling, self._group_size, self._seed = sampling, group_size, seed
        self._timeout_s, self._max_attempts, self._store = timeout_s, max_attempts, store
        self._bounds = bounds
        self._started = time.monotonic()
        self._held = Held()
        self._num_tokens = 0

    @property
    def num_ranks(self) -> int:
        """Ranks that the engine takes in the broadcast group."""
        return self._engine.num_ranks

    async def run(self, prompt: Prompt) -> Group:
        """Plays the prompt G times at once. An attempt that the environment spoils is made again, the others go on.

        The prompt's id seeds the samples, so another try repeats the first: which answers a scorer fails on does not
        bias what is trained on. Raises `EnvFault` when an attempt was spoilt `max_attempts` times.
        """
        samples, failures = range(self._group_size), list[Failure]()
        try:
            plays = [self._play_again(prompt, sample, self._sampling, failures) for sample in samples]
            played = await self._score_together(prompt, await _all(plays), failures)
        except EnvFault as fault:
            fault.failures = tuple(failures)
            raise
        group = make_group(prompt, played, failures)
        if self._store is None:
            return group
        try:
            return await in_thread(partial(groups.write, self._store, group))
        except OSError:  # a full disk, or a node without this folder: the group is good all the same
            return group

    async def evaluate(self, prompts: Sequence[Prompt], attempts: Attempts | None = None) -> list[Group | EnvFault]:
        """Each prompt's attempts, those of the configuration unless told otherwise, without their tokens.

        One that the environment spoils is made again. In place of a prompt of which one used up its tries is the fault.
        """
        attempts = attempts or self.attempts
        room = asyncio.Semaphore(attempts.max_running)

        async def play(prompt: Prompt, sample: int, failures: list[Failure]) -> Trajectory:
            async with room:
                return await self._play_again(prompt, sample, attempts.sampling, failures)

        async def group(prompt: Prompt) -> Group | EnvFault:
            samples, failures = range(attempts.num_samples), list[Failure]()
            try:
                played = await _all([play(prompt, sample, failures) for sample in samples])
                played = await self._score_together(prompt, played, failures)
            except EnvFault as fault:
                fault.failures = tuple(failures)
                return fault
            return replace(make_group(prompt, played, failures), trajectories=None)

        return await _all([group(prompt) for prompt in prompts])

    async def join(self, where: Rendezvous, first_rank: int) -> None:
        await self._engine.join(where, first_rank)

    async def ping(self) -> None:
        """Answers."""

    async def release(self) -> None:
        """Gives the engine's GPU memory to the learner until the next update."""
        await self._engine.release()

    async def update_weights(self, buckets: Sequence[Bucket], version: Version) -> UpdateReport:
        """Receives one whole version while requests stay in flight."""
        begin = time.monotonic()
        await self._engine.pause()
        settled = time.monotonic()
        await self._engine.receive(buckets)
        received = time.monotonic()
        digest = await self._engine.resume(version)
        now = time.monotonic()
        return UpdateReport(
            digest=digest,
            settle_s=settled - begin,
            receive_s=received - settled,
            pause_s=now - begin,
            now_s=now - self._started,
            busy_s=self._engine.busy_s,
            held_s=self._held.seconds,
            num_tokens=self._num_tokens,
        )

    async def close(self) -> None:
        await self._engine.close()

    async def _play_again(self, prompt: Prompt, sample: int, sampling: Sampling, failures: list[Failure]) -> Trajectory:
        """An attempt, made again while the environment spoils it; `failures` takes up each time that it did."""
        return await self._again(partial(self._play, prompt, sample, sampling), failures)

    async def _score_together(
        self, prompt: Prompt, played: Sequence[Trajectory], failures: list[Failure]
    ) -> list[Trajectory]:
        """Where the environment scores attempts together: with their tokens as they are, scored again if that fails."""
        return await self._again(partial(score_together, self._env, prompt, played, self._timeout_s), failures)

    async def _again(self, make: Callable[[], Awaitable[T]], failures: list[Failure]) -> T:
        num_failed = 0
        while True:
            try:
                return await make()
            except EnvFault as fault:
                failures.append(Failure(fault.kind, str(fault)))
                num_failed += 1
                if num_failed == self._max_attempts:
                    raise

    async def _play(self, prompt: Prompt, sample: int, base: Sampling) -> Trajectory:
        turn = 0
        patience = Patience(self._timeout_s, self._held)

        async def generate(token_ids: Sequence[int]) -> Completion:
            with patience.suspended():
                return await complete(token_ids)

        async def complete(token_ids: Sequence[int]) -> Completion:
            nonlocal turn
            parts: list[Completion] = []
            while not parts or parts[-1].finish == "abort":
                made = [int(token) for part in parts for token in part.token_ids]
                sampling = replace(base, max_new_tokens=base.max_new_tokens - len(made))
                seed = sample_seed(self._seed, prompt.id, sample, turn)
                turn += 1
                parts.append(await self._engine.generate([*token_ids, *made], sampling, seed))
                self._num_tokens += len(parts[-1].token_ids)
            return parts[0] if len(parts) == 1 else _joined(parts)

        return await attempt(self._env, prompt, generate, patience, self._bounds)


async def _all(plays: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; the first that fails ends the others, whose tokens nobody wants any more."""
    tasks = [asyncio.ensure_future(play) for play in plays]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _joined(parts: Sequence[Completion]) -> Completion:
    """One completion from the pieces of a request that weight updates aborted and that was issued again."""
    return Completion(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        versions=np.concatenate([part.versions for part in parts]),
        finish=parts[-1].finish,
        digests={version: digest for part in parts for version, digest in part.digests.items()},
    )


def scored(played: Sequence[Group | EnvFault]) -> tuple[list[Group], list[EnvFault]]:
    """The groups of an evaluation, and the faults in place of others. Raises the first one if there is no group."""
    groups = [group for group in played if isinstance(group, Group)]
    faults = [fault for fault in played if isinstance(fault, EnvFault)]
    if faults and not groups:
        raise faults[0]
    return groups, faults


def sample_seed(run_seed: int, prompt_id: int, sample: int, turn: int) -> int:
    """63 bits that depend on nothing but what is being sampled."""
    text = f"{run_seed} {prompt_id} {sample} {turn}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def make_group(prompt: Prompt, trajectories: Sequence[Trajectory], failures: Sequence[Failure] = ()) -> Group:
    """The group's metadata, with its trajectories. A metric is the mean of the attempts that have it."""
    digests: dict[Version, str] = {}
    metrics = defaultdict[str, list[float]](list)
    for trajectory in trajectories:
        digests |= trajectory.digests
        for name, value in trajectory.metrics.items():
            metrics[name].append(value)
        metrics["truncated"].append(float(trajectory.finish == "length"))
    versions = [trajectory.versions[trajectory.mask] for trajectory in trajectories]
    return Group(
        prompt=prompt,
        rewards=tuple(trajectory.reward for trajectory in trajectories),
        lengths=tuple(int(trajectory.mask.sum()) for trajectory in trajectories),
        oldest=min(int(column.min()) for column in versions),
        newest=max(int(column.max()) for column in versions),
        digests=digests,
        metrics={name: sum(values) / len(values) for name, values in metrics.items()},
        trajectories=trajectories,
        failures=tuple(failures),
    )
