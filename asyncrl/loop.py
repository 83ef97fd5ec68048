"""The system: two coroutines and a buffer.

    produce x C:   admit ----> rollouts.run(prompt) ----> put
                   |waits for  |waits for an engine       |
                   |a slot     |                          v
                   |                              [  bounded buffer  ]
                   |                                      |
    learn:         |   take ----> learner.step ----> update_weights ----> release
                   |   |waits for                    |waits for every        |
                   |   |P groups                     |engine's load          |
                   '---------------- frees P slots <-------------------------'

    evaluate:      every N steps, beside the others; nothing waits for it

A prompt admitted after `release` sees the new weights. A crash of any task cancels the rest and is raised again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from asyncrl.buffer import Buffer, Ticket
from asyncrl.config import Config
from asyncrl.evaluation import by_source, summarize
from asyncrl.monitor.metrics import Metrics
from asyncrl.pool import AllActorsDied, LearnerLink, RolloutFailed, RolloutPool, ToEvaluators
from asyncrl.recovery import checkpoint
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.recovery.guard import REASON, StepGuard
from asyncrl.recovery.prompts import Finished, PromptQueue
from asyncrl.recovery.supervisor import Supervisor
from asyncrl.recovery.watchdog import Stalled, Watchdog
from asyncrl.staleness import StalenessControl
from asyncrl.types import Group, Prompt

_UNSTORED = (
    "the group of prompt {} could not be written to groups/ (is the disk full?); after a crash it is played again"
)


class LearnerHandle(LearnerLink, Protocol):
    """The learner as the driver sees it; both runtimes have one."""

    async def step(self, groups: Sequence[Group]) -> dict[str, float]: ...
    async def save(self, folder: Path, cursor: Cursor) -> None: ...


@dataclass(slots=True)
class System:
    """What a run is made of."""

    config: Config
    prompts: PromptQueue
    heldout: Sequence[Prompt]
    rollouts: RolloutPool
    learner: LearnerHandle
    buffer: Buffer
    metrics: Metrics
    checkpoints: Path
    guard: StepGuard
    watchdog: Watchdog
    supervisor: Supervisor | None = None
    updating: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever steps the learner or updates weights."""
    failed_in_a_row: int = 0
    """Prompts that were given up since the last one that was finished."""
    evaluated: set[int] = field(default_factory=set)
    evaluators: RolloutPool | None = None
    """Engines for evaluation alone, which hold one version still; without them the rollout actors evaluate."""
    evaluations: set[asyncio.Task[None]] = field(default_factory=set)
    """Those under way."""
    control: StalenessControl | None = None
    """Moves the admitted staleness; without one it stays what the buffer was made with."""


async def run(system: System) -> None:
    """Trains until `num_steps`, or until the buffer is closed from outside (Ctrl-C); then evaluates and saves."""
    try:
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(system.watchdog.run()), tasks.create_task(sync_journal(system))]
            await synchronize(system)  # every engine starts from the learner's own weights
            restore(system)
            if system.config.eval.every:
                await start_evaluation(system, tasks)  # where the curve starts
            producers = [tasks.create_task(produce(system)) for _ in range(system.buffer.capacity)]
            if system.supervisor is not None:
                helpers.append(tasks.create_task(system.supervisor.run(system.updating, lambda: synchronize(system))))
            await learn(system, tasks)
            stopped_early = system.learner.version < system.config.num_steps
            system.buffer.close()
            for task in (*producers, *helpers, *(system.evaluations if stopped_early else ())):
                task.cancel()
    except* Stalled as stalls:
        stall = stalls.exceptions[0]
        if isinstance(stall, Stalled) and not stall.learner_hangs:
            await save(system, last=True)
        raise stall from None
    except* Exception as errors:
        if len(errors.exceptions) == 1:
            raise errors.exceptions[0] from None  # the one cause, without the wrapping of the task group
        raise
    await save(system, last=True)
    if system.learner.version >= system.config.num_steps:
        if system.evaluators is not None:
            await system.evaluators.update_weights(ToEvaluators(system.learner))
        await evaluate(system)


def restore(system: System) -> None:
    """Takes up the groups that were finished before the run stopped, those that can still be trained."""
    restored = system.prompts.restore(
        system.rollouts.published, groups_per_step=system.buffer.groups_per_step, window=system.buffer.window
    )
    if restored:
        system.metrics.say(f"{restored} groups that were finished before the run stopped are used")


