"""What a run is made of, and what happens beside its two coroutines: weight updates, evaluations, checkpoints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from asyncrl.config.schema import Config
from asyncrl.driver.batch_metrics import Generated
from asyncrl.driver.buffer import Buffer
from asyncrl.driver.nonfinite_guard import StepGuard
from asyncrl.driver.rollout_pool import AllActorsDied, RolloutPool
from asyncrl.driver.supervisor import Supervisor
from asyncrl.driver.watchdog import Watchdog
from asyncrl.envs.attempt import EnvFault
from asyncrl.monitor.metrics import Metrics
from asyncrl.monitor.scores import summarize
from asyncrl.recovery import checkpoint
from asyncrl.recovery.prompt_queue import PromptQueue
from asyncrl.runtime.handles import LearnerHandle, ToEvaluators
from asyncrl.runtime.rollout_worker import scored
from asyncrl.types import Group, Prompt, Version
from asyncrl.utils.threads import in_thread

_LOOKS, _LOOK_S = 70, 1.0
"""How often the driver looks for a checkpoint, and the seconds in between: NFS may show an old listing for 60 s."""


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
    stepping: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever steps the learner, or needs that nobody does."""
    synchronizing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a version goes to the rollout actors."""
    update: asyncio.Task[None] | None = None
    """What makes the newest version live, while it is under way or done."""
    generated: Generated = field(default_factory=Generated)
    """Of rewards since the last step."""
    failed_in_a_row: int = 0
    """Prompts that were given up since the last one that was finished."""
    evaluated: set[int] = field(default_factory=set)
    evaluators: RolloutPool | None = None
    """Engines for evaluation alone, which hold one version still; without them the rollout actors evaluate."""
    evaluations: set[asyncio.Task[None]] = field(default_factory=set)
    """Those under way."""
    sampling: set[asyncio.Task[None]] = field(default_factory=set)
    """What keeps trajectories of a batch to look at, while it is under way."""


async def synchronize(system: System) -> dict[str, float]:
    """The learner's version on every engine, and in the journal."""
    async with system.synchronizing:
        version = system.learner.version
        with (
            system.metrics.timeline.span("weight sync", "update weights", version=version) as facts,
            system.watchdog.wait("sync", f"version {version} to be live on every rollout actor"),
        ):
            measured = await system.rollouts.update_weights(system.learner)
            facts["pause_s"] = measured["sync/pause_s"]
        system.prompts.synced(version, system.rollouts.published[version])
    return measured


async def settle(system: System) -> None:
    """Waits until the newest version is live. A failure of that cancels this task, through the run's task group."""
    if system.update is not None and not system.update.done():
        with system.metrics.timeline.span("learner", "wait for weights"):
            await asyncio.wait({system.update})


async def sync_journal(system: System) -> None:
    """Bounds what a power failure can take from the journal. A killed process loses nothing of it anyhow."""
    while True:
        await asyncio.sleep(system.config.journal.sync_s)
        await in_thread(system.prompts.journal.sync)
        await in_thread(system.metrics.sync)


async def listen(system: System) -> None:
    """Ends rollout actors that do not answer any more, until cancelled."""
    await system.rollouts.listen(system.config.weights.timeout_s)


async def listen_to_evaluators(system: System) -> None:
    """The same for evaluators, until none is left."""
    if system.evaluators is not None:
        try:
            await system.evaluators.listen(system.config.weights.timeout_s)
        except AllActorsDied as error:
            _give_up_evaluators(system, error)


async def start_evaluation(system: System, tasks: asyncio.TaskGroup) -> None:
    """Evaluates the current version beside the run. Evaluators get it first; while they are busy with an older one,
    they are not waited for: the evaluation is left out, and said to be."""
    if system.evaluators is not None and system.evaluations:
        told = f"eval {system.learner.version} | left out, another is under way: raise eval.every"
        system.metrics.event("evaluation", told, left_out=True)
        return
    await update_evaluators(system)
    keep(system.evaluations, tasks.create_task(evaluate(system)))


