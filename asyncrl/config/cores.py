"""CPU threads: how many of a machine's cores each process of a run computes with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from msgspec import structs

from asyncrl.config.schema import Config, LearnerConfig, RolloutConfig

_Part = TypeVar("_Part", LearnerConfig, RolloutConfig)


@dataclass(frozen=True, slots=True)
class Threads:
    """Of each learner rank, and of each engine."""

    learner: int
    engine: int


def count(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those that it is bound to, within the limit of the container (cgroup v2)."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, _, period = quota.read_text().partition(" ") if quota.exists() else ("max", "", "")
    return bound if limit == "max" else max(1, min(bound, int(limit) // int(period)))


def share(config: Config, cores: int) -> Threads:
    """The threads of a run on a machine with so many cores.

    "auto" divides them evenly over all that compute at the same time, as if all were on this machine; in one process
    those are the learner and whichever engine has its turn.
    """
    engines = 1 if config.runtime == "local" else config.num_engines
    each = max(1, cores // (config.learner.num_gpus + engines))
    learner, engine = config.learner.num_threads, config.rollout.num_threads
    return Threads(each if learner == "auto" else learner, each if engine == "auto" else engine)


def with_limit(config: Config) -> Config:
    """The configuration with OMP_NUM_THREADS, where the user set it, in place of "auto". To be asked for where the run
    starts: Ray sets that variable in its actors, if nobody did."""
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # the first of a list is for the outermost level
    if not limit.isdecimal() or int(limit) < 1:
        return config

    def limited(part: _Part) -> _Part:
        return structs.replace(part, num_threads=int(limit)) if part.num_threads == "auto" else part

    return structs.replace(config, learner=limited(config.learner), rollout=limited(config.rollout))


def here(config: Config) -> Threads:
    """The threads of a run on this machine, asked for outside Ray's actors."""
    return share(with_limit(config), count())
