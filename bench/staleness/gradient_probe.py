"""The fixed-point gradient probe: how far each loss's gradient on stale batches is from the on-policy gradient.

One uncorrected on-policy run leaves weights theta of a few steps and theta_{-S} of S steps earlier. At each pair, every
preset sees the same K batches of theta_{-S}; the yardstick g* is the mean REINFORCE gradient over many more batches of
theta itself. Nothing is trained, so neither learning rates nor training noise confound the comparison. Only the
correction is compared: advantages, normaliser and KL term are those of "reinforce" for every preset.

    bias      |mean g - g*| / |g*|          spread    trace of the covariance of g / |g*|^2
    cosine    cos(mean g, g*)               ceiling   the same for K on-policy batches that g* does not contain
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from controlled_lag import Lab, assign
from torch import Tensor

from asyncrl.config import loading as configuration
from asyncrl.config.schema import Config
from asyncrl.training.learner import Learner
from asyncrl.types import Trajectory, Version

Batch = list[list[Trajectory]]


async def probe(
    config: Config, presets: Sequence[str], lags: Sequence[int], step: Version, num_batches: int
) -> list[dict[str, Any]]:
    """The weights of one `step`: a row for each lag and preset, and the ceiling. `num_batches` is K, g* is over 8 K."""
    lab = Lab(config)
    snapshots = await _trajectory_of_weights(lab, step)
    judges = {name: lab.make_learner(_frozen(config, name)) for name in dict.fromkeys(["reinforce", *presets])}
    assign(lab.model, snapshots[step])
    best: Tensor | float = 0.0
    for batch in await _batches(lab, snapshots[step], step, 8 * num_batches):
        best = best + _gradient(judges["reinforce"], batch, step)[0] / (8 * num_batches)
    fresh = await _batches(lab, snapshots[step], step, num_batches)
    rows = [{"step": step, "lag": 0, "preset": "ceiling"} | _compare(judges["reinforce"], fresh, step, best)]
    for lag in lags:
        if 0 < lag <= step:
            stale = await _batches(lab, snapshots[step - lag], step - lag, num_batches)
            rows += [
                {"step": step, "lag": lag, "preset": name} | _compare(judges[name], stale, step, best)
                for name in presets
            ]
    await lab.close()
    return rows


async def _trajectory_of_weights(lab: Lab, num_steps: int) -> list[dict[str, Tensor]]:
    snapshots = [_weights(lab)]
    for step in range(num_steps):
        await lab.sample_from(snapshots[-1], step)
        lab.learner.step(await lab.batch())
        snapshots.append(_weights(lab))
    return snapshots


def _weights(lab: Lab) -> dict[str, Tensor]:
    """A copy of the learner's weights, on its device."""
    return {name: parameter.detach().clone() for name, parameter in lab.model.named_parameters()}


async def _batches(lab: Lab, weights: dict[str, Tensor], version: Version, count: int) -> list[Batch]:
    await lab.sample_from(weights, version)
    return [await lab.batch() for _ in range(count)]


def _frozen(config: Config, preset: str) -> Config:
    """A step of it leaves the gradient, unclipped, and the weights as they were."""
    tree = configuration.to_tree(config)
    same = {"center": "mean", "scale": "none", "aggregate": "token", "reference_kl": 0.0}
    tree["algorithm"] |= {"preset": preset, "loss": same, "allow_uncorrected": True}
    tree["learner"] |= {"learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 1e30}
    return configuration.from_tree(tree)


def _gradient(judge: Learner, batch: Batch, step: Version) -> tuple[Tensor, dict[str, float]]:
    judge.version = step
    metrics = judge.step(batch)
    return torch.cat([p.grad.flatten() for p in judge.model.parameters() if p.grad is not None]).clone(), metrics


def _compare(judge: Learner, batches: Sequence[Batch], step: Version, best: Tensor) -> dict[str, float]:
    """The statistics of one preset's gradients. They keep sums only: K gradients of a large model would not fit."""
    total, squares, metrics = torch.zeros_like(best), 0.0, []
    for batch in batches:
        gradient, row = _gradient(judge, batch, step)
        total += gradient
        squares += float(gradient.square().sum())
        metrics.append(row)
    mean, count = total / len(batches), len(batches)
    scale = float(best.square().sum())
    if not scale:
        raise ValueError(f"no on-policy batch at step {step} has a gradient: all rewards are equal; warm up longer")
    spread = (squares - count * float(mean.square().sum())) / (count - 1)
    averages = {
        name: statistics.fmean(row[name] for row in metrics)
        for name in ("ess/token", "ess/sequence", "mismatch/k3", "clip/removed_share")
    }
    return {
        "bias": float((mean - best).norm()) / scale**0.5,
        "spread": spread / scale,
        "cosine": float(torch.nn.functional.cosine_similarity(mean, best, dim=0)),
        **averages,
    }


def run_probe(words: list[str], config_path: Path, *arguments: Any) -> list[dict[str, Any]]:
    """`probe` in a process of its own."""
    return asyncio.run(probe(configuration.load(config_path, words), *arguments))
