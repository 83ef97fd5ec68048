"""Ray: placement, actors and the thin proxies that the driver holds. The only file that imports `ray`.

driver (event loop, metadata) --calls--> RolloutActor x N (event loop on uvloop, engine)
                              --calls--> LearnerActor x ranks (the same call at all of them)
Token columns stay in the object store: a rollout actor returns them as a second value, whose reference the driver
passes on to the learner without reading it. `exchange.py` puts several prompts and groups into one call.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from asyncrl import garbage
from asyncrl.config import Config
from asyncrl.engine.base import EngineDied
from asyncrl.handles import ActorDied
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.rollout import UpdateReport
from asyncrl.runtime.exchange import Answer, Exchange, Numbered, Outbox, Tokens, separate, unite
from asyncrl.runtime.parts import LearnerPart, build_rollout
from asyncrl.runtime.placement import Placement, check_resources, plan
from asyncrl.runtime.stacks import dump_stacks, offer_stacks
from asyncrl.training import sharding
from asyncrl.training.sharding import join_ranks
from asyncrl.transport import Audience, Rendezvous, open_rendezvous
from asyncrl.types import Group, Prompt, Version
from asyncrl.weights import Bucket

_Started = TypeVar("_Started")
_STORE_BYTES = 512 * 2**20
_MAX_CONCURRENCY = 100_000  # prompts wait in the engine, not in front of the actor
_CLOSE_S = 60.0  # an engine waits for its processes for 30
_SENDING = "sending"
_DEATHS = (ray.exceptions.RayActorError, EngineDied)  # without its engine an actor is of no use


class RolloutActor:
    """A rollout actor's process: its own event loop and its own engine."""

    def __init__(self, config: Config, folder: str, placement: Placement, store: Path | None) -> None:
        torch.set_num_threads(config.rollout.num_threads)
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

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[Group]:
        return await self._rollout.evaluate(prompts)

    async def join(self, where: Rendezvous, first_rank: int) -> None:
        await self._rollout.join(where, first_rank)

    async def release(self) -> None:
        await self._rollout.release()

    async def update_weights(self, buckets: Sequence[Bucket], version: Version) -> UpdateReport:
        return await self._rollout.update_weights(buckets, version)

    async def close(self) -> None:
        await self._rollout.close()


class LearnerActor:
    """The process of one learner rank. Weights go out from a thread of their own, beside a gradient."""

    def __init__(self, config: Config, folder: str, resume: Path | None, placement: Placement) -> None:
        torch.set_num_threads(config.learner.num_threads)
        self._arguments = config, folder, resume, placement

    def open(self, num_ranks: int) -> Rendezvous:
        """The meeting point of the learner ranks, at the first of them."""
        where, self._store = open_rendezvous(_own_address(), num_ranks, sharding.TIMEOUT_S)
        return where

    def start(self, where: Rendezvous | None, rank: int) -> tuple[Version, list[Bucket], dict[str, Any]]:
        """Meets the other ranks, if there are any, and builds the learner."""
        ranks = None
        if where is not None:
            ranks = join_ranks(where, rank, self._arguments[-1].device, self._store if rank == 0 else None)
        self._part = LearnerPart(*self._arguments, address=_own_address(), ranks=ranks)
        self._learner = self._part.learner
        garbage.settle()
        return self._learner.version, self._learner.buckets, _process_facts()

    def gradient(self, places: Sequence[tuple[int, int]], *batches: Sequence[Any]) -> None:
        self._learner.gradient(separate(places, batches))

    def apply(self) -> tuple[Version, dict[str, float]]:
        metrics = self._learner.apply()
        return self._learner.version, metrics

    @ray.method(concurrency_group=_SENDING)
    def rendezvous(self, world_size: int, audience: Audience) -> Rendezvous:
        return self._learner.rendezvous(world_size, audience)

    @ray.method(concurrency_group=_SENDING)
    def join(self, audience: Audience) -> None:
        self._learner.join(audience)

    @ray.method(concurrency_group=_SENDING)
    def prepare(self, audience: Audience) -> None:
        self._learner.prepare(audience)

    @ray.method(concurrency_group=_SENDING)
    def broadcast(self, audience: Audience) -> str:
        return self._learner.broadcast(audience)

    def save(self, folder: Path, cursor: Cursor) -> None:
        self._part.save(folder, cursor)


