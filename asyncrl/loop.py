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
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from asyncrl.buffer import Buffer
from asyncrl.checkpoint import Cursor
from asyncrl.config import Config
from asyncrl.evaluation import by_source, summarize
from asyncrl.metrics import Metrics
from asyncrl.pool import LearnerLink, RolloutPool, ToEvaluators
from asyncrl.types import Group, Prompt


class LearnerHandle(LearnerLink, Protocol):
    """The learner as the driver sees it; both runtimes have one."""

    async def step(self, groups: Sequence[Group]) -> dict[str, float]: ...
    async def save(self, folder: Path, cursor: Cursor) -> None: ...


class PromptQueue:
    """The run's prompts, each trained once or dropped with a reason.

    `open` holds the prompts that were issued and not settled. A resumed run issues them again, under the same ids.
    """

    def __init__(self, source: Iterator[Prompt], cursor: Cursor | None = None) -> None:
        self._source = source
        self.next_id = cursor.next_prompt if cursor else 0
        again = set(cursor.open_prompts) if cursor else set()
        self._again = deque(prompt for prompt in islice(source, self.next_id) if prompt.id in again)
        self.open: dict[int, Prompt] = {}

    def issue(self) -> Prompt:
        """The next prompt to play."""
        if self._again:
            prompt = self._again.popleft()
        else:
            prompt = next(self._source)
            self.next_id = prompt.id + 1
        self.open[prompt.id] = prompt
        return prompt

    def settle(self, prompts: Sequence[Prompt]) -> None:
        """These were trained or dropped: they will not be issued again."""
        for prompt in prompts:
            self.open.pop(prompt.id, None)

    def cursor(self, version: int) -> Cursor:
        """Where a resumed run goes on."""
        return Cursor(version, self.next_id, sorted([*self.open, *(prompt.id for prompt in self._again)]))


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
    evaluated: set[int] = field(default_factory=set)
    evaluators: RolloutPool | None = None
    """Engines for evaluation alone, which hold one version still; without them the rollout actors evaluate."""
    evaluating: bool = False


async def run(system: System) -> None:
    """Trains until `num_steps`, or until the buffer is closed from outside (Ctrl-C); then evaluates and saves."""
    await system.rollouts.update_weights(system.learner)  # every engine starts from the learner's own weights
    try:
        async with asyncio.TaskGroup() as tasks:
            if system.config.eval.every:
                await start_evaluation(system, tasks)  # where the curve starts
            producers = [tasks.create_task(produce(system)) for _ in range(system.buffer.capacity)]
            await learn(system, tasks)
            system.buffer.close()
            for producer in producers:
                producer.cancel()
    except* Exception as errors:
        if len(errors.exceptions) == 1:
            raise errors.exceptions[0] from None  # the one cause, without the wrapping of the task group
        raise
    await save(system)
    if system.learner.version >= system.config.num_steps:
        if system.evaluators is not None:
            await system.evaluators.update_weights(ToEvaluators(system.learner))
        await evaluate(system)


async def produce(system: System) -> None:
    """Fills one slot after the other."""
    drop_equal = system.config.algorithm.drop_zero_variance
    while (ticket := await system.buffer.admit()) is not None:
        prompt = system.prompts.issue()
        group = await system.rollouts.run(prompt)
        if drop_equal and not group.has_variance:
            system.buffer.drop(ticket, "zero variance")
            system.metrics.timeline.mark("buffer", "drop", reason="zero variance", lengths=group.lengths)
            system.prompts.settle([prompt])
        else:
            system.buffer.put(ticket, group)
            system.metrics.timeline.count("buffer", "ready", system.buffer.num_ready)


async def learn(system: System, tasks: asyncio.TaskGroup) -> None:
    """Drains the buffer, one optimizer step a batch."""
    learner, buffer, config = system.learner, system.buffer, system.config
    span = partial(system.metrics.timeline.span, "learner")
    while learner.version < config.num_steps:
        clock = _Clock()
        with span("wait for groups"):
            groups = await buffer.take(learner.version)
        if not groups:
            return
        system.metrics.timeline.count("buffer", "ready", buffer.num_ready)
        check_digests(groups, system.rollouts.published)
        clock.lap("wait")
        with span("step", version=learner.version + 1):
            if config.rollout.release_memory:
                await system.rollouts.release()
            learnt = await learner.step(groups)
        clock.lap("step")
        with span("update weights", version=learner.version):
            synced = await system.rollouts.update_weights(learner)
        clock.lap("sync")
        buffered = buffer.release()
        system.prompts.settle([group.prompt for group in groups])
        row = measure(groups) | learnt | synced | clock.metrics() | measure_buffer(buffer, buffered)
        system.metrics.step(learner.version, row, buffer.max_lag)
        tasks.create_task(system.metrics.sample(learner.version, groups))
        if config.checkpoint.every and learner.version % config.checkpoint.every == 0:
            await save(system)
        if config.eval.every and learner.version % config.eval.every == 0:
            await start_evaluation(system, tasks)


async def start_evaluation(system: System, tasks: asyncio.TaskGroup) -> None:
    """Evaluates the current version beside the run. Evaluators get it first; while they are busy with an older one,
    they are not waited for: the evaluation is left out, and said to be."""
    if system.evaluators is None:
        tasks.create_task(evaluate(system))
    elif system.evaluating:
        system.metrics.say(f"eval {system.learner.version} | left out, another is under way: raise eval.every")
    else:
        await system.evaluators.update_weights(ToEvaluators(system.learner))
        system.evaluating = True
        tasks.create_task(evaluate(system))


async def evaluate(system: System) -> None:
    """Held-out attempts. On rollout actors, later weights may arrive under them, which `eval/mixed_versions` counts."""
    version = system.learner.version
    if version not in system.evaluated:
        system.evaluated.add(version)
        with system.metrics.timeline.span("evaluation", "evaluation", version=version):
            groups = await (system.evaluators or system.rollouts).evaluate(system.heldout)
        system.metrics.evaluation(version, summarize(groups, version, system.config.eval.pass_reward))
    system.evaluating = False


async def save(system: System) -> None:
    """A checkpoint of the current version. The learner waits for it, generation does not."""
    version = system.learner.version
    with system.metrics.timeline.span("learner", "checkpoint", version=version):
        await system.learner.save(system.checkpoints, system.prompts.cursor(version))


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
