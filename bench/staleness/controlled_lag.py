"""Layer A of the staleness ablation: the product's engine and learner with the lag under control.

The batch of step k is sampled by the weights of step max(0, k - S), kept in a ring of snapshots. Nothing runs beside
anything else, so the lag is exact, and two presets with one seed see the same prompts and sampling seeds. It says
nothing about throughput. Several such processes may share one GPU: the snapshots are in the memory of the host.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch
from engine_noise import EngineNoise
from torch import Tensor, nn

from asyncrl.config import cores
from asyncrl.config import loading as configuration
from asyncrl.config.schema import Config
from asyncrl.engines.embedded.engine import EmbeddedEngine
from asyncrl.envs.base import load_env
from asyncrl.models.loading import load_model, load_tokenizer
from asyncrl.runtime.build import sampling_of
from asyncrl.runtime.rollout_worker import Attempts, Rollout, scored
from asyncrl.training.learner import Learner, row_length
from asyncrl.training.warmup import prepare
from asyncrl.types import Trajectory, Version
from asyncrl.weights.buckets import DTYPES

AVERAGED = (
    "ess/token",
    "ess/sequence",
    "mismatch/k3",
    "clip/capped_positive",
    "clip/capped_negative",
    "clip/trust_positive",
    "clip/trust_negative",
    "clip/removed_share",
    "gradient/cosine",
    "lag/mean",
)
"""Metrics of which a cell keeps the mean over the second half of its steps."""


class Ring:
    """The weights of the last `size` steps, oldest first, in the memory of the host; pinned for a model on a GPU."""

    def __init__(self, model: nn.Module, size: int, dtype: torch.dtype) -> None:
        self._parameters, self._size, self._dtype = dict(model.named_parameters()), size, dtype
        self._held: deque[dict[str, Tensor]] = deque()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def oldest(self) -> dict[str, Tensor]:
        return self._held[0]

    @property
    def newest(self) -> dict[str, Tensor]:
        return self._held[-1]

    @torch.no_grad()
    def push(self) -> None:
        """Takes the model's weights as they are now; those of a step too old give up their place."""
        place = self._held.popleft() if len(self._held) == self._size else self._new_place()
        for name, parameter in self._parameters.items():
            place[name].copy_(parameter, non_blocking=True)  # in the stream that later reads them
        self._held.append(place)

    def _new_place(self) -> dict[str, Tensor]:
        return {
            name: torch.empty(parameter.shape, dtype=self._dtype, pin_memory=parameter.is_cuda)
            for name, parameter in self._parameters.items()
        }


class Lab:
    """An engine and a learner on one model, in this process; the engine's weights are set by hand."""

    def __init__(self, config: Config, *, initial_seed: int = 0, noise: float = 0.0) -> None:
        """All seeds start from the weights of `initial_seed`; `config.seed` chooses prompts and samples. The engine
        computes in `config.rollout.dtype`, with `noise` on its logits."""
        torch.set_num_threads(cores.here(config).learner)
        folder = str(prepare(msgspec.structs.replace(config, seed=initial_seed), quiet=True))
        tokenizer = load_tokenizer(folder)
        device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
        self.config = config
        self.env = load_env(config.env.path, tokenizer, config.env.args)
        self._load = lambda: load_model(folder, dtype=torch.float32, device=device)
        self.model = self._load()
        self.learner = self.make_learner(config)
        settings, self.dtype = config.rollout, DTYPES[config.rollout.dtype]
        self._sampler = load_model(folder, dtype=self.dtype, device=device)
        length = self.env.max_prompt_tokens + settings.max_new_tokens
        self._noise = EngineNoise(self._sampler, noise, length, config.seed)
        self._engine = EmbeddedEngine(
            self._sampler, max_running=settings.max_running, max_length=length, decode=tokenizer.decode
        )
        sampling = sampling_of(config, folder, tokenizer)
        greedy = Attempts(replace(sampling, temperature=0.0, top_p=1.0, top_k=0), max_running=config.eval.max_running)
        self._rollout = Rollout(
            self._engine, self.env, sampling, group_size=settings.group_size, seed=config.seed, evaluation=greedy
        )
        self._prompts = self.env.prompts("train", config.seed)
        self._heldout = list(islice(self.env.prompts("heldout", 0), config.eval.num_prompts))

    def make_learner(self, config: Config) -> Learner:
        """A learner of the lab's model."""
        reference = self._load() if config.loss.needs_reference else None
        critic = self._load() if config.loss.needs_critic and config.critic.backbone == "own" else None
        row_tokens = row_length(config, self.env.max_prompt_tokens)
        return Learner(config, self.model, row_tokens, reference=reference, critic=critic)

    async def sample_from(self, weights: Mapping[str, Tensor], version: Version) -> None:
        """From here on the engine samples with `weights` and stamps `version`."""
        await self._engine.pause()
        assign(self._sampler, weights)
        self._noise.draw(version)
        await self._engine.resume(version)

    async def batch(self) -> list[list[Trajectory]]:
        """The groups of one learner step, for the next prompts."""
        prompts = islice(self._prompts, self.config.learner.groups_per_step)
        groups = await asyncio.gather(*(self._rollout.run(prompt) for prompt in prompts))
        return [group.trajectories for group in groups]

    async def accuracy(self) -> float:
        """Held-out reward of the weights that the engine has, greedy and without noise."""
        self._noise.active = False
        groups, faults = scored(await self._rollout.evaluate(self._heldout))
        if faults:
            raise faults[0]
        self._noise.active = True
        return statistics.fmean(reward for group in groups for reward in group.rewards)

    async def close(self) -> None:
        await self._rollout.close()


