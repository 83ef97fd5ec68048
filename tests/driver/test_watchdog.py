"""The watchdog: a wait that takes too long is named and explained, and what was asked for is done about it."""

import asyncio
import os
import re
import subprocess
import sys

import pytest
from helpers import run, telling
from test_loop import small

from asyncrl.driver import run as job
from asyncrl.driver.watchdog import Stalled, Watchdog
from asyncrl.recovery import checkpoint
from asyncrl.runtime import local
from asyncrl.runtime.stacks import dump_stacks


def make(folder, action="warn", timeout_s=0.1):
    said, killed = [], []

    async def stacks():
        return "stacks of everybody"

    options = {"timeout_s": timeout_s, "action": action, "stacks": stacks, "kill": killed.append}
    watchdog = Watchdog(folder, emit=telling(said), **options)
    return watchdog, said, killed


class Actor:
    name = "rollout 7"


def test_a_stall_is_named_with_all_waits_and_stacks_and_again_only_when_it_has_doubled(tmp_path):
    async def never():
        await asyncio.Event().wait()

    async def body():
        watchdog, said, _ = make(tmp_path)
        watch = asyncio.ensure_future(watchdog.run())
        hanging = asyncio.ensure_future(never())
        produces = watchdog.wait("produce", "rollout 7 to play prompt 3")
        with produces, watchdog.wait("take", "4 finished groups"):
            while len(said) < 4:
                await asyncio.sleep(0.01)
        watch.cancel()
        hanging.cancel()
        return said

    said = run(body())
    assert len(said) == 4
    assert re.match(r"still waiting: take has .* for 4 finished groups; produce has .* for rollout 7 to play", said[0])
    assert "alarm: produce has waited" in said[1]
    assert "4 finished groups" in said[1]
    report = (tmp_path / "stalls.txt").read_text()
    for part in ("for 4 finished groups", "in never", "thread ", "test_watchdog.py", "stacks of everybody"):
        assert part in report, part


def test_a_wait_that_ended_is_forgotten(tmp_path):
    async def body():
        watchdog, said, _ = make(tmp_path)
        with watchdog.wait("take", "this"):
            await asyncio.sleep(0.15)
        watch = asyncio.ensure_future(watchdog.run())
        with watchdog.wait("step", "that"):
            while not said:
                await asyncio.sleep(0.01)
        watch.cancel()
        return said

    assert "take" not in run(body())[0]


def test_restart_kills_the_actor_that_is_waited_for(tmp_path):
    async def body():
        watchdog, _, killed = make(tmp_path, "restart")
        watch = asyncio.ensure_future(watchdog.run())
        actor = Actor()
        with watchdog.wait("take", "4 finished groups"), watchdog.wait("produce", "a group", actor):
            while not killed:
                await asyncio.sleep(0.01)
        assert killed[0] is actor
        watch.cancel()

    run(body())


@pytest.mark.parametrize(("stage", "hangs"), [("take", False), ("step", True)])
def test_stop_says_whether_the_learner_is_what_hangs(tmp_path, stage, hangs):
    async def body():
        watchdog, _, _ = make(tmp_path, "stop")
        with watchdog.wait(stage, "something"), pytest.raises(Stalled, match=f"{stage} has waited") as caught:
            await watchdog.run()
        assert caught.value.learner_hangs is hangs

    run(body())


def test_stop_gives_a_learner_that_others_wait_for_its_own_time(tmp_path):
    async def body(hangs):
        watchdog, said, _ = make(tmp_path, "stop", timeout_s=0.6)
        with watchdog.wait("admit", "a slot"):
            await asyncio.sleep(0.5)
            watch = asyncio.ensure_future(watchdog.run())
            with watchdog.wait("step", "the gradient"):
                while not said:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(1.5 if hangs else 0)
            await asyncio.wait({watch})
        return watch.exception()

    assert run(body(True)).learner_hangs
    assert not run(body(False)).learner_hangs


def test_a_report_that_cannot_be_written_is_told_and_ends_nothing(tmp_path):
    async def body():
        watchdog, said, _ = make(tmp_path / "gone")
        watch = asyncio.ensure_future(watchdog.run())
        with watchdog.wait("step", "something"):
            while len(said) < 2:
                await asyncio.sleep(0.01)
        watch.cancel()
        return said

    assert re.match(r"alarm: .*stalls.txt could not be written: .*No such file", run(body())[0])


class Hanging:
    """Sort digits, but one prompt is never answered."""

    def __new__(cls, tokenizer, bad):
        from asyncrl.envs.digits import SortDigits

        env = SortDigits(tokenizer)
        play = env.play

        async def hang(prompt, generate):
            if prompt.id == bad:
                await asyncio.Event().wait()
            return await play(prompt, generate)

        env.play = hang
        return env


def test_a_run_that_hangs_stops_with_a_checkpoint_that_it_goes_on_from(tmp_path, monkeypatch):
    async def stacks(_learner, actors):
        return "stacks of " + ", ".join(actor.name for actor in actors)

    monkeypatch.setattr(local, "stacks", stacks)
    words = ["env.path=test_watchdog:Hanging", "num_steps=6", "eval.num_prompts=4", "eval.num_actors=1"]
    words += ["watchdog.timeout_s=3", "watchdog.action=stop"]
    with pytest.raises(Stalled, match=r"rollout . to play prompt 11"):
        run(job.train(small(tmp_path, *words, "env.args={bad=11}"), quiet=True))
    (folder,) = [path for path in tmp_path.iterdir() if path.name != "cache"]
    assert "stacks of rollout 0, rollout 1, evaluator 0" in (folder / "stalls.txt").read_text()
    saved = checkpoint.load_cursor(checkpoint.latest(folder / "checkpoints"))
    assert 0 < saved.version < 6
    assert 11 in saved.open_prompts
    result = run(job.train(small(tmp_path, *words, "env.args={bad=-1}"), folder, quiet=True))
    assert result.version == 6


def test_stacks_of_a_process_that_hangs_outside_python():
    code = (
        "from asyncrl.runtime.stacks import offer_stacks; import ctypes\n"
        "print(offer_stacks(), flush=True)\n"
        "def stuck():\n"
        "    while True: ctypes.PyDLL(None).sleep(60)\n"  # holds the interpreter lock
        "stuck()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        path = process.stdout.readline().strip()
        text = ""
        while "in stuck" not in text:
            text = dump_stacks(process.pid, path)
        process.kill()
    assert f"process {process.pid}" in text
    assert dump_stacks(process.pid, path) == f"process {process.pid} is gone"
    assert not os.path.exists(path)