class RemoteRollout:
    """A rollout actor as the driver sees it."""

    def __init__(self, name: str, actor: Any, facts: dict[str, Any]) -> None:
        self.name = name
        self.actor = actor
        self.facts = facts
        self.num_ranks: int = facts["num_ranks"]
        self._exchange = Exchange(self._call, self._explain)

    async def run(self, prompt: Prompt) -> Group:
        with self._dying():
            return await self._exchange.run(prompt)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[Group]:
        groups: list[Group] = await self._reply(self.actor.evaluate.remote(prompts))
        return groups

    async def join(self, where: Rendezvous, first_rank: int) -> None:
        await self._reply(self.actor.join.remote(where, first_rank))

    async def release(self) -> None:
        await self._reply(self.actor.release.remote())

    async def update_weights(self, buckets: Sequence[Bucket], version: Version) -> UpdateReport:
        report: UpdateReport = await self._reply(self.actor.update_weights.remote(buckets, version))
        return report

    async def close(self) -> None:
        """Ends the process, also one that is not heard of any more."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._reply(self.actor.close.remote())
        finally:
            ray.kill(self.actor)

    async def _reply(self, reference: Any) -> Any:
        with self._dying():
            return await reference

    @contextmanager
    def _dying(self) -> Iterator[None]:
        try:
            yield
        except _DEATHS as error:
            raise self._explain(error) from error

    def _call(self, prompts: list[Numbered]) -> tuple[asyncio.Future[list[Answer]], Any]:
        answers, tokens = self.actor.exchange.remote(prompts)
        return asyncio.wrap_future(answers.future()), tokens

    def _explain(self, error: BaseException) -> Exception:
        return (ActorDied if isinstance(error, _DEATHS) else RuntimeError)(f"{self.name}: {error}")


class RemoteLearner:
    """The learner as the driver sees it. `ranks` are its actors, whose first one answers; `facts` are of each."""

    def __init__(
        self, ranks: Sequence[Any], version: Version, buckets: Sequence[Bucket], facts: list[dict[str, Any]]
    ) -> None:
        self.ranks = ranks
        self.version = version
        self.buckets = buckets
        self.facts = facts

    async def gradient(self, groups: Sequence[Group]) -> None:
        places, batches = unite(groups)
        await self._all("gradient", places, *batches)

    async def apply(self) -> dict[str, float]:
        metrics: dict[str, float]
        self.version, metrics = await self._all("apply")
        return metrics

    async def rendezvous(self, world_size: int, audience: Audience = "rollouts") -> Rendezvous:
        where: Rendezvous = await self.ranks[0].rendezvous.remote(world_size, audience)
        return where

    async def join(self, audience: Audience = "rollouts") -> None:
        await self.ranks[0].join.remote(audience)

    async def prepare(self, audience: Audience = "rollouts") -> None:
        await self._all("prepare", audience)

    async def broadcast(self, audience: Audience = "rollouts") -> str:
        digest: str = await self._all("broadcast", audience)
        return digest

    async def save(self, folder: Path, cursor: Cursor) -> None:
        await self._all("save", folder, cursor)

    async def _all(self, method: str, *arguments: Any) -> Any:
        """Calls every rank; raises the first failure of any, as the others may then wait for ever."""
        answers = await asyncio.gather(*(getattr(rank, method).remote(*arguments) for rank in self.ranks))
        return answers[0]


@asynccontextmanager
async def open_actors(
    config: Config, folder: str, resume: Path | None, store: Path | None = None
) -> AsyncIterator[tuple[RemoteLearner, list[RemoteRollout]]]:
    """Starts Ray, or joins the cluster, and starts the actors; on the way out nothing of them is left.

    The last `eval.num_actors` of the rollout actors are the evaluators. `store` is where finished groups are written.
    """
    _start_ray(config)
    try:
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
    learner, rollouts = await asyncio.gather(bounded, asyncio.gather(*starts))
    return learner, rollouts


async def start_rollout(config: Config, folder: str, store: Path | None, number: int) -> RemoteRollout:
    """One rollout actor, once its engine is ready; nothing of it is left if that fails or is cancelled."""
    placement = plan(config, int(ray.cluster_resources().get("GPU", 0)))
    rollout_class: Any = ray.remote(RolloutActor).options(
        num_gpus=placement.rollout_gpus,
        resources=config.cluster.rollout_resources,
        max_concurrency=_MAX_CONCURRENCY,
        **_common(placement),
    )
    actor = rollout_class.remote(config, _absolute(folder), placement, store)
    try:
        started = _in_time(actor.start.remote(), config.rollout.start_timeout_s, f"rollout actor {number}")
        return RemoteRollout(f"rollout {number}", actor, await started)
    except BaseException:
        ray.kill(actor)
        raise


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
        await together.ready()
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(together)
    remote: Any = ray.remote
    learner_class = remote(concurrency_groups={_SENDING: 1})(LearnerActor).options(**options)
    return [learner_class.remote(config, folder, resume, placement) for _ in range(num_ranks)]


async def _start_learner(ranks: Sequence[Any]) -> RemoteLearner:
    where = await ranks[0].open.remote(len(ranks)) if len(ranks) > 1 else None
    described = await asyncio.gather(*(actor.start.remote(where, rank) for rank, actor in enumerate(ranks)))
    version, buckets, _ = described[0]
    return RemoteLearner(ranks, version, buckets, [facts for _, _, facts in described])


def _common(placement: Placement) -> dict[str, Any]:
    # No logical CPUs are reserved: actors share the machine's cores, each with a set number of threads.
    environment = {"env_vars": {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}}  # SGLang's: both sides must agree
    return {"num_cpus": 0, "runtime_env": environment if placement.device == "cuda" else None}


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


def _process_facts() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "node": ray.get_runtime_context().get_node_id(),
        "address": _own_address(),
        "stacks": offer_stacks(),
    }


def _own_address() -> str:
    return str(ray.util.get_node_ip_address())


def _start_ray(config: Config) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    ray.init(
        address=config.cluster.address or "local",  # with none given, Ray would join one it finds on this machine
        logging_level=logging.WARNING,
        configure_logging=False,
        **({} if config.cluster.address else own),
    )
