"""Plots of the staleness ablation, one file a question; layers never share an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from seed_statistics import interval

mpl.use("Agg")
from matplotlib import pyplot

Rows = Sequence[dict[str, Any]]


def draw(probes: Rows, grid: Any, system: Rows, folder: Path) -> None:
    """The plots of the three instruments, as far as they were measured."""
    if probes:
        save(folder / "probe.png", lambda: _probe(probes))
    if grid:
        save(folder / "final.png", lambda: _final(grid))
        save(folder / "rates.png", lambda: _rates(grid))
        save(folder / "drift.png", lambda: _drift(grid))
        save(folder / "curves.png", lambda: _curves(grid))
        save(folder / "masks.png", lambda: _masks(grid))
        save(folder / "gradients.png", lambda: _gradients(grid))
    if system:
        save(folder / "system.png", lambda: _system(system))
        save(folder / "lags.png", lambda: _lags(system))
        save(folder / "timeline.png", lambda: _timeline(system))


def save(path: Path, plot: Callable[[], Any]) -> None:
    """Writes the figure that `plot` returns."""
    figure = plot()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def panels(count: int, width: float = 4.2, **arguments: Any) -> tuple[Any, Any]:
    """A figure and its `count` axes, side by side."""
    figure, axes = pyplot.subplots(
        1, count, figsize=(width * count, 3.8), layout="constrained", squeeze=False, **arguments
    )
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0]


def lag_axis(axis: Any, lags: Sequence[int], label: str = "lag S, learner steps") -> None:
    """A horizontal axis of the lags, in powers of two."""
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xticks(lags, [str(lag) for lag in lags])
    axis.set_xlabel(label)


def _probe(rows: Rows) -> Any:
    """Bias against spread, one panel a step and lag."""
    places = list(dict.fromkeys((row["step"], row["lag"]) for row in rows if row["lag"]))
    figure, axes = panels(len(places))
    for axis, (step, lag) in zip(axes, places, strict=True):
        for row in rows:
            if row["step"] == step and row["lag"] in (lag, 0):
                marker = "*" if row["preset"] == "ceiling" else "o"
                axis.plot(row["spread"], row["bias"], marker, label=f"{row['preset']} cos {row['cosine']:.2f}")
        axis.set(title=f"step {step}, lag {lag}", xlabel="spread: tr Cov(g) / |g*|²", ylabel="bias: |E g - g*| / |g*|")
        axis.legend(fontsize=7)
    return figure


def _final(grid: Any) -> Any:
    """Final accuracy and collapses against the lag, with the rate tuned per lag and with the rate of lag 0."""
    figure, (left, right) = panels(2, 5.5)
    for index, preset in enumerate(grid.presets):
        color = f"C{index}"
        tuned = [grid.tuned(preset, lag) for lag in grid.lags]
        low, high = zip(*(interval(values) for values in tuned), strict=True)
        left.plot(grid.lags, [values.mean() for values in tuned], "-", color=color, label=preset)
        left.fill_between(grid.lags, low, high, color=color, alpha=0.12)
        left.plot(grid.lags, [grid.kept(preset, lag).mean() for lag in grid.lags], "--", color=color)
        for lag, values in zip(grid.lags, tuned, strict=True):
            left.plot([lag] * len(values), values, ".", color=color, markersize=4)
        collapsed = [
            np.mean([grid.cells[preset, lag, r, s]["collapsed"] for r, s in product(grid.rates, grid.seeds)])
            for lag in grid.lags
        ]
        right.plot(grid.lags, collapsed, "o-", color=color, label=preset)
    left.set(title="final held-out accuracy (dashed: rate of S = 0)", ylim=(-0.03, 1.03))
    right.set(title="share of runs that collapsed, all rates", ylim=(-0.03, 1.03))
    for axis in (left, right):
        lag_axis(axis, grid.lags)
        axis.legend(fontsize=8)
    return figure


def _rates(grid: Any) -> Any:
    """Final accuracy by lag and learning rate, one panel a preset."""
    figure, axes = panels(len(grid.presets), 3.2)
    for axis, preset in zip(axes, grid.presets, strict=True):
        values = np.array([[grid.values(preset, lag, rate).mean() for lag in grid.lags] for rate in grid.rates])
        image = axis.imshow(values, vmin=0, vmax=1, origin="lower", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k")
        axis.set_xticks(range(len(grid.lags)), grid.lags)
        axis.set_yticks(range(len(grid.rates)), [f"{rate:g}" for rate in grid.rates])
        axis.set(title=preset, xlabel="lag S", ylabel="learning rate")
        axis.grid(visible=False)
    figure.colorbar(image, ax=list(axes), label="final held-out accuracy")
    return figure


def _drift(grid: Any) -> Any:
    """Sample size and mismatch of every run against S times the learning rate."""
    names = {"ess/token": "ESS, tokens", "ess/sequence": "ESS, trajectories", "mismatch/k3": "k3, nats a token"}
    figure, axes = panels(len(names))
    for axis, (name, title) in zip(axes, names.items(), strict=True):
        for index, preset in enumerate(grid.presets):
            points = [
                (lag * rate, value)
                for lag, rate in product(grid.lags, grid.rates)
                for value in grid.values(preset, lag, rate, name)
                if lag
            ]
            axis.plot(*zip(*points, strict=True), ".", color=f"C{index}", label=preset)
        axis.set(title=title, xlabel="S x learning rate", xscale="log")
        axis.legend(fontsize=7)
    axes[-1].set_yscale("log")
    return figure


def _curves(grid: Any) -> Any:
    """Held-out accuracy over the steps, at the best rate, one panel a lag; every seed."""
    figure, axes = panels(len(grid.lags), sharey=True)
    for axis, lag in zip(axes, grid.lags, strict=True):
        for index, preset in enumerate(grid.presets):
            rate = grid.rate_of(preset, lag)
            curves = [grid.cells[preset, lag, rate, seed]["curve"] for seed in grid.seeds]
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), color=f"C{index}", alpha=0.25, linewidth=0.8)
            steps = [step for step, _ in curves[0]]
            mean = np.mean([[accuracy for _, accuracy in curve] for curve in curves], axis=0)
            axis.plot(steps, mean, color=f"C{index}", label=f"{preset} {rate:g}")
        axis.set(title=f"lag {lag}", xlabel="learner step", ylabel="held-out accuracy, greedy", ylim=(-0.03, 1.03))
        axis.legend(fontsize=7)
    return figure


def _masks(grid: Any) -> Any:
    """Shares of tokens capped and removed, by the sign of the advantage, at the best rate."""
    figure, axes = panels(len(grid.presets), 3.4, sharey=True)
    for axis, preset in zip(axes, grid.presets, strict=True):
        for event, line in (("capped", "-"), ("trust", "--")):
            for sign, color in (("positive", "C2"), ("negative", "C3")):
                values = [
                    grid.values(preset, lag, grid.rate_of(preset, lag), f"clip/{event}_{sign}").mean()
                    for lag in grid.lags
                ]
                axis.plot(grid.lags, values, line, color=color, marker=".", label=f"{event}, {sign}")
        lag_axis(axis, grid.lags)
        axis.set(title=preset, ylabel="share of tokens")
        axis.legend(fontsize=7)
    return figure


def _gradients(grid: Any) -> Any:
    """Steadiness of the gradient at the best rate."""
    figure, axes = panels(2, 5)
    for axis, name, title in zip(
        axes,
        ("gradient_norm_cv", "gradient/cosine"),
        ("variation of the gradient norm", "cosine of successive gradients"),
        strict=True,
    ):
        for preset in grid.presets:
            values = [grid.values(preset, lag, grid.rate_of(preset, lag), name).mean() for lag in grid.lags]
            axis.plot(grid.lags, values, "o-", label=preset)
        lag_axis(axis, grid.lags)
        axis.set(title=title)
        axis.legend(fontsize=8)
    return figure


def _system(cells: Rows) -> Any:
    """The real system: accuracy over wall time, seconds a step, lags, utilisation."""
    figure, (curves, step_axis, lags, idle) = panels(4)
    bounds = sorted({cell["lag"] for cell in cells})
    shares = ["0", "1", "2", "3", "4", "more"]
    for index, bound in enumerate(bounds):
        runs = [cell["result"] for cell in cells if cell["lag"] == bound]
        for number, run in enumerate(runs):
            _, accuracy, seconds = zip(*run["curve"], strict=True)
            curves.plot(seconds, accuracy, color=f"C{index}", label=f"S = {bound}" if number == 0 else None)
        lags.bar(
            np.arange(len(shares)) + 0.8 * index / len(bounds),
            np.mean([run["lag_shares"] for run in runs], axis=0),
            0.8 / len(bounds),
            label=f"S = {bound}",
        )
        idle.bar(index - 0.2, 1 - np.mean([run["learner_idle"] for run in runs]), 0.4, color="C0")
        idle.bar(index + 0.2, 1 - np.mean([run["rollout_idle"] for run in runs]), 0.4, color="C1")
    for cell in cells:
        run = cell["result"]
        step_axis.plot(cell["lag"], run["loop_s"] / run["curve"][-1][0], "sC0")
    curves.set(title="layer B: accuracy over time", xlabel="loop seconds", ylabel="held-out accuracy")
    step_axis.set(title="seconds a step", xlabel="bound S", ylim=(0, None))
    lags.set(title="measured lag, share of tokens", xlabel="lag")
    lags.set_xticks(range(len(shares)), shares)
    idle.set(title="busy: learner (left), rollout (right)", xlabel="bound S")
    idle.set_xticks(range(len(bounds)), bounds)
    for axis in (curves, lags):
        axis.legend(fontsize=7)
    return figure


def _lags(cells: Rows) -> Any:
    """Measured lags by order of the buffer, one panel a bound."""
    bounds, orders = sorted({cell["lag"] for cell in cells}), list(dict.fromkeys(cell["order"] for cell in cells))
    shares = ["0", "1", "2", "3", "4", "more"]
    figure, axes = panels(len(bounds), 3.4, sharey=True)
    for axis, bound in zip(axes, bounds, strict=True):
        for index, order in enumerate(orders):
            runs = [c["result"]["lag_shares"] for c in cells if (c["lag"], c["order"]) == (bound, order)]
            places = np.arange(len(shares)) + 0.8 * index / len(orders)
            axis.bar(places, np.mean(runs, axis=0), 0.8 / len(orders), label=order)
        axis.set(title=f"layer B, bound S = {bound}", xlabel="lag", ylabel="share of tokens")
        axis.set_xticks(range(len(shares)), shares)
        axis.legend(fontsize=7)
    return figure


def _timeline(cells: Rows) -> Any:
    """Who works when, over the middle steps of the first run of each bound."""
    colors = {"step": "C0", "group": "C1", "update weights": "C3", "update": "C3", "evaluation": "C4"}
    first = {cell["lag"]: cell["result"]["busy"] for cell in reversed(cells)}
    figure, axes = panels(len(first), 5)
    for axis, bound in zip(axes, sorted(first), strict=True):
        lanes = sorted({lane for lane, *_ in first[bound]})
        for lane, name, begin, end in first[bound]:
            if name in colors:  # the rest is waiting
                axis.barh(lanes.index(lane), end - begin, 0.7, begin, color=colors[name], alpha=0.6)
        axis.set(title=f"layer B, bound S = {bound}", xlabel="seconds")
        axis.set_yticks(range(len(lanes)), lanes)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    names = ["step", "generate a group", "update weights", "", "evaluation"]
    shown = [(handle, name) for handle, name in zip(handles, names, strict=True) if name]
    axes[-1].legend(*zip(*shown, strict=True), fontsize=7)
    return figure
