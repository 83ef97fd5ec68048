"""What happens to a run is told when it happens, on a clock that no clock step moves."""

import time

import pytest

from asyncrl.monitor import events, metrics, timeline
from asyncrl.monitor.events import Events

EVALUATION = {"eval/accuracy": 0.5, "eval/low": 0.4, "eval/high": 0.6}


def test_events_are_on_disk_as_they_happen_and_go_to_the_listeners(tmp_path):
    heard = []
    told = Events(tmp_path)
    told.listen(heard.append)
    told.emit("death", "rollout 2 died", subject="rollout 2", cause="signal 9", where=tmp_path)
    told.emit("note", "all is well")
    assert [event.line for event in heard] == ["alarm: rollout 2 died", "all is well"]
    first, second = events.read(tmp_path)
    assert (first.kind, first.subject, first.alarm) == ("death", "rollout 2", True)
    assert first.facts == {"cause": "signal 9", "where": str(tmp_path)}
    assert second.run_s >= first.run_s
    with pytest.raises(RuntimeError, match="no kind"):
        told.emit("deaht", "")


def test_half_a_line_and_lines_of_another_schema_cost_those_alone(tmp_path):
    (tmp_path / events.NAME).write_text('{"kind": "of old"}\nnothing\n{"run_s": 3.0, "timest')
    told = Events(tmp_path)
    told.emit("note", "again")
    assert [event.message for event in events.read(tmp_path)] == ["again"]


def test_a_disk_that_is_full_ends_no_run_and_is_known(monkeypatch, tmp_path):
    told, heard = Events(tmp_path), []
    told.listen(heard.append)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events.os, "write", full)
    told.emit("note", "goes to the listeners")
    assert heard[0].message == "goes to the listeners"
    assert told.error.errno == 28


def test_a_clock_that_is_set_back_moves_no_duration(monkeypatch, tmp_path):
    with metrics.Metrics(tmp_path, 9, quiet=True) as sink:
        sink.evaluation(0, EVALUATION)
        monkeypatch.setattr(time, "time", lambda: 5.0)  # 1970
        sink.evaluation(1, EVALUATION)
        sink.timeline.mark("buffer", "drop")
        sink.event("note", "later")
    with metrics.Metrics(tmp_path, 9, first_step=1, quiet=True) as sink:
        sink.evaluation(2, EVALUATION)
        sink.timeline.mark("buffer", "drop")
        sink.event("note", "resumed")
    times = [row["time"] for row in metrics.read(tmp_path)]
    assert sorted(times) == times
    assert max(times) < 60
    assert [row["timestamp"] for row in metrics.read(tmp_path)][1:] == [5.0, 5.0]
    spans, _ = timeline.read(tmp_path / "timeline.jsonl")
    for clock in ([span.end_s for span in spans], [event.run_s for event in events.read(tmp_path)]):
        assert sorted(clock) == clock
        assert max(clock) < 60
