"""The statistics of the staleness ablation: the grid of layer A, intervals over seeds, and times to a target.

The learning rate of a (preset, lag) is the one with the best mean over all seeds but the one being scored, so that a
cell is never chosen by its own luck; with one seed it is chosen on that seed. "Kept" is the best rate at lag 0.
A run that ends below the target is a time too: longer than the run. It counts as censored, and is never left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Cell = dict[str, Any]


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
    """95 % interval of the mean, over seeds, by Student's t; of one seed the value itself.

    A bootstrap of five values holds the mean in 87 % of all cases instead of 95 %.
    """
    if len(values) == 1 or np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(low), float(high)


def p_value(values: np.ndarray) -> float:
    """Two-sided p-value of a mean of 0, over seeds, by Student's t; 1 of one seed, and where all values are 0."""
    if len(values) == 1 or np.ptp(values) == 0:
        return float(len(values) == 1 or values[0] == 0)
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979): those below 0.05 are wrong together in at most 5 % of all such tables."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True, slots=True)
class Times:
    """Times to a target over the seeds: `values[i]` where `reached[i]`, else the end of a run that was not there."""

    values: tuple[float, ...]
    reached: tuple[bool, ...]

    @classmethod
    def of(cls, curves: Sequence[Sequence[tuple[float, float]]], target: float) -> Times:
        """From curves of (time, accuracy), one a seed; between two evaluations the accuracy runs in a line."""
        found = [_crossing(curve, target) for curve in curves]
        return cls(tuple(time for time, _ in found), tuple(reached for _, reached in found))

    @property
    def median(self) -> float | None:
        """The Kaplan-Meier median (1958); None if more than half of the seeds may never get there."""
        reached = np.array(self.reached)
        sample = stats.CensoredData.right_censored(np.array(self.values, dtype=float), ~reached)
        survival = stats.ecdf(sample).sf
        crossed = survival.quantiles[survival.probabilities <= 0.5 + 1e-9]
        return float(crossed[0]) if len(crossed) else None

    def text(self, digits: int = 0) -> str:
        """Median and reached / n, for a table."""
        middle = "not reached" if self.median is None else f"{self.median:.{digits}f}"
        return f"{middle} ({sum(self.reached)}/{len(self.reached)})"


def _crossing(curve: Sequence[tuple[float, float]], target: float) -> tuple[float, bool]:
    """Where the curve first is at the target, and whether it ever is: if not, its end."""
    for index, (time, accuracy) in enumerate(curve):
        if accuracy >= target:
            if index == 0:
                return time, True
            before, lower = curve[index - 1]
            return before + (time - before) * (target - lower) / (accuracy - lower), True
    return curve[-1][0], False


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])