@torch.no_grad()
def assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives the model the values of `weights`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name], non_blocking=True)


async def train(config: Config, lag: int, noise: float = 0.0) -> dict[str, Any]:
    """One cell: trains for `config.num_steps` with every batch `lag` steps old; its curve and what it measured."""
    lab = Lab(config, noise=noise)
    ring = Ring(lab.model, lag + 1, lab.dtype)
    ring.push()
    curve, rows = [], []
    for step in range(config.num_steps + 1):
        if step % config.eval.every == 0:
            await lab.sample_from(ring.newest, step)
            curve.append((step, await lab.accuracy()))
        if step == config.num_steps:
            break
        await lab.sample_from(ring.oldest, step + 1 - len(ring))
        groups = await lab.batch()
        rows.append(lab.learner.step(groups) | {"reward": mean_reward(groups)})
        ring.push()
    await lab.close()
    return summary(curve, rows)


def mean_reward(groups: list[list[Trajectory]]) -> float:
    return statistics.fmean(trajectory.reward for group in groups for trajectory in group)


def summary(curve: list[tuple[int, float]], rows: list[dict[str, float]]) -> dict[str, Any]:
    """What a table or a plot needs of a run. `final` is the mean of the last three evaluations, `auc` of all."""
    accuracies = [accuracy for _, accuracy in curve]
    late = rows[len(rows) // 2 :]
    norms = [row["gradient/norm"] for row in late]
    final, peak = statistics.fmean(accuracies[-3:]), max(accuracies)
    entropy = [row["policy/entropy"] for row in rows]
    return {
        "curve": curve,
        "final": final,
        "auc": statistics.fmean(accuracies),
        # A policy without entropy has collapsed only if it does not solve the task.
        "collapsed": final < 0.7 * peak or (entropy[-1] < 0.01 * entropy[0] and final < 0.9),
        "entropy": entropy[-1],
        "k3_first": rows[0]["mismatch/k3"],  # of the starting weights, whatever the lag: the engine alone
        "gradient_norm_cv": statistics.pstdev(norms) / (statistics.fmean(norms) or 1.0),
        "k3_p95": sorted(row["mismatch/k3"] for row in rows)[int(0.95 * (len(rows) - 1))],
        **{name: statistics.fmean(row[name] for row in late) for name in AVERAGED},
    }


def run_cell(words: list[str], config_path: Path, lag: int, noise: float = 0.0) -> dict[str, Any]:
    """`train` in a process of its own."""
    result = asyncio.run(train(configuration.load(config_path, words), lag, noise))
    gc.collect()  # models refer to themselves: left alone they would stay beside those of the next cell
    torch.cuda.empty_cache()  # which other workers may need; nothing happens without a GPU
    return result
