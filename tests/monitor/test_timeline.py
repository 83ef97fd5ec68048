"""Spans survive what happens to a run, and the waits of a step are the ones that took place."""

import json
import math
from pathlib import Path

import pytest

from asyncrl.monitor import timeline
from asyncrl.monitor.bottleneck import METRICS, blame, takes_turns, told, waits
from asyncrl.monitor.metrics import verdict
from asyncrl.monitor.timeline import Span, Timeline


def test_spans_come_back_as_they_were_recorded(tmp_path):
    path = tmp_path / "timeline.jsonl"
    line = Timeline(path)
    with line.span("learner", "step", version=3) as facts:
        line.count("buffer", "ready", 5)
        facts["loss"] = 0.5
    with pytest.raises(KeyError), line.span("rollout 0", "group", prompt=1):
        raise KeyError
    line.close()
    (count, step, failed), num_damaged = timeline.read(path)
    assert num_damaged == 0
    assert (step.lane, step.name, step.facts) == ("learner", "step", {"version": 3, "loss": 0.5})
    assert step.begin_s <= count.begin_s == count.end_s <= step.end_s <= failed.begin_s
    assert count.facts == {"value": 5}
    assert failed.facts == {"prompt": 1, "error": "KeyError"}


def test_half_a_line_of_a_killed_run_costs_that_line_only(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", None)  # the file of a long run is large
    path = tmp_path / "timeline.jsonl"
    first = Timeline(path)
    first.mark("buffer", "drop", reason="zero variance")
    first.close()
    with path.open("ab") as file:
        file.write(b'{"lane":"learner","na')
    assert [len(part) if isinstance(part, list) else part for part in timeline.read(path)] == [1, 1]
    resumed = Timeline(path)
    resumed.mark("buffer", "drop", reason="again")
    resumed.close()
    spans, num_damaged = timeline.read(path)
    assert ([span.facts["reason"] for span in spans], num_damaged) == (["zero variance", "again"], 1)


def test_open_spans_count_until_now_and_old_ones_are_forgotten():
    line = Timeline()
    line.mark("learner", "old")
    begin = line.now()
    with line.span("rollout 0", "group"):
        (span,) = [span for span in line.since(begin) if span.begin_s >= begin]
        assert span.name == "group"
        assert span.end_s >= span.begin_s
    assert [span.name for span in line.since(begin)] == ["group"]


def test_overlapping_intervals_are_covered_once():
    intervals = [(1.0, 3.0), (2.0, 4.0), (2.5, 2.6), (8.0, 20.0), (-5.0, 0.5)]
    assert timeline.covered_s(intervals, 0.0, 10.0) == pytest.approx(0.5 + 3 + 2)
    assert timeline.covered_s([], 0.0, 10.0) == 0.0


def test_the_waits_of_a_step():
    """Window 0..10. Learner: 3 s for groups (1 s earlier), 1 s update. Actor 0 busy 5 s, actor 1 9 s."""
    spans = [
        Span("learner", "wait for groups", -1, 3),
        Span("learner", "step", 3, 8),
        Span("learner", "wait for weights", 8, 9),
        Span("learner", "checkpoint", 9, 9.5),
        Span("learner", "update evaluators", 9.5, 9.75),
        Span("evaluator 0", "evaluation", 9.75, 20),
        Span("rollout 0", "alive", -20, 30),
        Span("rollout 1", "alive", -20, 30),
        Span("rollout 0", "group", 0, 4),
        Span("rollout 0", "group", 1, 3),
        Span("rollout 0", "update", 8, 9, {"pause_s": 0.6}),
        Span("rollout 1", "evaluation", 0, 2),
        Span("rollout 1", "group", 1, 9),
        Span("rollout 1", "update", 8, 9, {"pause_s": 0.2}),
    ]
    found = waits(spans, 0, 10, num_actors=2)
    assert list(found) == list(METRICS)
    assert found == pytest.approx(
        {
            "wait/learner_for_groups_s": 3,
            "wait/learner_for_weights_s": 1,
            "wait/learner_for_checkpoint_s": 0.5,
            "wait/learner_for_evaluation_s": 0.25,
            "wait/outage_s": 0,
            "wait/rollout_for_slots_s": (5 + 1) / 2,
            "wait/rollout_for_weights_s": 0.4,
            "wait/rollout_for_evaluation_s": 1,
            "wait/window_s": 10,
        }
    )
    assert told(found) == (
        "learner for groups 3.00 s, rollouts for slots 3.00 s, learner for weights 1.00 s, "
        "rollouts in evaluation 1.00 s, learner for a checkpoint 0.50 s"
    ), "the others took less than a twentieth of the 10 s"
    assert told({"wait/window_s": 10, "wait/learner_for_groups_s": 0.4, "wait/rollout_for_slots_s": None}) == "none"


def test_without_lanes_of_actors_their_waits_are_unknown():
    found = waits([Span("learner", "step", 0, 1)], 0, 1, num_actors=2)
    assert math.isnan(found["wait/rollout_for_slots_s"])
    assert found["wait/learner_for_groups_s"] == 0


def row(*, groups=0.0, slots=0.0, weights=0.0, idle=0.0, actors=2.0, held=0.0, staleness=4, **others):
    window = dict.fromkeys(METRICS, 0.0) | {"wait/window_s": 10.0}
    window |= {"wait/learner_for_groups_s": groups, "wait/rollout_for_slots_s": slots}
    window |= {"wait/learner_for_weights_s": weights}
    window |= {f"wait/{name}_s": seconds for name, seconds in others.items()}
    return window | {
        "rollout/num_actors": actors,
        "buffer/staleness": staleness,
        "rollout/idle": idle,
        "rollout/held": held,
        "time/step_s": 10 - groups - weights,
        "time/sync_s": weights,
    }


@pytest.mark.parametrize(
    ("step", "words", "balanced"),
    [
        # Two actors always busy for a learner that works 6.2 of 10 s: 2 / 0.62 = 3.2 actors would keep it busy.
        (row(groups=3.8), "the learner waited 38% of the time for groups: set rollout.num_actors=4 (now 2)", 4),
        (row(groups=3.8, held=0.2), "held the rollout actors' threads 20% of the time: put what blocks there into", 4),
        # Three actors busy a quarter of the time: one would do.
        (row(slots=7.5, idle=0.75, actors=3.0), "rollout.num_actors=1 would do (now 3)", 1),
        (row(slots=3.0, idle=0.1, actors=1.0), "give the learner more (learner.num_gpus", 1),
        (row(weights=2.0), "weight updates took 20% of the time: raise learner.groups_per_step", 2),
        (row(groups=4.0, slots=3.0, idle=0.3), "in turns: raise buffer.window, or buffer.max_staleness (now 4)", 3),
        (row(groups=4.0, slots=3.0, idle=0.3, staleness=0), "as buffer.max_staleness is 0: raise it, with a preset", 3),
        (row(groups=0.5, slots=0.4), "the system is balanced", 3),
        (
            row(learner_for_checkpoint=3.0),
            "the learner wrote checkpoints for 30% of the time: raise checkpoint",
            2,
        ),
        (row(learner_for_evaluation=3.0), "weights to evaluators for 30% of the time: raise eval.every", 2),
        (row(groups=3.8, rollout_for_evaluation=2), "evaluations were in the engines 20% of the time: raise eval", 4),
    ],
)
def test_the_advice_names_who_waits_and_what_to_change(step, words, balanced):
    found = blame([step] * 5)
    assert words in found.sentence
    assert found.balanced_actors == balanced


def test_the_bound_is_the_work_of_the_busier_side():
    found = blame([row(groups=3.8, idle=0.1), row(groups=3.8, idle=0.3)] * 3)
    assert found.bound == (
        "80% of the ideal overlap: a step took 10 s, of which the busier side, the rollout actors, worked 8 s"
    )
    assert blame([row(weights=3.0, idle=0.9)] * 5).bound.startswith("70%"), "a weight update is no work of a side"


def test_the_verdict_leaves_the_steps_out_in_which_kernels_are_compiled(tmp_path):
    rows = [row(groups=9.0, idle=0.95)] * 2 + [row(groups=3.8, idle=0.2)] * 18 + [row(groups=3.0)] * 5
    lines = (json.dumps(one | {"reward/mean": 0.0, "version": step}) for step, one in enumerate(rows, 1))
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert verdict(tmp_path).bound.startswith("84%")
    assert verdict(tmp_path, after=20).bound.startswith("100%"), "what a resumed run did before it was changed"


def test_few_steps_no_blame():
    assert blame([]) is None
    assert blame([row(groups=3.8)] * 4) is None


def test_who_takes_turns_on_purpose_is_not_told_to_admit_more():
    found = blame([row(groups=4.0, slots=3.0, idle=0.3)] * 5, turns=takes_turns({"rollout": {"release_memory": True}}))
    assert "in turns, as rollout.release_memory has it" in found.sentence
    assert "raise" not in found.sentence


def test_the_trace_pairs_overlapping_groups_and_keeps_lanes():
    spans = [
        Span("rollout 0", "group", 10.0, 12.0, {"prompt": 1}),
        Span("rollout 0", "group", 11.0, 13.0, {"prompt": 2}),
        Span("learner", "step", 10.5, 11.5),
        Span("buffer", "ready", 12.0, 12.0, {"value": 1}),
        Span("buffer", "drop", 12.5, 12.5),
    ]
    events = json.loads(json.dumps(timeline.perfetto(spans)))["traceEvents"]
    begins = {event["id"]: event["ts"] for event in events if event["ph"] == "b"}
    ends = {event["id"]: event["ts"] for event in events if event["ph"] == "e"}
    assert sorted(ends[key] - begin for key, begin in begins.items()) == [2_000_000, 2_000_000]
    (step,) = [event for event in events if event["ph"] == "X"]
    assert (step["ts"], step["dur"]) == (500_000, 1_000_000)
    assert {event["ph"] for event in events} == {"M", "b", "e", "X", "C", "i"}
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {1: "learner", 2: "buffer", 3: "rollout 0"}, "in the order of the lanes, none of them 0"


def test_lanes_are_in_order():
    lanes = [
        "evaluator 0",
        "something new",
        "rollout 10",
        "rollout 2",
        "evaluation",
        "buffer",
        "weight sync",
        "learner",
    ]
    expected = ["learner", "weight sync", "buffer", "evaluation", "rollout 2", "rollout 10", "evaluator 0"]
    assert sorted(lanes, key=timeline.lane_order) == [*expected, "something new"]
