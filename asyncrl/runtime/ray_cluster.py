"""Starts Ray, places the actors and hands out the driver's side of them.

driver (event loop, metadata) --calls--> RolloutActor x N (event loop on uvloop, engine)
                              --calls--> LearnerActor x ranks (the same call at all of them)
Only this file, `actors.py` and `remotes.py` import `ray`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from asyncrl.config import cores
from asyncrl.config.schema import Config
from asyncrl.runtime.placement import Placement, check_resources, check_room, plan
from asyncrl.runtime.ray_actors import SENDING, LearnerActor, RolloutActor
from asyncrl.runtime.ray_handles import RemoteLearner, RemoteRollout
from asyncrl.runtime.stacks import dump_stacks
from asyncrl.utils import gc_freeze as garbage
from asyncrl.utils.threads import kept_handlers

_Started = TypeVar("_Started")
_STORE_BYTES = 512 * 2**20
_TOKENS = "ray._private.authentication.authentication_token_setup"
_MAX_CONCURRENCY = 100_000  # prompts wait in the engine, not in front of the actor


@asynccontextmanager
async def open_actors(
    config: Config, folder: str, resume: Path | None, store: Path | None = None
) -> AsyncIterator[tuple[RemoteLearner, list[RemoteRollout]]]:
    """Starts Ray, or joins the cluster, and starts the actors; on the way out nothing of them is left.

    The last `eval.num_actors` of the rollout actors are the evaluators. `store` is where finished groups are written.
    """
    _start_ray(config)
    try:
        await asyncio.sleep(0)  # a Ctrl-C that came while Ray started, which blocks, ends it here
        existing = ray.cluster_resources()
        placement = plan(config, int(existing.get("GPU", 0)))
        check_resources(config, existing)
        actors = await _start_actors(config, _absolute(folder), resume, placement, store)
        garbage.settle()
        yield actors
    finally:
        ray.shutdown()


async def _start_actors(
    config: Config, folder: str, resume: Path | None, placement: Placement, store: Path | None
) -> tuple[RemoteLearner, list[RemoteRollout]]:
    ranks = await _place_learner(config, folder, resume, placement)
    starts = (start_rollout(config, folder, store, number) for number in range(config.num_engines))
    bounded = _in_time(_start_learner(ranks), config.rollout.start_timeout_s, "the learner")
    try:
        async with asyncio.TaskGroup() as tasks:  # which ends the others, when one fails, before Ray is shut down
            learner = tasks.create_task(bounded)
            rollouts = [tasks.create_task(start) for start in starts]
    except* Exception as errors:
        raise errors.exceptions[0] from None
    return learner.result(), [rollout.result() for rollout in rollouts]


async def start_rollout(config: Config, folder: str, store: Path | None, number: int) -> RemoteRollout:
    """One rollout actor, once its engine is ready; nothing of it is left if that fails or is cancelled."""
    placement = plan(config, int(ray.cluster_resources().get("GPU", 0)))
    rollout_class: Any = ray.remote(RolloutActor).options(
        num_gpus=placement.rollout_gpus,
        resources=config.cluster.rollout_resources,
        max_concurrency=_MAX_CONCURRENCY,
        **_common(placement),
    )
    actor = rollout_class.remote(cores.with_limit(config), _absolute(folder), placement, store)
    try:
        started = _in_time(actor.start.remote(), config.rollout.start_timeout_s, f"rollout actor {number}")
        return RemoteRollout(f"rollout {number}", actor, await started)
    except BaseException:
        ray.kill(actor)
        raise


def check_number(config: Config, num_actors: int) -> None:
    """Raises `ValueError` if the cluster has no room for so many rollout actors."""
    check_room(config, num_actors, ray.cluster_resources())


async def _in_time(start: Awaitable[_Started], timeout_s: float, who: str) -> _Started:
    try:
        async with asyncio.timeout(timeout_s):
            return await start
    except TimeoutError as error:
        raise RuntimeError(
            f"{who} did not start within {timeout_s:g} s (rollout.start_timeout_s); has the cluster a free GPU for it?"
        ) from error


async def _place_learner(config: Config, folder: str, resume: Path | None, placement: Placement) -> list[Any]:
    """The actors of the learner's ranks; of several, on one node if one has room for them, before others take it."""
    num_ranks = config.learner.num_gpus
    resources = config.cluster.learner_resources
    options = {"num_gpus": placement.learner_gpus, "resources": resources, **_common(placement)}
    each = {"GPU": placement.learner_gpus, **resources}
    taken = {name: amount for name, amount in each.items() if amount}
    if num_ranks > 1 and taken:
        together = ray.util.placement_group([taken] * num_ranks, strategy="PACK")
        await _in_time(together.ready(), config.rollout.start_timeout_s, "the learner")
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(together)
    remote: Any = ray.remote
    learner_class = remote(concurrency_groups={SENDING: 1})(LearnerActor).options(**options)
    return [learner_class.remote(cores.with_limit(config), folder, resume, placement) for _ in range(num_ranks)]


async def _start_learner(ranks: Sequence[Any]) -> RemoteLearner:
    where = await ranks[0].open.remote(len(ranks)) if len(ranks) > 1 else None
    described = await asyncio.gather(*(actor.start.remote(where, rank) for rank, actor in enumerate(ranks)))
    version, buckets, _ = described[0]
    return RemoteLearner(ranks, version, buckets, [facts for _, _, facts in described])


def _common(placement: Placement) -> dict[str, Any]:
    # No logical CPUs are reserved: actors share the machine's cores, each with a set number of threads.
    environment = {"env_vars": {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}}  # SGLang's: both sides must agree
    # Ray's head would keep an entry for each call, up to 100,000 of them: 24 MB for 1,000 steps of a small run.
    unseen = {"enable_task_events": False}
    return {"num_cpus": 0, "runtime_env": environment if placement.device == "cuda" else None, **unseen}


def _absolute(folder: str) -> str:
    """Workers start elsewhere; a Hugging Face id stays as it is."""
    return str(Path(folder).absolute()) if Path(folder).exists() else folder


async def stacks(learner: RemoteLearner, rollouts: Sequence[RemoteRollout]) -> str:
    """The Python stacks of every actor, also of one that hangs outside Python; who does not answer says so."""
    actors = {f"learner {rank}": facts for rank, facts in enumerate(learner.facts)}
    actors |= {rollout.name: rollout.facts for rollout in rollouts}
    answers = await asyncio.gather(*(_stacks_of(facts) for facts in actors.values()), return_exceptions=True)
    return "\n".join(f"{name}: {answer}" for name, answer in zip(actors, answers, strict=True))


async def _stacks_of(facts: dict[str, Any]) -> str:
    there = NodeAffinitySchedulingStrategy(facts["node"], soft=False)
    task: Any = ray.remote(dump_stacks).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    text: str = await task.remote(facts["pid"], facts["stacks"])
    return text


def kill(rollout: RemoteRollout) -> None:
    """Ends the process at once; calls that wait for it raise `ActorDied`."""
    ray.kill(rollout.actor)


def _is_news(record: logging.LogRecord) -> bool:
    """Ray warns at each start that it is protected by a token; that it is not would be worth a line."""
    return "is enabled" not in record.getMessage()


def _start_ray(config: Config) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger(_TOKENS).addFilter(_is_news)
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    with kept_handlers(signal.SIGTERM):  # Ray puts its own there, which prints its stack
        ray.init(
            address=config.cluster.address or "local",  # with none given, Ray would join one it finds on this machine
            logging_level=logging.WARNING,
            configure_logging=False,
            **({} if config.cluster.address else own),
        )
