"""The staleness ablation: its statistics, what it measures and in which order, and its two small devices."""

import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench" / "staleness"))

import ablation
import mismatch
import plots
import report
import time_to_target
from cells import Cell, lag_cells
from controlled_lag import AVERAGED, Ring, assign
from engine_noise import EngineNoise
from mismatch import NoiseGrid
from seed_statistics import Grid, Times, holm, interval, p_value
from time_to_target import Bound

from asyncrl.config import loading as configuration
from asyncrl.models.loading import load_model
from asyncrl.models.tiny import build_tiny


def test_holm_steps_down_from_the_smallest():
    """Four p-values by hand: 4 x 0.01, 3 x 0.02, 2 x 0.04 and 1 x 0.03 raised to the one before it."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("num_seeds", [2, 5, 8])
def test_chance_is_called_a_difference_as_often_as_is_said(num_seeds):
    draws = np.random.default_rng(0).normal(size=(1000, num_seeds))
    assert np.mean([p_value(values) < 0.05 for values in draws]) == pytest.approx(0.05, abs=0.01)
    held = [low <= 0 <= high for low, high in map(interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.01)


def test_a_difference_that_every_seed_has_is_called():
    assert p_value(np.array([0.1, 0.2, 0.15, 0.12, 0.3])) == pytest.approx(0.0082, abs=1e-4)
    assert p_value(np.array([-0.1, -0.2, -0.15, -0.12, -0.3])) == pytest.approx(0.0082, abs=1e-4)
    assert p_value(np.array([0.1, -0.2, 0.15, -0.12, 0.05])) > 0.5
    assert p_value(np.zeros(5)) == 1
    assert p_value(np.full(5, 0.5)) == 0
    assert interval(np.array([0.5])) == (0.5, 0.5)
    assert p_value(np.array([0.5])) == 1


def test_a_learning_rate_is_not_chosen_by_the_seed_that_it_scores():
    """Rate 2 is best for seed 0 alone, which is therefore scored at rate 1."""
    finals = {(1.0, 0): 0.5, (1.0, 1): 0.6, (1.0, 2): 0.6, (2.0, 0): 0.9, (2.0, 1): 0.1, (2.0, 2): 0.1}
    cells = [
        {"preset": "p", "lag": 0, "learning_rate": rate, "seed": seed, "result": {"final": final}}
        for (rate, seed), final in finals.items()
    ]
    assert Grid(cells).tuned("p", 0).tolist() == [0.5, 0.6, 0.6]


@pytest.mark.parametrize(
    ("values", "reached", "median"),
    [
        ((10, 20, 30), (True, True, True), 20),
        ((10, 60, 60), (True, False, False), None),
        ((10, 60, 30), (True, False, True), 30),
        # By hand: 3/4 are left after 10, the run of 15 ends unseen, then half of the two at risk: 3/8.
        ((10, 15, 20, 60), (True, False, True, False), 20),
        ((60,), (False,), None),
    ],
)
def test_the_median_counts_runs_that_never_get_there(values, reached, median):
    assert Times(values, reached).median == median


def test_the_time_to_a_target_lies_between_two_evaluations():
    curves = [[(0, 0.2), (10, 0.6), (20, 1.0)], [(0, 0.2), (10, 0.4), (20, 0.5)], [(0, 0.9), (10, 1.0)]]
    times = Times.of(curves, 0.8)
    assert times.values == pytest.approx((15, 20, 0))
    assert times.reached == (True, False, True)
    assert times.text() == "15 (2/3)"


def test_the_factors_of_the_time_to_target_multiply_to_it():
    """Twice as fast a step and half as many steps again: four thirds as fast, as evaluations are on a regular grid."""

    def run(step_s, steps):
        return {"curve": [(0, 0.0, 0.0), (steps, 0.8, steps * step_s), (60, 0.8, 60 * step_s)], "loop_s": 60 * step_s}

    base, stale = Bound.of([run(0.2, 20)] * 3, 0.8), Bound.of([run(0.1, 30)] * 3, 0.8)
    factors = stale.factors(base)
    assert factors == pytest.approx({"gain": 2.0, "loss": 1.5, "both": 4 / 3, "measured": 4 / 3})
    never = Bound.of([run(0.1, 30)] * 3, 0.9)
    assert math.isnan(never.factors(base)["both"])


def test_noise_is_compared_with_the_same_rate_and_seeds():
    def cell(layer, rate, seed, final, **more):
        result = {"final": final, "k3_first": 0.01 * bool(more)}
        return {"layer": layer, "preset": "p", "lag": 0, "learning_rate": rate, "seed": seed, "result": result} | more

    clean = [cell("a", rate, seed, rate) for rate in (1.0, 2.0) for seed in (0, 1, 2)]
    grid = NoiseGrid([cell("noise", 1.0, seed, 0.5, noise=0.3) for seed in (0, 1)], clean)
    assert grid.seeds == [0, 1]
    assert grid.noises == [0.0, 0.3]
    assert grid.values(0.0, "p", 0).tolist() == [1.0, 1.0]
    assert grid.start(0.3) == pytest.approx(0.01)


def test_the_table_for_one_gpu_is_that_of_its_documentation(tmp_path):
    options = ablation.parse(["--gpu", "--out", str(tmp_path)])
    cells = lag_cells(options)
    assert len(cells) == len({cell.name for cell in cells}) == 4 * 3 * 3
    assert [cell.key["seed"] for cell in cells] == [0] * 12 + [1] * 12 + [2] * 12
    for cell in cells:
        words, config_path, lag, noise = cell.arguments
        config = configuration.load(config_path, words)
        assert (config.seed, lag, noise) == (cell.key["seed"], cell.key["lag"], 0)
        assert config.num_steps > 2 * max(options.staleness)
        assert config.eval.max_running >= config.eval.num_prompts


def test_noise_is_measured_at_the_lowest_rate_beside_the_grid_without(tmp_path):
    words = ["--engine-noise", "0,0.5", "--preset-list", "tis2", "--staleness", "0,4", "--seeds", "1"]
    cells = lag_cells(ablation.parse([*words, "--out", str(tmp_path)]))
    noisy = [cell for cell in cells if cell.key["layer"] == "noise"]
    assert len(cells) - len(noisy) == 4
    assert [(cell.key["lag"], cell.key["learning_rate"], cell.arguments[-1]) for cell in noisy] == [
        (0, 2e-4, 0.5),
        (4, 2e-4, 0.5),
    ]
    with pytest.raises(SystemExit):
        ablation.parse([*words, "--layers", "b"])


def cells_of(*places):
    return [Cell({"layer": "a", "preset": preset, "seed": seed}, math.log1p, (0.0,)) for preset, seed in places]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of results; cells are measured in threads, which start at once."""
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    (tmp_path / "cells").mkdir()
    return tmp_path


