"""What an engine with other numerics than the learner's does to each preset, with and without lag: table and plot.

Noise is named by what it does and not by its size: the token KL (k3) between engine and learner while both have the
same weights. "Start" is that of the first step, on the starting weights; "S = 0" is the mean over the second half of
the runs without lag, whose policies have become surer, so that the same noise changes them less.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from plots import panels, save
from seed_statistics import Cell, interval, table


class NoiseGrid:
    """Layer A at one learning rate, by noise of the engine, preset, lag and seed."""

    def __init__(self, noisy: Sequence[Cell], clean: Sequence[Cell]) -> None:
        """`clean` cells count where a noisy one has their learning rate and seed."""
        rates, seeds = {cell["learning_rate"] for cell in noisy}, {cell["seed"] for cell in noisy}
        cells = [cell for cell in (*clean, *noisy) if cell["learning_rate"] in rates and cell["seed"] in seeds]
        self.seeds = sorted(seeds & {cell["seed"] for cell in clean})
        self.presets = list(dict.fromkeys(cell["preset"] for cell in cells))
        self.lags = sorted({cell["lag"] for cell in cells})
        self.noises = sorted({cell.get("noise", 0.0) for cell in cells})
        self._cells = {(c.get("noise", 0.0), c["preset"], c["lag"], c["seed"]): c["result"] for c in cells}

    def values(self, noise: float, preset: str, lag: int, name: str = "final") -> np.ndarray:
        """Over the seeds."""
        return np.array([self._cells[noise, preset, lag, seed][name] for seed in self.seeds], dtype=float)

    def start(self, noise: float) -> float:
        """Token KL on the starting weights, over all runs of that noise: none of them has a lag yet."""
        places = product(self.presets, self.lags)
        return float(np.mean([self.values(noise, preset, lag, "k3_first") for preset, lag in places]))


def noise_table(grid: NoiseGrid) -> str:
    """Final accuracy by noise, and the difference that the noise makes, paired by seed."""
    body = []
    for noise, preset in product(grid.noises, grid.presets):
        row = [f"{grid.start(noise):.1e}", preset]
        row.append(f"{grid.values(noise, preset, grid.lags[0], 'mismatch/k3').mean():.1e}")
        for lag in grid.lags:
            values = grid.values(noise, preset, lag)
            collapsed = int(grid.values(noise, preset, lag, "collapsed").sum())
            text = f"{values.mean():.3f}" + (f", {collapsed} collapsed" if collapsed else "")
            if noise:
                change = values - grid.values(0.0, preset, lag)
                low, high = interval(change)
                text += f" ({change.mean():+.3f} [{low:+.3f}, {high:+.3f}])"
            row.append(text)
        body.append(row)
    head = ["token KL, start", "preset", f"token KL, S = {grid.lags[0]}", *(f"final, S = {lag}" for lag in grid.lags)]
    return (
        f"**Engine noise x lag**, layer A, {len(grid.seeds)} seeds; in brackets the difference to no noise, paired by "
        "seed, and its 95 % interval\n\n" + table(head, body)
    )


def draw(grid: NoiseGrid, folder: Path) -> None:
    """`noise.png`: final accuracy against the token KL of the engine, one panel a lag."""
    save(folder / "noise.png", lambda: _plot(grid))


def _plot(grid: NoiseGrid) -> Any:
    figure, axes = panels(len(grid.lags), sharey=True)
    at = [grid.start(noise) for noise in grid.noises]
    for axis, lag in zip(axes, grid.lags, strict=True):
        for index, preset in enumerate(grid.presets):
            found = [grid.values(noise, preset, lag) for noise in grid.noises]
            low, high = zip(*(interval(values) for values in found), strict=True)
            axis.plot(at, [values.mean() for values in found], "o-", color=f"C{index}", label=preset, markersize=4)
            axis.fill_between(at, low, high, color=f"C{index}", alpha=0.12)
        axis.set_xscale("symlog", linthresh=max(1e-5, min(x for x in at if x > 1e-8) / 3))
        axis.set(title=f"lag {lag}", xlabel="token KL of the engine at the start (left: none)", ylim=(-0.03, 1.03))
        axis.legend(fontsize=7)
    axes[0].set_ylabel("final held-out accuracy")
    return figure
