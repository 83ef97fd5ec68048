"""The report of the staleness ablation: tables, and the file of everything that was measured.

Differences are called by the p-values of paired t-tests, with Holm's correction over all comparisons of the table.
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

import mismatch
import numpy as np
import plots
import time_to_target
from seed_statistics import Cell, Grid, holm, interval, p_value, table

_LEVEL = 0.05
_FEWEST_SEEDS = 5
"""With fewer seeds a t-test is only as good as its premise, which accuracies near 1 break: that values are normal."""


def write(cells: Sequence[Cell], settings: dict[str, Any], folder: Path) -> str:
    """Writes staleness.json, staleness.md and the plots; returns the Markdown."""
    of_layer = {layer: [cell for cell in cells if cell["layer"] == layer] for layer in ("probe", "a", "noise", "b")}
    probes = [row for cell in of_layer["probe"] for row in cell["result"]]
    system, target = of_layer["b"], settings["target"]
    grid = Grid(of_layer["a"]) if of_layer["a"] else None
    noise = mismatch.NoiseGrid(of_layer["noise"], of_layer["a"]) if of_layer["noise"] and grid else None
    parts = [_head(settings, cells)]
    if probes:
        parts.append(_probe_table(probes))
    if grid:
        parts += [_lag_table(grid), *([_difference_table(grid)] if len(grid.presets) > 1 else []), _drift_table(grid)]
        parts.append(time_to_target.lag_table(grid, target, settings["samples_per_step"]))
    if noise:
        parts.append(mismatch.noise_table(noise))
        mismatch.draw(noise, folder)
    if system:
        parts += [_system_table(system), time_to_target.system_table(system, target)]
    if grid:
        parts.append(_short_table(grid))
    text = "\n\n".join(parts) + "\n"
    (folder / "staleness.md").write_text(text)
    (folder / "staleness.json").write_text(json.dumps({"settings": settings, "cells": list(cells)}))
    plots.draw(probes, grid, system, folder)
    time_to_target.draw(grid, system, target, folder)
    return text


def _head(settings: dict[str, Any], cells: Sequence[Cell]) -> str:
    words = " ".join(word for word in settings["words"] if not word.startswith("run_dir="))
    return (
        f"Measured {time.strftime('%Y-%m-%d')} on {os.cpu_count()} {platform.machine()} cores, {settings['config']} "
        f"with `{words}`. {len(cells)} cells, {sum(cell['cpu_s'] for cell in cells):.0f} CPU seconds, "
        f"{sum(cell['wall_s'] for cell in cells):.0f} s on the clock one after another."
    )


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
    return "**Gradient probe**\n\n" + table(head, body)


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
    return "**Layer A: controlled lag**, held-out accuracy\n\n" + table([*head, "collapsed, all rates"], body)


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
        body.append(
            [
                preset,
                str(lag),
                f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]",
                f"{p:.3f}" if p >= 0.001 else "< 0.001",
                verdict,
            ]
        )
    return f"**Against {first}**, paired by seed, final accuracy\n\n" + table(
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
    return "**Health**, mean over seeds and the second half of the steps\n\n" + table(
        [*head, "gradient norm CV", "gradient cosine"], body
    )


def _short_table(grid: Grid) -> str:
    """Layer A in one glance: final accuracy, collapses and token KL, at the best rate."""
    body = []
    for preset in grid.presets:
        row = [preset]
        for lag in grid.lags:
            rate = grid.rate_of(preset, lag)
            final, k3 = (grid.values(preset, lag, rate, name).mean() for name in ("final", "mismatch/k3"))
            collapsed = int(grid.values(preset, lag, rate, "collapsed").sum())
            row.append(f"{final:.3f}{f', {collapsed} collapsed' if collapsed else ''} (k3 {k3:.1e})")
        body.append(row)
    return f"**In short**: layer A, final accuracy at the best rate, mean of {len(grid.seeds)} seeds\n\n" + table(
        ["preset", *(f"S = {lag}" for lag in grid.lags)], body
    )


def _system_table(cells: Sequence[Cell]) -> str:
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["preset"], cell["order"], cell["lag"]), []).append(cell["result"])
    body = []
    for (preset, order, bound), runs in sorted(groups.items()):

        def mean(name: str, runs: list[Cell] = runs) -> float:
            return float(np.mean([run[name] for run in runs]))

        body.append(
            [
                preset,
                order,
                str(bound),
                f"{mean('lag_mean'):.2f} / {max(run['lag_max'] for run in runs):.0f}",
                f"{mean('final'):.3f}",
                f"{mean('loop_s'):.1f}",
                f"{mean('tokens_per_s'):.0f}",
                f"{mean('effective_tokens_per_s'):.0f}",
                f"{mean('learner_idle'):.0%} / {mean('rollout_idle'):.0%}",
                f"{mean('sync_s'):.3f}",
            ]
        )
    head = ["preset", "order", "bound S", "lag mean / max", "final", "loop s", "tokens/s", "tokens/s x ESS"]
    head += ["idle learner / rollout", "weights exposed, s"]
    return "**Layer B: the asynchronous system**\n\n" + table(head, body)