def measured(cells, folder):
    return [ablation.path_of(cell, folder).exists() for cell in cells]


def test_a_cell_that_would_end_too_late_is_not_begun(folder, monkeypatch):
    cells = cells_of(("x", 0), ("x", 1), ("y", 1))
    ablation.measure(cells, folder, 1, until=time.monotonic() - 1)
    assert measured(cells, folder) == [False] * 3
    monkeypatch.setattr(ablation, "timed", lambda call, *arguments: (call(*arguments), 0.0, 1e6))
    ablation.measure(cells, folder, 1, until=time.monotonic() + 1e5)
    assert measured(cells, folder) == [True, False, False], "the first took longer than is left"
    ablation.measure(cells, folder, 1)
    assert measured(cells, folder) == [True] * 3


def test_only_complete_seeds_are_reported(folder):
    cells = cells_of(("x", 0), ("y", 0), ("x", 1), ("y", 1))
    ablation.measure(cells[:3], folder, 2)
    assert [(row["preset"], row["seed"]) for row in ablation.finished(cells, folder)] == [("x", 0), ("y", 0)]


def test_a_cell_that_fails_stops_the_run_and_keeps_the_others(folder):
    cells = cells_of(("x", 0), ("x", 1))
    bad = Cell({"layer": "a", "preset": "z", "seed": 0}, math.log1p, (-2,))
    with pytest.raises(RuntimeError, match="cell a-z-0 failed"):
        ablation.measure([cells[0], bad, cells[1]], folder, 1)
    assert measured(cells, folder) == [True, False]


def lag_result(final):
    names = (*AVERAGED, "auc", "entropy", "gradient_norm_cv")
    curve = [(0, 0.0), (10, final), (20, final)]
    return dict.fromkeys(names, 0.25) | {"final": final, "curve": curve, "collapsed": final < 0.5, "k3_first": 0.001}


