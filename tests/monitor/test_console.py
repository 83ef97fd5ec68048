"""A console that goes, a disk that is full and text that acts on a terminal cost a run nothing but themselves."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import uvloop

from asyncrl.driver import run as job
from asyncrl.monitor import events, metrics
from asyncrl.monitor.plain import inert, plain

ROW = {"eval/accuracy": 0.5, "eval/low": 0.4, "eval/high": 0.6}


def test_text_of_a_model_does_nothing_to_a_terminal_or_a_page():
    hostile = "a\x1b[2J\x9b1m\u202eb\ud800\tc\nd\r"
    assert plain(hostile) == "a\\x1b[2J\\x9b1m\\u202eb\\ud800\tc\nd\\r"
    shown = inert("```\n![x](http://a.b/c.png)\n<img src=http://a.b>\x1b")
    assert all(line.startswith("    ") for line in shown.splitlines())
    assert "<img" not in shown
    event = events.Event(0.0, 0.0, "failure", "run", hostile, True)
    assert event.line == f"alarm: {plain(hostile)}"


def test_halves_of_characters_are_written_all_the_same(tmp_path):
    told = events.Events(tmp_path)
    told.emit("failure", "said \ud800", raw="\udfff")
    (event,) = events.read(tmp_path)
    assert event.message == "said \\ud800"
    assert "udfff" in event.facts["unwritable"]


def test_a_closed_pipe_is_told_once_and_ends_nothing(tmp_path):
    script = (
        "import sys, pathlib\n"
        "from asyncrl.monitor.metrics import Metrics\n"
        "with Metrics(pathlib.Path(sys.argv[1]), 1) as sink:\n"
        "    sys.stdin.readline()\n"
        "    for number in range(3):\n"
        "        sink.event('note', f'line {number}')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    _, errors = process.communicate(b"go\n", timeout=120)
    assert (process.returncode, errors) == (0, b"")
    told = events.read(tmp_path)
    assert [event.message for event in told if event.kind == "note"] == ["line 0", "line 1", "line 2"]
    assert [event.subject for event in told if event.kind == "failure"] == ["console"]


def test_a_full_disk_is_named_and_every_sink_is_closed(tmp_path):
    with metrics.Metrics(tmp_path, 9) as sink:
        sink._file.close()
        sink._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(metrics.Unwritable, match=r"No space left.* --resume"):
            sink.evaluation(0, ROW)
        sink._file.close()
        sink._file = (tmp_path / "metrics.jsonl").open("ab", buffering=0)
    assert sink._file.closed


def test_the_second_ctrl_c_interrupts_a_run_whose_loop_is_held_up():
    script = (
        "import asyncio, time, uvloop\n"
        "from types import SimpleNamespace\n"
        "from asyncrl.driver.run import _stop_on_ctrl_c\n"
        "async def body():\n"
        "    with _stop_on_ctrl_c(SimpleNamespace(close=print), SimpleNamespace(event=print)):\n"
        "        print('ready', flush=True)\n"
        "        end = time.monotonic() + 60\n"
        "        while time.monotonic() < end: time.sleep(0.1)\n"
        "with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:\n"
        "    runner.run(body())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    began = time.monotonic()
    while process.poll() is None and time.monotonic() < began + 30:
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)
    _, errors = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors
    assert time.monotonic() - began < 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_signal_stops_a_run_whose_loop_is_idle_and_handlers_are_as_before(number, new_loop):
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    async def body():
        told, stopped = [], asyncio.Event()
        sink = SimpleNamespace(event=lambda kind, _message, **facts: told.append((kind, facts["signal"])))
        with job._stop_on_ctrl_c(SimpleNamespace(close=stopped.set), sink):
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
            await asyncio.wait_for(stopped.wait(), 20)
        return told

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(body()) == [("stop", number.name)]
    assert {one: signal.getsignal(one) for one in before} == before


def test_a_share_about_the_limit_is_one_alarm():
    alarmed, told = False, []
    for share in (0.4, 0.6, 0.45, 0.55, 0.2, 0.6):
        found = metrics._cut_off({"completion/truncated": share}, alarmed)
        told += [share] if found and not alarmed else []
        alarmed = bool(found)
    assert told == [0.6, 0.6]
