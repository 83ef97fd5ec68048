"""How GPUs are split between the learner and the rollout actors; decided, and refused, before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from asyncrl.config import Config


@dataclass(frozen=True, slots=True)
class Placement:
    """Where things run. GPU counts are for each actor; colocated actors have shares of one GPU."""

    device: Literal["cpu", "cuda"]
    learner_gpus: float
    rollout_gpus: float
    backend: Literal["gloo", "nccl"]
    """What weights travel through. NCCL takes no two ranks on one GPU, so colocated actors use gloo."""


def plan(config: Config, num_gpus: int) -> Placement:
    """The placement of a run where `num_gpus` GPUs exist.

    Raises `ValueError` saying how many GPUs are needed, for what, and how many there are.
    """
    actors, per_actor = config.rollout.num_actors, config.rollout.tensor_parallel_size
    device = config.device if config.device != "auto" else ("cuda" if num_gpus else "cpu")
    if device == "cpu":
        return Placement("cpu", 0, 0, _backend(config, "gloo"))
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
            f"the run needs {needed} GPUs ({detail}), {num_gpus} exist: lower --num-rollout-actors or "
            "rollout.tensor_parallel_size, set placement=colocated for one GPU, or device=cpu"
        )
    if colocated:
        share = math.floor(100 / (actors + 1)) / 100
        return Placement("cuda", share, share, _backend(config, "gloo"))
    return Placement("cuda", config.learner.num_gpus, per_actor, _backend(config, "nccl"))


def _backend(config: Config, best: Literal["gloo", "nccl"]) -> Literal["gloo", "nccl"]:
    wanted = config.weights.backend
    if wanted == "nccl" and best == "gloo":
        raise ValueError(
            "weights.backend 'nccl' needs a GPU for each engine and one for the learner; set weights.backend=auto, "
            "or placement=disaggregated on enough GPUs"
        )
    return best if wanted == "auto" else wanted
