"""The system: two coroutines and a buffer.

    produce x C:   admit ----> rollouts.run(prompt) ----> put
                   |waits for  |waits for an engine       |
                   |a slot     |                          v
                   |                              [  bounded buffer  ]
                   |                                      |
    learn:         |   take ----> gradient ----> apply ----> update_weights ----> release
                   |   |waits for                |waits for  |waits for every        |
                   |   |P groups                 |the update |engine's load, beside  |
                   |                             |before     |the next gradient      |
                   '---------------- frees P slots <---------------------------------'

    evaluate:      every N steps, beside the others; nothing waits for it

A prompt admitted after `release` sees the new weights. A crash of any task cancels the rest and is raised again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from asyncrl.driver.batch_metrics import Clock, of_batch, of_buffer
from asyncrl.driver.buffer import Ticket
from asyncrl.driver.nonfinite_guard import REASON
from asyncrl.driver.rollout_pool import AllActorsDied, RolloutFailed
from asyncrl.driver.system import (
    System,
    evaluate,
    keep,
    listen,
    listen_to_evaluators,
    sample,
    save,
    settle,
    start_evaluation,
    sync_journal,
    synchronize,
    update_evaluators,
)
from asyncrl.driver.watchdog import Stalled
from asyncrl.monitor.metrics import Unwritable
from asyncrl.recovery.prompt_queue import Finished
from asyncrl.runtime.handles import TokensLost
from asyncrl.types import Group, Prompt, Version

T = TypeVar("T")

LOST = "tokens lost"
"""Why the groups of a batch were dropped some of whose tokens were on a node that is gone."""

_UNSTORED = (
    "the group of prompt {} could not be written to groups/ (is the disk full?); after a crash it is played again"
)

_MANY_EQUAL = 200
_ALL_EQUAL = (
    f"{_MANY_EQUAL} groups in a row had equal rewards and were dropped (algorithm.drop_zero_variance), so nothing is "
    "trained: are all replies right, or all wrong? Take easier or harder prompts, or a larger rollout.group_size"
)


async def run(system: System) -> None:
    """Trains until `num_steps`, or until the buffer is closed from outside (Ctrl-C); then evaluates and saves."""
    try:
        async with asyncio.TaskGroup() as tasks:
            beside = system.watchdog.run(), sync_journal(system), listen(system), listen_to_evaluators(system)
            helpers = [tasks.create_task(helper) for helper in beside]
            await synchronize(system)  # every engine starts from the learner's own weights
            restore(system)
            if system.config.eval.every:
                await start_evaluation(system, tasks)  # where the curve starts
            producers = [tasks.create_task(produce(system)) for _ in range(system.buffer.capacity)]
            if system.supervisor is not None:
                helpers.append(tasks.create_task(system.supervisor.run(system.stepping, lambda: synchronize(system))))
            await learn(system, tasks)
            for task in producers:
                task.cancel()
            await finish(system)
            for task in helpers:
                task.cancel()
    except* Stalled as stalls:
        stall = stalls.exceptions[0]
        if isinstance(stall, Stalled) and not stall.learner_hangs:
            await try_to_save(system)
        raise stall from None
    except* Unwritable as errors:
        await try_to_save(system)
        raise errors.exceptions[0] from None
    except* Exception as errors:
        if len(errors.exceptions) == 1:
            raise errors.exceptions[0] from None  # the one cause, without the wrapping of the task group
        raise


async def try_to_save(system: System) -> None:
    """A checkpoint after a stall, if one can be had: why the run ends is what its user must hear."""
    try:
        async with asyncio.timeout(system.config.watchdog.timeout_s):
            await save(system, last=True)
    except Exception as error:
        told = f"no checkpoint of version {system.learner.version}: {error!r}"
        system.metrics.event("failure", told, subject="checkpoint")


async def finish(system: System) -> None:
    """Saves and evaluates the last version, the helpers at work: an actor may still die, or hang."""
    system.buffer.close()
    await save(system, last=True)
    if system.learner.version < system.config.num_steps:  # stopped early
        for task in system.evaluations:
            task.cancel()
        return
    while waiting := system.evaluations | system.sampling:
        await asyncio.wait(waiting)
    await update_evaluators(system)
    await evaluate(system)


def restore(system: System) -> None:
    """Takes up the groups that were finished before the run stopped, those that can still be trained."""
    restored = system.prompts.restore(
        system.rollouts.published, groups_per_step=system.buffer.groups_per_step, window=system.buffer.window
    )
    if restored:
        system.metrics.event("start", f"{restored} groups that were finished before the run stopped are used")


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
            system.generated.add(group)
            if not system.prompts.generated(group) and system.prompts.num_unstored == 1:
                system.metrics.event("failure", _UNSTORED.format(prompt.id), subject="groups")
            finished = Finished(group, uses=0)
        if drop_equal and not finished.group.has_variance:
            if system.generated.equal_in_a_row == _MANY_EQUAL:
                system.metrics.event("alarm", _ALL_EQUAL + system.generated.cut_off(), subject="reward")
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
    system.metrics.event("decision", f"given up: {error}", alarm=True, prompt=prompt.id)
    system.buffer.drop(ticket, "rollout failed")
    system.prompts.drop([prompt.id], "rollout failed", system.learner.version)


async def learn(system: System, tasks: asyncio.TaskGroup) -> None:
    """Drains the buffer, one optimizer step a batch; on return the last version is live."""
    learner, config, timeline = system.learner, system.config, system.metrics.timeline
    while learner.version < config.num_steps:
        clock = Clock()
        with timeline.span("learner", "wait for groups"):
            groups = await take(system)
        if not groups:
            break
        clock.lap("wait")
        async with system.stepping:
            learnt = await step(system, groups, clock)
        if learnt is None:
            continue
        version = learner.version
        system.update = tasks.create_task(publish(system, groups, learnt, clock))
        keep(system.sampling, tasks.create_task(sample(system, version, groups)))
        await asyncio.sleep(0)  # the update begins: weights are asked for before the next gradient
        saves = config.checkpoint.every and version % config.checkpoint.every == 0
        evaluates = config.eval.every and version % config.eval.every == 0
        if saves or evaluates or not config.overlaps:
            await settle(system)
        if saves:
            await save(system)
        if evaluates:
            await start_evaluation(system, tasks)
    await settle(system)


async def take(system: System) -> list[Group]:
    """Waits for a batch; empty once the buffer is closed."""
    buffer = system.buffer
    with system.watchdog.wait("take", f"{buffer.groups_per_step} finished groups"):
        groups = await buffer.take(system.learner.version)
    system.metrics.timeline.count("buffer", "ready", buffer.num_ready)
    return groups


async def step(system: System, groups: Sequence[Group], clock: Clock) -> dict[str, float] | None:
    """One optimizer step; None if the learner refused it or lacks tokens, which drops the groups.

    The gradient is computed while the version before still travels. The weights change once that is live everywhere.
    """
    learner, version = system.learner, system.learner.version
    if any(used not in system.rollouts.published for group in groups for used in group.digests):
        await settle(system)  # an engine was so fast that the newest version is not live on the others yet
        clock.lap("sync")
    check_digests(groups, system.rollouts.published)
    if system.config.rollout.release_memory:
        with system.watchdog.wait("release", "every rollout actor to give its memory to the learner"):
            await system.rollouts.release()
    system.prompts.training(groups, version + 1)
    span, wait = partial(system.metrics.timeline.span, "learner", "step"), partial(system.watchdog.wait, "step")
    try:
        with span(version=version + 1), wait(f"the gradient of the learner's step {version + 1}"):
            await learner.gradient(groups)
    except TokensLost as error:
        await settle(system)
        told = f"step skipped: {error}; its {len(groups)} groups are dropped ({LOST})"
        system.metrics.event("decision", told, subject="learner", alarm=True, version=version)
        await discard(system, groups, LOST, version)
        return None
    clock.lap("step")
    await settle(system)
    clock.lap("sync")
    with span(), wait(f"the learner's step {version + 1}"):
        learnt = await to_its_end(learner.apply(), system.config.watchdog.timeout_s)
    clock.lap("step")
    if learner.version > version:
        system.guard.passed()
        return learnt | {"learner/skipped": float(system.guard.num_skipped)}
    told = system.guard.skipped(groups, version, learnt["gradient/norm"])
    system.metrics.event("decision", told, subject="learner", alarm=True, version=version)
    await discard(system, groups, REASON, version)
    return None


async def discard(system: System, groups: Sequence[Group], reason: str, version: Version) -> None:
    """Gives up the batch that no step was made of, and frees its slots."""
    system.prompts.drop([group.prompt.id for group in groups], reason, version)
    if system.config.rollout.release_memory:
        await synchronize(system)  # the engines get their memory back
    system.buffer.discard(reason)


async def to_its_end(step: Coroutine[Any, Any, T], most_s: float) -> T:
    """What the step returns. Whoever is cancelled meanwhile waits for its end first, until the step has taken `most_s`
    seconds: in the middle of it nobody can say which version the weights are, and none can be saved."""
    began = time.monotonic()
    task = asyncio.create_task(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=max(0.0, began + most_s - time.monotonic()))
        raise


async def publish(system: System, groups: Sequence[Group], learnt: dict[str, float], clock: Clock) -> None:
    """Makes the version that was trained on `groups` live, frees their slots, and tells about the step."""
    version, buffer = system.learner.version, system.buffer
    synced = await synchronize(system)
    if not system.config.overlaps:
        clock.lap("sync")  # else what the learner waited for weights is a part of the step after
    buffered = buffer.release()
    row = of_batch(groups) | learnt | synced | clock.metrics() | of_buffer(buffer, buffered)
    row |= system.generated.take() | system.prompts.metrics()
    system.metrics.step(version, row, buffer.max_lag)


def check_digests(groups: Sequence[Group], published: dict[int, str]) -> None:
    """Raises `RuntimeError` if a token was made by weights other than those published as its version."""
    for group in groups:
        for version, digest in group.digests.items():
            if published.get(version) != digest:
                raise RuntimeError(
                    f"group {group.prompt.id} was generated by weights {digest} under version {version}, "
                    f"which was published as {published.get(version)}"
                )