async def produce(system: System) -> None:
    """Fills one slot after the other."""
    drop_equal = system.config.algorithm.drop_zero_variance
    while (ticket := await admit(system)) is not None:
        prompt, finished = system.prompts.issue()
        if finished is None:
            try:
                group = await system.rollouts.run(prompt)
            except RolloutFailed as error:
                give_up(system, ticket, prompt, error)
                continue
            system.failed_in_a_row = 0
            if not system.prompts.generated(group) and system.prompts.num_unstored == 1:
                system.metrics.say(f"alarm: {_UNSTORED.format(prompt.id)}")
            finished = Finished(group, uses=0)
        if drop_equal and not finished.group.has_variance:
            system.buffer.drop(ticket, "zero variance")
            dropped = finished.group.lengths
            system.metrics.timeline.mark("buffer", "drop", reason="zero variance", lengths=dropped)
            system.prompts.drop([prompt.id], "zero variance", system.learner.version)
        else:
            system.buffer.put(ticket, finished.group, finished.uses)
            system.metrics.timeline.count("buffer", "ready", system.buffer.num_ready)


async def admit(system: System) -> Ticket | None:
    """Waits for a slot."""
    with system.watchdog.wait("admit", "a slot of the buffer"):
        return await system.buffer.admit()


def give_up(system: System, ticket: Ticket, prompt: Prompt, error: RolloutFailed) -> None:
    """Drops a prompt that used up its attempts; raises the error again once too many did, one after the other."""
    system.failed_in_a_row += 1
    most = system.config.rollout.max_failed_prompts
    if isinstance(error, AllActorsDied):
        raise error
    if system.failed_in_a_row > most:
        raise RolloutFailed(
            f"{system.failed_in_a_row} prompts in a row used up their attempts (rollout.max_failed_prompts is {most}); "
            f"failures so far: {dict(system.rollouts.failures)}; last, {error}"
        ) from error
    system.metrics.say(f"alarm: given up: {error}")
    system.buffer.drop(ticket, "rollout failed")
    system.prompts.drop([prompt.id], "rollout failed", system.learner.version)


async def learn(system: System, tasks: asyncio.TaskGroup) -> None:
    """Drains the buffer, one optimizer step a batch."""
    learner, buffer, config = system.learner, system.buffer, system.config
    span = partial(system.metrics.timeline.span, "learner")
    while learner.version < config.num_steps:
        clock = _Clock()
        with span("wait for groups"), system.watchdog.wait("take", f"{buffer.groups_per_step} finished groups"):
            groups = await buffer.take(learner.version)
        if not groups:
            return
        system.metrics.timeline.count("buffer", "ready", buffer.num_ready)
        check_digests(groups, system.rollouts.published)
        clock.lap("wait")
        async with system.updating:
            with span("step", version=learner.version + 1):
                learnt = await step(system, groups)
            if learnt is None:
                continue
            clock.lap("step")
            with span("update weights", version=learner.version):
                synced = await synchronize(system)
        clock.lap("sync")
        buffered = buffer.release()
        row = measure(groups) | learnt | synced | clock.metrics() | measure_buffer(buffer, buffered)
        row["journal/unstored"] = float(system.prompts.num_unstored)
        system.metrics.step(learner.version, row, buffer.max_lag)
        tasks.create_task(system.metrics.sample(learner.version, groups))
        if system.control is not None and (decision := system.control.decide(row)) is not None:
            buffer.allow(system.control.staleness)
            system.metrics.say(decision)
            system.metrics.timeline.mark("buffer", "staleness", decision=decision)
        if config.checkpoint.every and learner.version % config.checkpoint.every == 0:
            await save(system)
        if config.eval.every and learner.version % config.eval.every == 0:
            await start_evaluation(system, tasks)


async def start_evaluation(system: System, tasks: asyncio.TaskGroup) -> None:
    """Evaluates the current version beside the run. Evaluators get it first; while they are busy with an older one,
    they are not waited for: the evaluation is left out, and said to be."""
    if system.evaluators is not None and system.evaluations:
        system.metrics.say(f"eval {system.learner.version} | left out, another is under way: raise eval.every")
        return
    if system.evaluators is not None:
        version = system.learner.version
        with (
            system.watchdog.wait("sync", f"version {version} to be live on every evaluator"),
            system.metrics.timeline.span("learner", "update evaluators", version=version),
        ):
            await system.evaluators.update_weights(ToEvaluators(system.learner))
    task = tasks.create_task(evaluate(system))
    system.evaluations.add(task)
    task.add_done_callback(system.evaluations.discard)


