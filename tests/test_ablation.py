"""The statistics of the staleness ablation."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

from staleness_report import Grid, holm, p_value


def test_holm_steps_down_from_the_smallest():
    """Four p-values by hand: 4 x 0.01, 3 x 0.02, 2 x 0.04 and 1 x 0.03 raised to the one before it."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_has_a_small_p_value_if_every_seed_agrees():
    assert p_value(np.array([0.1, 0.2, 0.15, 0.12, 0.3])) < 0.001
    assert p_value(np.array([-0.1, -0.2, -0.15, -0.12, -0.3])) < 0.001
    assert p_value(np.array([0.1, -0.2, 0.15, -0.12, 0.05])) > 0.5
    assert p_value(np.zeros(5)) == 1


def test_a_learning_rate_is_not_chosen_by_the_seed_that_it_scores():
    """Rate 2 is best for seed 0 alone, which is therefore scored at rate 1."""
    finals = {(1.0, 0): 0.5, (1.0, 1): 0.6, (1.0, 2): 0.6, (2.0, 0): 0.9, (2.0, 1): 0.1, (2.0, 2): 0.1}
    cells = [
        {"preset": "p", "lag": 0, "learning_rate": rate, "seed": seed, "result": {"final": final}}
        for (rate, seed), final in finals.items()
    ]
    assert Grid(cells).tuned("p", 0).tolist() == [0.5, 0.6, 0.6]
