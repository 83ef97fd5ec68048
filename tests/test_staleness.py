"""The control of admitted staleness: what moves it, how far, and how often."""

import pytest
from helpers import run

from asyncrl import assembly, job
from asyncrl import config as configuration
from asyncrl.monitor import metrics, timeline
from asyncrl.staleness import PATIENCE, StalenessControl

GOOD = {"ess/token": 0.99, "mismatch/k3": 0.002, "learner/idle": 0.2}


def decisions(control, row, num_steps):
    """The staleness after each step that changed it, by step."""
    changed = {}
    for step in range(num_steps):
        if control.decide({**GOOD, **row}) is not None:
            changed[step] = control.staleness
    return changed


def test_it_rises_to_its_bound_while_the_learner_waits_and_gives_each_change_time_to_show():
    changed = decisions(StalenessControl(1, 3), {}, 60)
    assert list(changed.values()) == [2, 3]
    first, second = changed
    assert first == PATIENCE - 1
    assert second == first + (2 + 1) + PATIENCE


@pytest.mark.parametrize("row", [{"ess/token": 0.85}, {"mismatch/k3": 0.06}])
def test_it_falls_to_its_bound_whatever_the_learner_does(row):
    control = StalenessControl(1, 3)
    control.staleness = 3
    assert list(decisions(control, {**row, "learner/idle": 0.0}, 60).values()) == [2, 1]


@pytest.mark.parametrize("row", [{"ess/token": 0.93}, {"mismatch/k3": 0.03}, {"learner/idle": 0.0}])
def test_it_stays_where_nothing_asks_for_a_change(row):
    assert decisions(StalenessControl(1, 3), row, 30) == {}


def test_a_decision_names_its_reasons():
    control = StalenessControl(0, 2)
    said = [control.decide(GOOD) for _ in range(PATIENCE)]
    assert said[:-1] == [None] * (PATIENCE - 1)
    assert said[-1] == ("staleness 0 -> 1: over 4 steps ess/token 0.990, mismatch/k3 0.0020, learner idle 20%")


def test_a_run_moves_its_staleness_and_keeps_the_bound(tmp_path):
    words = [
        "runtime=local",
        "num_steps=14",
        "env.path=helpers:Sevens",
        "rollout.max_new_tokens=8",
        "rollout.group_size=4",
        "learner.groups_per_step=4",
        "learner.learning_rate=0",
        "eval.num_prompts=8",
        "eval.every=0",
        f"run_dir={tmp_path}",
        "buffer.max_staleness=auto",
        "buffer.staleness_bounds=[0, 2]",
    ]
    config = configuration.load(None, words)
    result = run(job.train(config, quiet=True))
    rows = [row for row in metrics.read(result.folder) if "buffer/staleness" in row]
    # Without a change of weights every sample is the policy's own, and at staleness 0 the learner waits for each batch.
    assert rows[0]["buffer/staleness"] == 0
    assert rows[PATIENCE]["buffer/staleness"] == 1
    assert max(row["lag/max"] for row in rows) <= assembly.make_buffer(config).max_lag
    worth = [row["rollout/tokens_per_s"] * row["ess/token"] for row in rows]
    assert [row["rollout/effective_tokens_per_s"] for row in rows] == pytest.approx(worth, rel=1e-4)
    assert max(worth) > 0
    marks = [span for span in timeline.read(result.folder / "timeline.jsonl")[0] if span.name == "staleness"]
    assert marks[0].facts["decision"].startswith("staleness 0 -> 1: over 4 steps ess/token 1.000")


@pytest.mark.parametrize("bounds", ["[3, 1]", "[-1, 2]"])
def test_bounds_out_of_order_are_refused(bounds):
    with pytest.raises(ValueError, match="0 <= lowest <= highest"):
        configuration.load(None, ["buffer.max_staleness=auto", f"buffer.staleness_bounds={bounds}"])


def test_an_uncorrected_loss_cannot_have_its_staleness_raised():
    with pytest.raises(ValueError, match=r"buffer\.max_staleness is auto"):
        configuration.load(None, ["buffer.max_staleness=auto", "algorithm.preset=reinforce"])
