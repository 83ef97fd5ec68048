"""Reading metrics.jsonl: whatever a power cut or a person left in it, and however long it is."""

import json
import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.monitor import metrics, rows, view
from asyncrl.monitor.course import Course, Curve, Follower

BAD = [
    b"\0" * 5000,
    b"{",
    b"",
    b"5",
    b"[1]",
    b'{"version": "1"}',
    b'{"time": 1.0}',
    b'{"version": 3, "reward/mean": "high"}',
    b'{"version": 3, "reward/mean": {}}',
    b'{"version": true}',
    b"\xff\xfe",
    b"[" * 100_000,
]


def line(version, **more):
    return json.dumps({"version": version, "time": 2.0 * version, **more}).encode()


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_left_out_and_told_by_file_and_line_wherever_rows_are_read(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([line(1), bad, line(2), b"{torn"]))
    damage = rows.Damage(path)
    assert [row["version"] for row in rows.read(path, damage)] == [1, 2]
    assert str(damage) == f"{path}: 1 line cannot be read and is left out, the first is line 2"
    with pytest.warns(UserWarning, match="line 2"):
        assert [row["version"] for row in metrics.read(tmp_path)] == [1, 2]
    follower = Follower(path, (), 5)
    follower.read()
    assert str(follower.damage) == str(damage)


def test_numbers_that_are_none_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"version": 1, "a/b": Infinity, "a/c": -Infinity, "a/d": null, "note": "x"}\n')
    (row,) = rows.read(path)
    assert row == {"version": 1, "a/b": math.inf, "a/c": -math.inf, "a/d": None, "note": "x"}


def test_what_is_no_file_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(rows.read(path)) == []
    path.symlink_to(tmp_path / "elsewhere")
    for read in (lambda: list(rows.read(path)), lambda: rows.cut(path, 1)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl is no file .*: remove it"):
            read()
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is no file"):
        list(rows.read(path))


@given(
    st.lists(st.one_of(st.integers(0, 9), st.just(b"bad"), st.just(b'{"version": 1')), max_size=12),
    st.integers(0, 9),
    st.booleans(),
)
def test_a_cut_leaves_the_rows_of_earlier_steps_and_nothing_of_later_ones(tmp_path_factory, items, version, torn):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    lines = [item if isinstance(item, bytes) else line(item) for item in items]
    path.write_bytes(b"".join(part + b"\n" for part in lines) + b'{"version": 0, "to' * torn)
    last_s, damage = rows.cut(path, version)
    kept = [item for item in items if not isinstance(item, bytes) and item <= version]
    assert [row["version"] for row in rows.read(path)] == kept
    assert last_s == max((2.0 * number for number in kept), default=0.0)
    assert damage.count == sum(isinstance(item, bytes) for item in items)
    content = path.read_bytes()
    assert content == b"" or content.endswith(b"\n"), "the next row begins a line"


def test_a_file_that_needs_no_cut_stays_the_file_that_others_follow(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"\n" + line(2) + b"\n{torn")
    before = path.stat().st_ino
    rows.cut(path, 2)
    assert path.stat().st_ino == before
    rows.cut(path, 1)
    assert path.stat().st_ino != before
    assert path.read_bytes() == line(1) + b"\n"


def test_a_cut_and_a_view_hold_little_of_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    names = {f"area/metric_{number}": number / 7 for number in range(100)} | {"reward/mean": 0.5}
    with path.open("wb") as file:
        file.writelines(line(version, **names) + b"\n" for version in range(1, 3001))
    tracemalloc.start()
    rows.cut(path, 3000)
    assert tracemalloc.get_traced_memory()[1] < 1e6, "8 MB of file"
    tracemalloc.reset_peak()
    course = Follower(path, view.NAMES, 50).read()
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    assert course.version == 3000
    assert len(course.steps) == 50


def test_a_curve_keeps_the_course_in_few_points():
    curve = Curve()
    for value in range(100_000):
        curve.add(value)
    assert 1000 <= len(curve.points) <= 2048
    assert curve.last == 99_999
    assert curve.points == sorted(curve.points)
    assert curve.points[0] < 100
    assert curve.points[-1] > 99_800


def test_the_newest_step_counts_whatever_follows():
    course = Course((), 5, [{"version": 9, "reward/mean": 1.0}, {"version": 3, "eval/accuracy": 1.0}])
    assert course.version == 9
    assert len(course.steps) == 1
