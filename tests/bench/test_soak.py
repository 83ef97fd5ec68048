"""`bench/soak.py`: it sees what grows, and a short run does not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import session_of

from bench import soak
from bench.soak import Series, follow, judge

ROOT = Path(__file__).parents[2]
WORDS = [
    "learner.groups_per_step=2",
    "rollout.group_size=2",
    "rollout.max_new_tokens=1",
    "checkpoint.every=5",
    "checkpoint.keep=1",
    "eval.every=0",
    "eval.num_prompts=4",
]


def series(kind, growth, num_points=200, noise=0.0, warm_up=0.0):
    """Of a level of 500, at every tenth step; `growth` is for each step, `warm_up` is what the first ones bring."""
    rng = random.Random(1)
    points = [
        (10.0 * n, 500 + growth * 10 * n + rng.uniform(-noise, noise) + warm_up * min(n, num_points // 4))
        for n in range(num_points)
    ]
    return Series(kind, points=points)


@pytest.mark.parametrize(
    ("found", "good"),
    [
        (series("memory, MiB", 0.0, noise=30), True),
        (series("memory, MiB", 0.0, warm_up=10), True),
        (series("memory, MiB", 0.0, num_points=8 * 3 // 2), True),
        (series("memory, MiB", -1.0), True),
        (series("memory, MiB", 0.25), False),
        (series("memory, MiB", 0.1, noise=30), False),
        (series("open files", 0.05), False),
        (series("file, KiB", 15), True),
        (series("file, KiB", 17), False),
        (series("folder, MiB", 1.0), False),
    ],
)
def test_what_grows_fails(found, good):
    assert judge(found).good == good


def test_a_jump_every_now_and_then_is_growth():
    jumps = [(float(step), 500.0 + 30 * (step // 500)) for step in range(0, 3000, 10)]
    assert not judge(Series("memory, MiB", points=jumps)).good
    once = [(step, 500.0 if step < 500 else 900.0) for step, _ in jumps]
    assert judge(Series("memory, MiB", points=once)).good, "it came with the warm-up"


def test_too_few_points_are_no_verdict():
    assert judge(Series("memory, MiB", points=[(float(n), 1.0) for n in range(5)])) is None


RUN = """
import json, os, subprocess, sys, time
from pathlib import Path

folder, leak, end = Path(sys.argv[1]) / "run", sys.argv[2], int(sys.argv[3])
folder.mkdir()
kept = []
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
for step in range(1, 41):
    if leak == "memory":
        kept.append(b"x" * 2**20 * 2)
    if leak == "files":
        kept.append(open(os.devnull))
    if leak == "groups":
        (folder / "groups").mkdir(exist_ok=True)
        (folder / "groups" / str(step)).write_bytes(b"x" * 2**20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"version": step, "reward/mean": 1.0}) + "\\n")
    time.sleep(0.05)
helper.kill()
sys.exit(end)
"""


@pytest.mark.parametrize(
    ("leak", "end", "bad"),
    [
        ("nothing", 0, []),
        ("memory", 0, ["memory, MiB: driver"]),
        ("files", 0, ["open files"]),
        ("groups", 0, ["folder, MiB: groups/"]),
        ("nothing", 3, ["failed with 3"]),
    ],
)
def test_a_process_that_leaks_is_seen_from_outside(tmp_path, leak, end, bad):
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), leak, str(end)]
    out = tmp_path / "table.md"
    assert follow(command, tmp_path, every_s=0.02, minutes=1, out=out) == (not bad)
    text = out.read_text()
    assert "40 steps" in text
    assert [line for line in text.splitlines() if "FAIL" in line or "failed" in line] == [
        line for line in text.splitlines() if any(name in line for name in bad)
    ]


def test_a_run_that_takes_too_long_is_stopped_and_judged(tmp_path, monkeypatch):
    """One that does not stop is killed with all that it started, and is not a good end."""
    monkeypatch.setattr(soak, "STOP_S", 0.5)
    (tmp_path / "run.py").write_text("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + RUN + "9")
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), "nothing", "0"]
    assert not follow(command, tmp_path, every_s=0.02, minutes=0.5 / 60, out=tmp_path / "table.md")
    assert "failed with -9" in (tmp_path / "table.md").read_text()


@pytest.mark.timeout(240)
def test_a_short_run_does_not_grow(tmp_path):
    """Followed until each of its processes has enough points: steps are soon over on one machine, looks on another."""
    words = ["configs/largest_digit.toml", "runtime=cluster", "num_steps=100000", f"run_dir={tmp_path}", *WORDS]
    names = {f"memory, MiB: {of}" for of in ("driver", "ray::LearnerActor 0", "ray::RolloutActor 0")}
    with subprocess.Popen([sys.executable, soak.RUN, *words], cwd=ROOT, start_new_session=True) as process:
        try:
            follower = soak.Follower(process.pid, tmp_path)
            while not names <= {series.name for series in follower.series if judge(series)}:
                assert process.poll() is None
                follower.sample()
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == os.EX_TEMPFAIL
        finally:
            for pid in session_of(process.pid):
                os.kill(pid, signal.SIGKILL)
    text, flat = soak.table(follower, "")
    assert flat, text
