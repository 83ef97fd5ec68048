"""Where the learner and the rollout actors run: GPUs and nodes; decided, and refused, before any actor starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from asyncrl.config import cores
from asyncrl.config.schema import Config

Backend: TypeAlias = Literal["gloo", "nccl", "ipc"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where things run. GPU counts are for each actor, a learner rank too; colocated actors have shares of one GPU."""

    device: Literal["cpu", "cuda"]
    learner_gpus: float
    rollout_gpus: float
    backend: Backend
    """What weights travel through. NCCL takes no two ranks on one GPU, so colocated actors use CUDA IPC."""


def plan(config: Config, num_gpus: int) -> Placement:
    """The placement of a run where `num_gpus` GPUs exist.

    Raises `ValueError` saying how many GPUs are needed, for what, and how many there are.
    """
    actors, per_actor = config.num_engines, config.rollout.tensor_parallel_size
    device = config.device if config.device != "auto" else ("cuda" if num_gpus else "cpu")
    if device == "cpu":
        return Placement("cpu", 0, 0, _backend(config, "gloo"))
    if config.rollout.engine == "sglang" and config.rollout.dtype == "float32":
        raise ValueError("SGLang's GPU kernels take no float32: set rollout.dtype=bfloat16 (or device=cpu)")
    colocated = config.placement == "colocated"
    needed = 1 if colocated else config.learner.num_gpus + actors * per_actor
    if colocated and (per_actor > 1 or config.learner.num_gpus > 1):
        raise ValueError(
            "placement 'colocated' is for one GPU that the learner and the engines share: learner.num_gpus is "
            f"{config.learner.num_gpus} and rollout.tensor_parallel_size is {per_actor}; set both to 1, or "
            "placement=disaggregated"
        )
    if needed > num_gpus:
        detail = (
            "to share"
            if colocated
            else f"{config.learner.num_gpus} for the learner, {actors} x {per_actor} for engines"
        )
        raise ValueError(
            f"the run needs {needed} GPUs ({detail}), {num_gpus} exist: lower --num-rollout-actors, "
            "learner.num_gpus or rollout.tensor_parallel_size, set placement=colocated for one GPU, or device=cpu"
        )
    if colocated:
        share = math.floor(100 / (actors + 1)) / 100
        return Placement("cuda", share, share, _backend(config, "ipc"))
    return Placement("cuda", 1, per_actor, _backend(config, "nccl"))


def check_room(config: Config, num_actors: int, existing: Mapping[str, float]) -> None:
    """Raises `ValueError` if a run in progress has no room for so many rollout actors.

    `existing` are the totals over the cluster's nodes.
    """
    num_gpus, engines = int(existing.get("GPU", 0)), num_actors + config.eval.num_actors
    placement = plan(config, num_gpus)
    if placement.device == "cpu":
        total = existing.get("CPU", math.inf)
        asked = cores.with_limit(config).rollout.num_threads
        each = 1 if asked == "auto" else asked  # of its share, which is at least one
        if engines * each > total:
            raise ValueError(
                f"{engines} engines x {each} threads (rollout.num_threads) share {total:g} CPU cores and slow each "
                "other down: ask launch/scale.py for fewer"
            )
    needed = round(config.learner.num_gpus * placement.learner_gpus + engines * placement.rollout_gpus, 2)
    if needed > num_gpus:
        raise ValueError(
            f"the learner and {engines} engines need {needed:g} GPUs, {num_gpus} exist: those that find none free are "
            f"given up after {config.rollout.start_timeout_s:g} s (rollout.start_timeout_s); ask launch/scale.py for "
            "fewer"
        )


def check_resources(config: Config, existing: Mapping[str, float]) -> None:
    """Ray lets an actor that no node can take wait for ever; here the run is refused instead.

    `existing` are the totals over the cluster's nodes. Raises `ValueError` naming the custom resource that is short.
    """
    actors, ranks, cluster = config.num_engines, config.learner.num_gpus, config.cluster
    for name in sorted({*cluster.learner_resources, *cluster.rollout_resources}):
        learner, rollout = cluster.learner_resources.get(name, 0), cluster.rollout_resources.get(name, 0)
        needed, total = round(ranks * learner + actors * rollout, 4), existing.get(name, 0)  # in steps of 0.0001
        if needed > total:
            raise ValueError(
                f"the run needs {needed:g} of the Ray resource {name!r} ({ranks} x {learner:g} for the learner, "
                f"{actors} x {rollout:g} for rollout actors), the cluster has {total:g}: start nodes with it (ray "
                "start --resources), lower --num-rollout-actors, or change cluster.learner_resources and "
                "cluster.rollout_resources"
            )


def _backend(config: Config, best: Backend) -> Backend:
    wanted = config.weights.backend
    if wanted not in ("auto", "gloo", best):
        needs = {
            "nccl": "a GPU for each engine and one for the learner: set placement=disaggregated on enough GPUs",
            "ipc": "one GPU that the learner and the engines share: set placement=colocated",
        }
        raise ValueError(f"weights.backend {wanted!r} needs {needs[wanted]}, or set weights.backend=auto")
    return best if wanted == "auto" else wanted
