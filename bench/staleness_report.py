"""Tables of the staleness ablation: bootstrap intervals over paired seeds, learning rates chosen two ways, collapses.

Differences are called by bootstrap p-values with Holm's correction over all comparisons of the table.

The learning rate of a (preset, lag) is the one with the best mean over all seeds but the one being scored, so that a
cell is never chosen by its own luck; with one seed it is chosen on that seed. "Kept" is the best rate at lag 0.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import staleness_plots

Cell = dict[str, Any]
_RESAMPLES = 4000
_LEVEL = 0.05
_FEWEST_SEEDS = 5
"""A bootstrap over fewer seeds than this has intervals far too narrow to call anything by."""


class Grid:
    """Layer A, by preset, lag, learning rate and seed."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        def of(name: str) -> list[Any]:
            return list(dict.fromkeys(cell[name] for cell in cells))

        self.presets, self.lags = of("preset"), sorted(of("lag"))
        self.rates, self.seeds = sorted(of("learning_rate")), sorted(of("seed"))
        self.cells = {(c["preset"], c["lag"], c["learning_rate"], c["seed"]): c["result"] for c in cells}

    def values(self, preset: str, lag: int, rate: float, name: str = "final") -> np.ndarray:
        """Over the seeds."""
        return np.array([self.cells[preset, lag, rate, seed][name] for seed in self.seeds], dtype=float)

    def tuned(self, preset: str, lag: int, name: str = "final") -> np.ndarray:
        """Over the seeds, each at the learning rate that was best on the other seeds."""
        return np.array([self.cells[preset, lag, self._rate(preset, lag, s), s][name] for s in self.seeds], dtype=float)

    def kept(self, preset: str, lag: int, name: str = "final") -> np.ndarray:
        """Over the seeds, each at the learning rate that was best on the other seeds at the smallest lag."""
        first = self.lags[0]
        return np.array(
            [self.cells[preset, lag, self._rate(preset, first, s), s][name] for s in self.seeds], dtype=float
        )

    def rate_of(self, preset: str, lag: int) -> float:
        """The learning rate of the best mean over all seeds."""
        return max(self.rates, key=lambda rate: self.values(preset, lag, rate).mean())

    def _rate(self, preset: str, lag: int, seed: int) -> float:
        others = [i for i, s in enumerate(self.seeds) if s != seed] or [0]
        return max(self.rates, key=lambda rate: self.values(preset, lag, rate)[others].mean())


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, over seeds."""
    picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def p_value(values: np.ndarray) -> float:
    """Two-sided bootstrap p-value of a mean of 0, over seeds; at least 1 / resamples."""
    picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    means = values[picks].mean(1)
    return float(min(1.0, max(1 / _RESAMPLES, 2 * min((means <= 0).mean(), (means >= 0).mean()))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979): those below 0.05 are wrong together in at most 5 % of all such tables."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def write(cells: Sequence[Cell], settings: dict[str, Any], folder: Path) -> str:
    """Writes staleness.json, staleness.md and the plots; returns the Markdown."""
    probes = [row for cell in cells if cell["layer"] == "probe" for row in cell["result"]]
    lag_cells = [cell for cell in cells if cell["layer"] == "a"]
    system = [cell for cell in cells if cell["layer"] == "b"]
    grid = Grid(lag_cells) if lag_cells else None
    parts = [_head(settings, cells)]
    if probes:
        parts.append(_probe_table(probes))
    if grid:
        parts += [_lag_table(grid), *([_difference_table(grid)] if len(grid.presets) > 1 else []), _drift_table(grid)]
    if system:
        parts.append(_system_table(system, settings["target"]))
    text = "\n\n".join(parts) + "\n"
    (folder / "staleness.md").write_text(text)
    (folder / "staleness.json").write_text(json.dumps({"settings": settings, "cells": list(cells)}))
    staleness_plots.draw(probes, grid, system, folder)
    return text


def _head(settings: dict[str, Any], cells: Sequence[Cell]) -> str:
    words = " ".join(word for word in settings["words"] if not word.startswith("run_dir="))
    return (
        f"Measured {time.strftime('%Y-%m-%d')} on {os.cpu_count()} {platform.machine()} cores, {settings['config']} "
        f"with `{words}`. {len(cells)} cells, {sum(cell['cpu_s'] for cell in cells):.0f} CPU seconds."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def _probe_table(rows: Sequence[Cell]) -> str:
    body = [
        [
            str(row["step"]),
            str(row["lag"]),
            row["preset"],
            f"{row['cosine']:.2f}",
            f"{row['bias']:.2f}",
            f"{row['spread']:.1f}",
            f"{row['mismatch/k3']:.4f}",
            f"{row['ess/token']:.2f} / {row['ess/sequence']:.2f}",
            f"{row['clip/removed_share']:.1%}",
        ]
        for row in rows
    ]
    head = ["step", "lag", "preset", "cosine", "bias", "spread", "k3", "ESS token / sequence", "weight removed"]
    return "**Gradient probe**\n\n" + _table(head, body)


def _lag_table(grid: Grid) -> str:
    body = []
    for preset, lag in product(grid.presets, grid.lags):
        tuned, kept = grid.tuned(preset, lag), grid.kept(preset, lag)
        low, high = interval(tuned)
        collapsed = sum(
            grid.cells[preset, lag, rate, seed]["collapsed"] for rate, seed in product(grid.rates, grid.seeds)
        )
        body.append(
            [
                preset,
                str(lag),
                f"{tuned.mean():.3f} [{low:.3f}, {high:.3f}]",
                f"{grid.tuned(preset, lag, 'auc').mean():.3f}",
                f"{kept.mean():.3f}",
                f"{grid.rate_of(preset, lag):g}",
                f"{collapsed} of {len(grid.rates) * len(grid.seeds)}",
            ]
        )
    head = ["preset", "lag S", "final, rate tuned per S", "area under curve", "final, rate of S = 0", "best rate"]
    return "**Layer A: controlled lag**, held-out accuracy\n\n" + _table([*head, "collapsed, all rates"], body)


def _difference_table(grid: Grid) -> str:
    """Each preset against the first, seed by seed."""
    first = grid.presets[0]
    body = []
    places = list(product(grid.presets[1:], grid.lags))
    differences = [grid.tuned(preset, lag) - grid.tuned(first, lag) for preset, lag in places]
    adjusted = holm([p_value(difference) for difference in differences])
    for (preset, lag), difference, p in zip(places, differences, adjusted, strict=True):
        low, high = interval(difference)
        resolved = "not resolved" if p >= _LEVEL else "above" if difference.mean() > 0 else "below"
        verdict = resolved if len(grid.seeds) >= _FEWEST_SEEDS else "too few seeds"
        body.append([preset, str(lag), f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]", f"{p:.3f}", verdict])
    return f"**Against {first}**, paired by seed, final accuracy\n\n" + _table(
        ["preset", "lag S", "difference, 95 % interval", "p (Holm)", "verdict"], body
    )


def _drift_table(grid: Grid) -> str:
    body = []
    for preset, lag, rate in product(grid.presets, grid.lags, grid.rates):
        values = {
            name: grid.values(preset, lag, rate, name).mean()
            for name in ("final", "ess/token", "ess/sequence", "mismatch/k3", "clip/removed_share", "entropy")
        }
        norms = grid.values(preset, lag, rate, "gradient_norm_cv").mean()
        cosine = grid.values(preset, lag, rate, "gradient/cosine").mean()
        body.append([preset, str(lag), f"{rate:g}", *(f"{value:.3f}" for value in (*values.values(), norms, cosine))])
    head = ["preset", "lag S", "rate", "final", "ESS token", "ESS sequence", "k3", "weight removed", "entropy"]
    return "**Health**, mean over seeds and the second half of the steps\n\n" + _table(
        [*head, "gradient norm CV", "gradient cosine"], body
    )


def _system_table(cells: Sequence[Cell], target: float) -> str:
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["preset"], cell["order"], cell["lag"]), []).append(cell["result"])
    body = []
    for (preset, order, bound), runs in sorted(groups.items()):
        times = sorted(run["to_target_s"] for run in runs if run["to_target_s"] is not None)

        def mean(name: str, runs: list[Cell] = runs) -> float:
            return float(np.mean([run[name] for run in runs]))

        middle = f"{times[(len(runs) - 1) // 2]:.1f}" if len(times) > (len(runs) - 1) // 2 else "not reached"
        body.append(
            [
                preset,
                order,
                str(bound),
                f"{mean('lag_mean'):.2f} / {max(run['lag_max'] for run in runs):.0f}",
                f"{mean('final'):.3f}",
                f"{middle} ({len(times)} of {len(runs)})",
                f"{mean('loop_s'):.1f}",
                f"{mean('tokens_per_s'):.0f}",
                f"{mean('effective_tokens_per_s'):.0f}",
                f"{mean('learner_idle'):.0%} / {mean('rollout_idle'):.0%}",
                f"{mean('sync_s'):.3f}",
            ]
        )
    head = [
        "preset",
        "order",
        "bound S",
        "lag mean / max",
        "final",
        f"median s to {target:g} (reached)",
        "loop s",
        "tokens/s",
    ]
    head += ["tokens/s x ESS", "idle learner / rollout", "update s"]
    return "**Layer B: the asynchronous system**\n\n" + _table(head, body)