def system_result(step_s):
    names = ("lag_mean", "lag_max", "tokens_per_s", "effective_tokens_per_s", "learner_idle", "rollout_idle", "sync_s")
    curve = [(step, 0.05 * step, step * step_s) for step in (0, 10, 20)]
    return dict.fromkeys(names, 0.5) | {"final": 0.9, "curve": curve, "loop_s": 20 * step_s}


def test_the_report_has_a_table_for_everything_that_was_measured(tmp_path, monkeypatch):
    for module in (plots, time_to_target, mismatch):
        monkeypatch.setattr(module, "draw", lambda *_: None)
    shared = {"learning_rate": 1e-4, "cpu_s": 1.0, "wall_s": 2.0}
    finals = {("p", 0): 0.9, ("p", 4): 0.8, ("q", 0): 0.9, ("q", 4): 0.4}
    cells = [
        {"layer": layer, "preset": preset, "lag": lag, "seed": seed, "result": lag_result(final - 0.1 * noise)}
        | shared
        | ({"noise": noise} if noise else {})
        for (preset, lag), final in finals.items()
        for layer, noise in (("a", 0), ("noise", 1))
        for seed in (0, 1)
    ] + [
        {"layer": "b", "preset": "p", "lag": lag, "seed": 0, "order": "fifo", "result": system_result(step_s)} | shared
        for lag, step_s in ((0, 0.2), (1, 0.1))
    ]
    settings = {"words": ["num_steps=20", "run_dir=x"], "config": "c.toml", "target": 0.8, "samples_per_step": 64}
    text = report.write(cells, settings, tmp_path)
    assert "`num_steps=20`. 18 cells, 18 CPU seconds, 36 s on the clock" in text
    assert "| q | 4 | not reached (0/2) |" in text
    assert "| 1.0e-03 | q | 2.5e-01 | 0.800 (-0.100 [-0.100, -0.100]) | 0.300, 2 collapsed (" in text
    assert "| p | fifo | 1 | 1.6 (1/1) | 16 (1/1) | 0.100 | 2.00 | 1.00 | 2.00 | 2.00 |" in text
    assert text.endswith("| q | 0.900 (k3 2.5e-01) | 0.400, 2 collapsed (k3 2.5e-01) |\n")
    assert json.loads((tmp_path / "staleness.json").read_text())["cells"] == json.loads(json.dumps(cells))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tiny(folder, seed=0)
    return load_model(folder, dtype=torch.float32, device="cpu")


def test_a_ring_keeps_the_last_weights_and_gives_them_back(model):
    ring = Ring(model, 2, torch.float32)
    name, parameter = next(iter(model.named_parameters()))
    seen = []
    for _ in range(3):
        ring.push()
        seen.append(parameter.detach().clone())
        with torch.no_grad():
            parameter += 1
    assert len(ring) == 2
    assert torch.equal(ring.newest[name], seen[2])
    assert torch.equal(ring.oldest[name], seen[1])
    assign(model, ring.oldest)
    assert torch.equal(parameter, seen[1])


def test_noise_belongs_to_version_position_and_token_and_leaves_an_evaluation_alone(tmp_path):
    build_tiny(tmp_path, seed=0)
    noisy, plain = (load_model(tmp_path, dtype=torch.float32, device="cpu") for _ in range(2))
    noise = EngineNoise(noisy, 0.5, 8, seed=3)

    def added(positions, version):
        noise.draw(version)
        ids = torch.ones(len(positions), len(positions[0]), dtype=torch.long)
        words = {"input_ids": ids, "position_ids": torch.tensor(positions), "logits_to_keep": 1}
        with torch.no_grad():
            return (noisy(**words).logits - plain(**words).logits)[:, -1]

    two = added([[0, 1], [1, 2]], 0)
    torch.testing.assert_close(two, added([[0, 1], [1, 2]], 0))
    torch.testing.assert_close(two[0], added([[1]], 0)[0], atol=1e-5, rtol=0)
    assert (two[0] - two[1]).abs().max() > 0.1
    assert (two - added([[0, 1], [1, 2]], 1)).abs().max() > 0.1
    assert two.std() == pytest.approx(0.5, rel=0.3)
    noise.active = False
    assert added([[0, 1]], 0).abs().max() == 0