async def step(system: System, groups: Sequence[Group]) -> dict[str, float] | None:
    """One optimizer step; None if the learner refused it, which drops the groups."""
    learner, version = system.learner, system.learner.version
    if system.config.rollout.release_memory:
        with system.watchdog.wait("release", "every rollout actor to give its memory to the learner"):
            await system.rollouts.release()
    system.prompts.training(groups, version + 1)
    with system.watchdog.wait("step", f"the learner's step {version + 1}"):
        learnt = await learner.step(groups)
    if learner.version > version:
        system.guard.passed()
        return learnt | {"learner/skipped": float(system.guard.num_skipped)}
    told = system.guard.skipped(groups, version, learnt["gradient/norm"])
    system.metrics.say(told)
    system.prompts.drop([group.prompt.id for group in groups], REASON, version)
    if system.config.rollout.release_memory:
        await synchronize(system)  # the engines get their memory back
    system.buffer.discard(REASON)
    return None


async def synchronize(system: System) -> dict[str, float]:
    """The learner's version on every engine, and in the journal."""
    with system.watchdog.wait("sync", f"version {system.learner.version} to be live on every rollout actor"):
        measured = await system.rollouts.update_weights(system.learner)
    version = system.learner.version
    system.prompts.synced(version, system.rollouts.published[version])
    return measured


async def sync_journal(system: System) -> None:
    """Bounds what a power failure can take from the journal. A killed process loses nothing of it anyhow."""
    while True:
        await asyncio.sleep(system.config.journal.sync_s)
        await asyncio.to_thread(system.prompts.journal.sync)


async def evaluate(system: System) -> None:
    """Held-out attempts. On rollout actors, later weights may arrive under them, which `eval/mixed_versions` counts."""
    version = system.learner.version
    if version not in system.evaluated:
        system.evaluated.add(version)
        told = f"the held-out prompts on version {version}"
        timeline = system.metrics.timeline
        with timeline.span("evaluation", "evaluation", version=version), system.watchdog.wait("evaluate", told):
            groups = await (system.evaluators or system.rollouts).evaluate(system.heldout)
        system.metrics.evaluation(version, summarize(groups, version, system.config.eval.pass_reward))


async def save(system: System, *, last: bool = False) -> None:
    """A checkpoint of the current version. The learner waits for it, generation does not.

    A disk that refuses it is reported and the run goes on from the checkpoints before, unless this was its last chance.
    """
    version = system.learner.version
    if system.prompts.is_saved(version):
        return
    try:
        with (
            system.metrics.timeline.span("learner", "checkpoint", version=version),
            system.watchdog.wait("save", f"the checkpoint of version {version}"),
        ):
            await system.learner.save(system.checkpoints, system.prompts.cursor(version))
    except OSError as error:
        if last:
            raise
        system.metrics.say(f"alarm: no checkpoint of version {version}: {error}; the next try is at the next one")
        return
    kept = [checkpoint.version_of(folder) for folder in checkpoint.folders(system.checkpoints)]
    system.prompts.saved(version, kept or [version])


def check_digests(groups: Sequence[Group], published: dict[int, str]) -> None:
    """Raises `RuntimeError` if a token was made by weights other than those published as its version."""
    for group in groups:
        for version, digest in group.digests.items():
            if published.get(version) != digest:
                raise RuntimeError(
                    f"group {group.prompt.id} was generated by weights {digest} under version {version}, "
                    f"which was published as {published.get(version)}"
                )


def measure(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and lengths of a batch, from its metadata."""
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [length for group in groups for length in group.lengths]
    mean = sum(rewards) / len(rewards)
    row = {
        "reward/mean": mean,
        "reward/std": (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5,
        "reward/zero_variance": sum(not group.has_variance for group in groups) / len(groups),
        "completion/mean_length": sum(lengths) / len(lengths),
        "completion/max_length": float(max(lengths)),
        "completion/mixed_versions": sum(group.newest > group.oldest for group in groups) / len(groups),
    }
    for name in sorted({name for group in groups for name in group.metrics}):  # environments of a mixture differ
        values = [group.metrics[name] for group in groups if name in group.metrics]
        row[f"completion/{name}"] = sum(values) / len(values)
    return row | by_source(groups, "reward")


def measure_buffer(buffer: Buffer, wait_s: float) -> dict[str, float]:
    """How full the buffer is after a step, and how long the batch lay in it."""
    return {
        "buffer/staleness": float(buffer.staleness),
        "buffer/ready": float(buffer.num_ready),
        "buffer/pending": float(buffer.num_pending),
        "buffer/wait_s": wait_s,
        "buffer/dropped": float(sum(buffer.dropped.values())),
    }


class _Clock:
    """Splits a step's wall time into named laps."""

    def __init__(self) -> None:
        self._begin = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name], self._last = now - self._last, now

    def metrics(self) -> dict[str, float]:
        total = self._last - self._begin
        return {f"time/{name}_s": seconds for name, seconds in self._laps.items()} | {
            "time/total_s": total,
            "learner/idle": self._laps["wait"] / max(total, 1e-9),
        }
