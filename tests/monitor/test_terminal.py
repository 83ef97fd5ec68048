"""The view of a run in the terminal that it was started in: nothing tears it, Ctrl-C means what it always does."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager
from pathlib import Path

import helpers
import pytest
from rich.console import Console

from asyncrl.cli import watch
from asyncrl.config import loading as configuration
from asyncrl.driver import run as job
from asyncrl.monitor import view
from asyncrl.monitor.course import Course
from asyncrl.recovery import run_folder

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT = 180, 45
ROW = {"version": 1, "reward/mean": 0.25, "wait/window_s": 2.0, "wait/learner_for_groups_s": 1.0}
ROW |= dict.fromkeys(("wait/learner_for_weights_s", "wait/learner_for_checkpoint_s"), 0.0)
ROW |= dict.fromkeys(("wait/learner_for_evaluation_s", "wait/rollout_for_evaluation_s"), 0.0)
ROW |= {"wait/rollout_for_slots_s": None, "wait/rollout_for_weights_s": 0.0, "rollout/num_actors": 2.0}
ROW |= {"rollout/idle": 0.0, "time/step_s": 1.0, "time/sync_s": 0.0}


def screen_of(data):
    """The lines that a terminal shows, those scrolled away included."""
    lines, row, column = [""], 0, 0
    for match in re.finditer(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b[78=>]|([^\x1b])", data, re.S):
        argument, command, character = match.groups()
        if command == "A":
            row -= int(argument or 1)
        elif command == "K":
            lines[row] = "" if argument == "2" else lines[row][:column]
        elif character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif character:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
        else:
            assert command in ("m", "h", "l", None), f"a sequence that this terminal does not know: {match[0]!r}"
    return [line.rstrip() for line in lines]


@contextmanager
def in_a_terminal(*command):
    """Starts the command in a terminal of its own; yields its process and the terminal's other end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    take_it = "import os, sys, fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY); os.execv(sys.argv[1], sys.argv[1:])"
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(
        [sys.executable, "-c", take_it, *map(str, command)], **streams, env=environment, start_new_session=True
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read(terminal, until=None):
    """The bytes that were written, up to a text, or to the end."""
    data = b""
    while until is None or until.encode() not in data:
        try:
            found = os.read(terminal, 65536)
        except OSError:  # EIO: the way Linux says that the last writer has gone
            found = b""
        if not found:
            assert until is None, data.decode(errors="replace")
            break
        data += found
    return data


LIVE = """
import os, sys
from pathlib import Path
from asyncrl.monitor.terminal import open_terminal
folder = Path(sys.argv[1])
shown = open_terminal(folder, 9, 0, quiet=False, watch=True)
shown.start()
shown.say("news of the run " + "word " * 60)
os.write(2, b"from a library in C\\n")
print("from Python")
shown.step(1, "step 1 | that the view tells")
(folder / "metrics.jsonl").write_text(sys.argv[2])
shown.stop()
shown.stop()
shown.say("below " + "word " * 60)
print("after all")
"""


def make_folder(folder, rows=()):
    (folder / "config.json").write_text(json.dumps(configuration.to_tree(configuration.load(None, ["num_steps=9"]))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_nothing_is_written_across_the_view(tmp_path):
    folder = make_folder(tmp_path)
    with in_a_terminal(sys.executable, "-c", LIVE, folder, json.dumps(ROW) + "\n") as (process, terminal):
        lines = screen_of(read(terminal).decode())
        assert process.wait() == 0
    above, (top, *inside) = lines[:3], lines[3:]
    assert above == ["news of the run " + " ".join(["word"] * 60), "from a library in C", "from Python"]
    assert top.startswith("╭")
    assert len(top) == WIDTH
    bottom = next(number for number, line in enumerate(inside) if line.startswith("╰"))
    assert "step 1 of 9" in inside[0]
    assert {(line[0], line[-1]) for line in inside[:bottom]} == {("│", "│")}
    assert [line for line in inside[bottom + 1 :] if line] == ["below " + " ".join(["word"] * 60), "after all"]
    assert (folder / "output.log").read_text() == "from a library in C\nfrom Python\n"


def test_ctrl_c_ends_the_step_and_saves_below_the_view(tmp_path):
    words = ["runtime=local", "num_steps=5000", "rollout.group_size=2", "learner.groups_per_step=2"]
    words += ["eval.num_prompts=4", f"run_dir={tmp_path}"]
    with in_a_terminal(sys.executable, ROOT / "launch" / "run.py", "--watch", *words) as (process, terminal):
        data = read(terminal, until="learner for groups")
        os.write(terminal, b"x\r\x03")
        data += read(terminal)
        assert process.wait() == 75
    lines = screen_of(data.decode())
    assert sum(line.startswith("╭") for line in lines) == 1, "\n".join(lines)
    assert not any(line.startswith(("step ", "x", "^C")) for line in lines)
    said = next(number for number, line in enumerate(lines) if line.startswith("stopping after this step"))
    top, bottom = (next(n for n, line in enumerate(lines) if line.startswith(corner)) for corner in "╭╰")
    assert said < top
    assert any(re.match(r"go on with: \S+ launch/run.py --resume", line) for line in lines[bottom:])
    assert len(list(tmp_path.glob("*/checkpoints/step-*"))) == 1


SLOWLY_SHOWN = """
import os, signal, sys
from asyncrl.monitor.terminal import undisturbed_by_keys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
with undisturbed_by_keys():
    os.write(1, "\u256d".encode() * int(sys.argv[1]))
    open(sys.argv[2], "w").close()
    signal.sigwait({signal.SIGINT})
    os.write(1, b"interrupted")
"""


def test_ctrl_c_drops_nothing_that_was_drawn_and_not_shown_yet(tmp_path):
    drawn = 2500  # 7,500 bytes: Linux holds 4,096 for a reader, and would drop the rest
    os.mkfifo(tmp_path / "drawn")
    with in_a_terminal(sys.executable, "-c", SLOWLY_SHOWN, drawn, tmp_path / "drawn") as (process, terminal):
        (tmp_path / "drawn").read_text()  # comes back when it has
        os.write(terminal, b"\x03")
        shown = read(terminal).decode()
        assert process.wait() == 0
    assert shown == "╭" * drawn + "interrupted"


def test_without_a_terminal_it_says_so_and_writes_lines(tmp_path, capsys):
    words = ["runtime=local", "num_steps=1", "rollout.group_size=2", "learner.groups_per_step=2", "eval.num_prompts=4"]
    helpers.run(job.train(configuration.load(None, [*words, f"run_dir={tmp_path}"]), watch=True))
    written = capsys.readouterr().out
    assert "--watch needs a terminal, and the output is none: one line a step follows instead" in written
    assert "\nstep 1 | reward" in written
    assert "╭" not in written


def course(rows):
    return Course(view.NAMES, view.NUM_STEPS, rows)


def text_of(renderable):
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_the_advice_is_of_the_steps_of_this_configuration():
    config = configuration.to_tree(configuration.load(None, ["num_steps=9"]))
    rows = [ROW | {"version": version} for version in range(1, 9)]
    assert "the learner waited 50%" in text_of(view.screen("run", config, course(rows)))
    assert "the learner waited" not in text_of(view.screen("run", config, course(rows), begin=4)), "too few since"


def test_a_run_that_went_silent_is_said_to_have(tmp_path):
    config = configuration.to_tree(configuration.load(None, ["num_steps=9"]))
    assert "no step for" not in text_of(view.screen("run", config, course([ROW]), silent_s=59))
    assert "no step for 0:05:00, they took 2.0 s: has the run ended?" in text_of(
        view.screen("run", config, course([ROW]), silent_s=300)
    )
    done = text_of(view.screen("run", config, course([ROW | {"version": 9}]), silent_s=300))
    assert "no step for" not in done
    assert make_folder(tmp_path, [ROW])
    os.utime(tmp_path / "metrics.jsonl", (0, 0))
    assert "no step for" in text_of(view.View(tmp_path).render())


def test_the_end_is_when_nothing_follows_the_last_step(tmp_path):
    shown = view.View(make_folder(tmp_path, [ROW | {"version": 12}]))
    assert not shown.finished(), "its evaluation may follow"
    assert "step 12 of 12" in text_of(shown.render()), "resumed with more steps than the 9 at its start"
    os.utime(tmp_path / "metrics.jsonl", (0, 0))
    assert view.View(tmp_path).finished()


def test_a_resumed_run_writes_its_rows_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = view.Follower(path, view.NAMES, view.NUM_STEPS)

    def write(file, numbers, **more):
        rows = ({"version": number, "reward/mean": number, **more} for number in numbers)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(path, range(1, 6), long="x" * 99)
    assert follower.read().curves["reward/mean"].points == [1, 2, 3, 4, 5]
    write(tmp_path / "partial", (1, 2, 3))
    (tmp_path / "partial").rename(path)
    assert follower.read().curves["reward/mean"].points == [1, 2, 3]
    assert follower.read().version == 3


def test_a_terminal_that_is_not_ours_keeps_its_echo(monkeypatch, tmp_path, capsys):
    assert watch.main([str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    make_folder(tmp_path, [ROW | {"version": 9}])
    os.utime(tmp_path / "metrics.jsonl", (0, 0))
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert watch.main([str(tmp_path)]) == 0
    assert "step 9 of 9" in capsys.readouterr().out


def test_a_view_shows_the_total_of_a_run_that_was_resumed_with_more_steps(tmp_path):
    shown = view.View(make_folder(tmp_path, [ROW]))
    assert "step 1 of 9" in text_of(shown.render())
    run_folder.keep(tmp_path, configuration.load(None, ["num_steps=20"]), 1)
    assert "step 1 of 20" in text_of(shown.render())


if sys.platform != "linux":
    pytestmark = pytest.mark.skip(reason="a terminal of one's own is taken the Linux way")
