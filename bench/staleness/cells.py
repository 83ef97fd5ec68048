"""What the staleness ablation measures: the selections, and one cell for each combination of their factors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlled_lag import run_cell
from full_system import run_job
from gradient_probe import run_probe

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "config": ROOT / "configs" / "sort_digits.toml",
    "layers": "probe,a,b",
    "preset_list": "async_default,tis2,grpo,reinforce",
    "staleness": "0,4,16",
    "learning_rates": "2e-4,5e-4",
    "seeds": 5,
    "system_staleness": "0,1,4",
    "system_seeds": 1,
    "probe_batches": 24,
    "target": 0.95,
}
FULL = SMALL | {
    "preset_list": "async_default,tis2,reinforce,grpo,cispo,prime,decoupled_ppo,topr",
    "staleness": "0,1,4,16,64",
    "learning_rates": "1e-4,2e-4,5e-4",
    "seeds": 8,
    "system_staleness": "0,1,2,4,8",
    "system_seeds": 3,
    "probe_batches": 64,
}
GPU = SMALL | {
    "config": ROOT / "configs" / "smollm2_135m_1gpu.toml",
    "layers": "a",
    "learning_rates": "2e-5",
    "seeds": 3,
    "target": 0.8,
    "workers": 6,
}
"""One GPU of 80 GB that six cells share."""

_WORDS = ["learner.groups_per_step=8", "num_steps=60", "eval.every=10", "eval.num_prompts=100"]
_GPU_WORDS = [
    "num_steps=40",
    "rollout.group_size=8",
    "rollout.max_new_tokens=24",
    "rollout.max_running=128",
    "eval.every=5",
    "eval.max_running=128",  # all held-out prompts at once: a tick costs the same
    "learner.micro_batch_tokens=4096",  # activations and logits of a worker stay near 6 GB
    "learner.head_chunk=512",
]


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: what names it, and the call that makes it."""

    key: dict[str, Any]
    call: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return " ".join(f"{value}" for value in self.key.values()).replace("/", "_").replace(" ", "-")


def common_words(options: argparse.Namespace) -> list[str]:
    """The settings that every run shares."""
    words = [
        *_WORDS,
        *(_GPU_WORDS if options.gpu else []),
        "algorithm.allow_uncorrected=true",
        f"run_dir={options.out / 'runs'}",
        *options.set,
    ]
    return list({word.partition("=")[0]: word for word in words}.values())


def probe_cells(options: argparse.Namespace) -> list[Cell]:
    if "probe" not in options.layers:
        return []
    rate = min(options.learning_rates)
    words = [*common_words(options), "algorithm.preset=reinforce", f"learner.learning_rate={rate}"]
    lags = "+".join(map(str, options.staleness))
    return [
        Cell(
            {"layer": "probe", "step": step, "presets": "+".join(options.preset_list), "lags": lags},
            run_probe,
            (words, options.config, options.preset_list, options.staleness, step, options.probe_batches),
        )
        for step in options.probe_steps
    ]


def lag_cells(options: argparse.Namespace) -> list[Cell]:
    """Layer A without noise, and with noise on the engine at the lowest learning rate."""
    if "a" not in options.layers:
        return []
    return [
        _lag_cell(options, noise, preset=preset, lag=lag, learning_rate=rate, seed=seed)
        for seed in range(options.seeds)  # outermost: what is done when a run is stopped is a whole comparison
        for noise in sorted({0.0, *options.engine_noise})
        for lag in options.staleness
        for rate in (options.learning_rates if not noise else [min(options.learning_rates)])
        for preset in options.preset_list
    ]


def _lag_cell(options: argparse.Namespace, noise: float, **place: Any) -> Cell:
    key = {"layer": "noise" if noise else "a", **place} | ({"noise": noise} if noise else {})
    words = [f"algorithm.preset={place['preset']}", f"learner.learning_rate={place['learning_rate']}"]
    words = [*common_words(options), *words, f"seed={place['seed']}"]
    return Cell(key, run_cell, (words, options.config, place["lag"], noise))


def system_cells(options: argparse.Namespace, start: Path | None) -> list[Cell]:
    """Layer B, from the weights in `start`: those of layer A, whatever the seed."""
    if "b" not in options.layers:
        return []
    rate = min(options.learning_rates)
    return [
        Cell(
            {"layer": "b", "preset": preset, "lag": bound, "learning_rate": rate, "seed": seed, "order": order},
            run_job,
            (
                [
                    *common_words(options),
                    f"algorithm.preset={preset}",
                    f"learner.learning_rate={rate}",
                    f"seed={seed}",
                    f"buffer.max_staleness={bound}",
                    *(["buffer.window=1"] if order == "fifo" else []),
                    f"model.path={start}",
                    "warmup.num_steps=0",
                ],
                options.config,
            ),
        )
        for seed in range(options.system_seeds)
        for bound in options.system_staleness
        for order in options.system_orders
        for preset in options.system_presets
    ]
