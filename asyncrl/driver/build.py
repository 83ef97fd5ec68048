"""The parts of a run, made from its configuration and put together."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from asyncrl.config.schema import Config
from asyncrl.driver.buffer import Buffer
from asyncrl.driver.machine import show_token
from asyncrl.driver.nonfinite_guard import StepGuard
from asyncrl.driver.rollout_pool import RolloutPool
from asyncrl.driver.supervisor import Supervisor
from asyncrl.driver.system import System
from asyncrl.driver.watchdog import Watchdog
from asyncrl.envs.base import Env, checked_prompts, pass_mark
from asyncrl.monitor.events import Emit
from asyncrl.monitor.metrics import Metrics
from asyncrl.recovery.curriculum import Curriculum
from asyncrl.recovery.journal import Journal
from asyncrl.recovery.prompt_queue import PromptQueue
from asyncrl.runtime.handles import LearnerHandle, RolloutHandle
from asyncrl.training.learner import row_length
from asyncrl.types import Group, Prompt


def make_prompts(config: Config, env: Env, heldout: Sequence[Prompt], journal: Journal, folder: Path) -> PromptQueue:
    """The run's prompts, of which there is a next one."""
    curriculum = make_curriculum(config, env)
    first_id = 0 if curriculum else journal.accounts.first_needed
    prompts = PromptQueue(
        checked_prompts(env, "train", config.seed, heldout, first_id),
        journal,
        folder / "groups",
        keep_groups=config.journal.keep_groups,
        curriculum=curriculum,
        first_id=first_id,
        pass_reward=pass_mark(env, config.eval.pass_reward),
        fits=partial(fits, config.rollout.group_size, row_length(config, env.max_prompt_tokens)),
    )
    prompts.try_source()
    return prompts


def try_prompts(config: Config, env: Env) -> None:
    """Issues a run's first prompt to nobody. Raises `ValueError` if there is none, or the curriculum refuses it."""
    PromptQueue(checked_prompts(env, "train", config.seed), curriculum=make_curriculum(config, env)).issue()


def make_curriculum(config: Config, env: Env) -> Curriculum | None:
    """None where it is off. Raises `ValueError` where nothing says which attempts pass."""
    mark = pass_mark(env, config.eval.pass_reward)
    if config.curriculum.by == "off":
        return None
    if mark is None:
        raise ValueError(
            f"curriculum.by is {config.curriculum.by!r} and goes by pass rates, but eval.pass_reward is not set and "
            f"{type(env).__name__} has no pass_reward of its own: set eval.pass_reward to the reward from which on an "
            "attempt passes, or curriculum.by=off"
        )
    return Curriculum(config.curriculum, config.seed)


def make_system(
    config: Config,
    folder: Path,
    *,
    initial: str,
    prompts: PromptQueue,
    heldout: Sequence[Prompt],
    learner: LearnerHandle,
    actors: Sequence[RolloutHandle],
    buffer: Buffer,
    metrics: Metrics,
) -> System:
    """The parts of a run put together, around actors that were started."""
    runtime = load_runtime(config)
    training, evaluating = actors[: config.rollout.num_actors], actors[config.rollout.num_actors :]
    for number, actor in enumerate(evaluating):
        actor.name = f"evaluator {number}"
    pool = RolloutPool(training, config.rollout.max_attempts, metrics.timeline)
    evaluators = RolloutPool(evaluating, config.rollout.max_attempts, metrics.timeline)
    pool.presence.emit = evaluators.presence.emit = metrics.event
    metrics.watch(pool.gauges)
    watchdog = make_watchdog(config, folder, learner, pool, metrics.event, evaluators=evaluators)
    pool.watchdog = evaluators.watchdog = watchdog
    pool.kill = evaluators.kill = runtime.kill
    supervisor = Supervisor(
        pool,
        partial(runtime.start_rollout, config, initial, folder / "groups"),
        folder,
        target=config.rollout.num_actors,
        first_number=len(actors),
        max_replacements=config.rollout.max_replacements,
        emit=metrics.event,
        check_number=partial(runtime.check_number, config),
    )
    guard = StepGuard(folder, config.learner.max_skipped_steps)
    system = System(
        config, prompts, heldout, pool, learner, buffer, metrics, folder / "checkpoints", guard, watchdog, supervisor
    )
    if evaluating:
        system.evaluators = evaluators
    return system


def load_runtime(config: Config) -> ModuleType:
    """The module that starts the actors; Ray is imported only where it is used.

    A Ray of the run's own stays on loopback, and a cluster is shown the user's token. Ray knows the former for other
    systems only, and both by variables that it reads when it is imported: too late if something else did so already.
    """
    if config.runtime == "local":
        from asyncrl.runtime import local

        return local
    if "ray" not in sys.modules:
        if config.cluster.address is None:
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        show_token(config.cluster.address)
    from asyncrl.runtime import ray_cluster as cluster

    return cluster


def make_buffer(config: Config) -> Buffer:
    return Buffer(
        config.learner.groups_per_step,
        config.buffer.max_staleness,
        window=config.buffer.window or config.learner.groups_per_step,
        reuse=config.buffer.reuse,
    )


def make_watchdog(
    config: Config,
    folder: Path,
    learner: LearnerHandle,
    pool: RolloutPool,
    emit: Emit,
    *,
    evaluators: RolloutPool | None = None,
) -> Watchdog:
    runtime = load_runtime(config)
    return Watchdog(
        folder,
        timeout_s=config.watchdog.timeout_s,
        action=config.watchdog.action,
        emit=emit,
        stacks=lambda: runtime.stacks(learner, [*pool.members, *(evaluators.members if evaluators else ())]),
        kill=runtime.kill,
    )


def fits(group_size: int, row_tokens: int, group: Group) -> bool:
    """Whether the learner takes a group that was made before a stop, perhaps under other settings."""
    longest = max(len(trajectory.token_ids) for trajectory in group.trajectories)
    return len(group.rewards) == group_size and longest <= row_tokens
