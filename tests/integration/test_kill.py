"""`kill -9` of a real run through its command line, then `--resume`: no prompt is lost, none is trained twice."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import session_of

from asyncrl.monitor import metrics
from asyncrl.recovery import checkpoint, journal
from asyncrl.recovery.prompt_states import Admitted, Batch, Resumed

ROOT = Path(__file__).parents[2]
SMALL = [
    "env.path=asyncrl.envs.digits:SortDigits",
    "rollout.max_new_tokens=8",
    "rollout.group_size=4",
    "learner.groups_per_step=4",
    "buffer.max_staleness=2",
    "eval.every=0",
    "eval.num_prompts=8",
    "checkpoint.every=3",
]


def start(tmp_path, *words):
    command = [sys.executable, str(ROOT / "launch" / "run.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True)


def kill_at(process, line_start):
    """Kills every process of the run when it prints such a line."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(line_start):
            for member in session_of(process.pid):
                os.kill(member, signal.SIGKILL)
            process.wait()
            return
    raise AssertionError("".join(lines))


@pytest.mark.parametrize(("runtime", "kills"), [("local", {2: 0, 5: 3}), ("cluster", {5: 3})])
@pytest.mark.timeout(300)
def test_a_run_that_is_killed_loses_nothing(tmp_path, runtime, kills):
    """Before the first checkpoint and between two; `kills` are the steps, with the versions to go on from."""
    words = [*SMALL, f"runtime={runtime}", f"run_dir={tmp_path}", "num_steps=9"]
    for step in kills:
        with start(tmp_path, *words) as killed:
            kill_at(killed, f"step {step} ")
        (folder,) = [path for path in tmp_path.iterdir() if path.name != "cache"]
        assert folder.stat().st_mode & 0o077 == 0
        words = ["--resume", str(folder)]
    with start(tmp_path, *words) as last:
        output = last.communicate()[0]
    assert last.returncode == 0, output
    assert checkpoint.load_cursor(checkpoint.latest(folder / "checkpoints")).version == 9

    records, _, _ = journal.read(folder / "journal.bin")
    assert [record.version for record in records if isinstance(record, Resumed)] == [*kills.values()]
    trained, admitted = {}, set()
    for record in records:
        match record:
            case Batch(step=step, ids=ids):
                trained[step] = ids
            case Resumed(version=version):
                trained = {step: ids for step, ids in trained.items() if step <= version}
            case Admitted(id=number):
                admitted.add(number)
    assert sorted(trained) == list(range(1, 10))
    uses = Counter(number for ids in trained.values() for number in ids)
    assert set(uses.values()) == {1}, "trained twice on the way to the final weights"
    accounts = journal.Journal(folder / "journal.bin").accounts
    assert admitted == set(range(accounts.next_id))
    assert sorted([*uses, *accounts.open_ids]) == sorted(admitted), "a prompt was lost"
    rows = [row["version"] for row in metrics.read(folder) if "reward/mean" in row]
    assert rows == list(range(1, 10)), "rows of steps that were lost are there twice"