def keep(under_way: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    """The task is in the set until it is done."""
    under_way.add(task)
    task.add_done_callback(under_way.discard)


async def update_evaluators(system: System) -> None:
    """Makes the current version live on every evaluator, if there are any."""
    if system.evaluators is None:
        return
    version = system.learner.version
    try:
        with (
            system.watchdog.wait("sync", f"version {version} to be live on every evaluator"),
            system.metrics.timeline.span("learner", "update evaluators", version=version),
        ):
            await system.evaluators.update_weights(ToEvaluators(system.learner))
    except AllActorsDied as error:
        _give_up_evaluators(system, error)


async def evaluate(system: System) -> None:
    """Held-out attempts. On rollout actors, later weights may arrive under them, which `eval/mixed_versions` counts."""
    version = system.learner.version
    if version not in system.evaluated:
        system.evaluated.add(version)
        told = f"the held-out prompts on version {version}"
        timeline = system.metrics.timeline
        with timeline.span("evaluation", "evaluation", version=version), system.watchdog.wait("evaluate", told):
            played = await _held_out(system)
        groups, faults = scored(played)
        if faults:
            told = f"{len(faults)} of {len(played)} held-out prompts could not be scored and are left out"
            told = f"evaluation of version {version}: {told}; the first: {faults[0]}"
            system.metrics.event("failure", told, subject="evaluation", version=version, num_prompts=len(faults))
        row = summarize(groups, version, system.prompts.pass_reward, [fault.failures for fault in faults])
        system.metrics.evaluation(version, row)


async def _held_out(system: System) -> list[Group | EnvFault]:
    if system.evaluators is not None:
        try:
            return await system.evaluators.evaluate(system.heldout)
        except AllActorsDied as error:
            _give_up_evaluators(system, error)
    return await system.rollouts.evaluate(system.heldout)


def _give_up_evaluators(system: System, error: AllActorsDied) -> None:
    """Training does not need them."""
    if system.evaluators is None:
        return  # told already
    system.evaluators = None
    system.metrics.event("decision", f"{error}: rollout actors evaluate from now on", subject="evaluators", alarm=True)


async def sample(system: System, version: Version, groups: Sequence[Group]) -> None:
    """Keeps a few trajectories of a batch to look at, which no run ends for."""
    try:
        with system.watchdog.wait("sample", f"trajectories of the batch that made version {version}"):
            await system.metrics.sample(version, groups)
    except Exception as error:  # the node that held them may be gone, the disk full
        system.metrics.event("failure", f"no trajectories of version {version} are kept: {error!r}", subject="samples")


async def save(system: System, *, last: bool = False) -> None:
    """A checkpoint of the current version. The learner waits for it, generation does not.

    A disk that refuses it is reported and the run goes on from the checkpoints before, unless this was its last chance.
    Raises `ValueError` if the driver does not see what the learner wrote: that would be so for every one.
    """
    version = system.learner.version
    if system.prompts.is_saved(version):
        return
    began = time.monotonic()
    try:
        async with system.stepping:  # its ranks gather weights, and so does an update
            with (
                system.metrics.timeline.span("learner", "checkpoint", version=version),
                system.watchdog.wait("save", f"the checkpoint of version {version}"),
            ):
                await system.learner.save(system.checkpoints, system.prompts.cursor(version))
                kept = await _look_for(version, system.checkpoints)
    except OSError as error:
        if last:
            raise
        told = f"no checkpoint of version {version}: {error}; the next try is at the next one"
        system.metrics.event("failure", told, subject="checkpoint", version=version)
        return
    system.prompts.saved(version, kept)
    took_s = round(time.monotonic() - began, 3)
    system.metrics.event("save", f"checkpoint of version {version}", version=version, took_s=took_s)


async def _look_for(version: Version, root: Path) -> list[Version]:
    """The versions whose checkpoints the driver sees, this one among them."""
    for look in range(_LOOKS):
        if look:
            await asyncio.sleep(_LOOK_S)
        folders = await in_thread(partial(checkpoint.folders, root))
        kept = [checkpoint.version_of(folder) for folder in folders]
        if version in kept:
            return kept
    raise ValueError(
        f"the learner wrote the checkpoint of version {version} and the driver does not see it in {root}: both must "
        "see the same run_dir; set run_dir to a folder that every node mounts, or place the learner on the driver's "
        "node (cluster.learner_resources)"
    )
