"""Calls that block: those that never end take nobody's place."""

import asyncio
import os
import signal
import threading
import time
from functools import partial

import pytest
import uvloop
from helpers import run

from asyncrl.utils.threads import Threads, heard_here, in_thread


def test_results_and_errors_come_back():
    def fail():
        raise KeyError("x")

    async def body():
        assert await in_thread(threading.get_ident) != threading.get_ident()
        assert await in_thread(threading.current_thread) is not await in_thread(threading.current_thread)
        with pytest.raises(KeyError, match="x"):
            await in_thread(fail)

    run(body())


def test_calls_that_hang_hold_up_neither_others_nor_the_default_executor():
    ended = threading.Event()

    async def body():
        threads = Threads()
        hanging = [asyncio.ensure_future(threads.run(ended.wait, 0.05)) for _ in range(100)]
        assert await threads.run(lambda: "scored") == "scored", "only once 100 before it were given up"
        assert await asyncio.to_thread(lambda: "written") == "written"
        for result in await asyncio.gather(*hanging, return_exceptions=True):
            assert isinstance(result, TimeoutError)

    try:
        run(body())
    finally:
        ended.set()


def test_only_a_few_run_at_once_and_waiting_for_a_turn_does_not_count(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    running, most = [], []

    def work():
        running.append(None)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()

    async def body():
        threads = Threads()
        await asyncio.gather(*(threads.run(work, timeout_s=1) for _ in range(20)))

    run(body())
    assert max(most) == 5


def test_a_caller_that_is_cancelled_gives_its_turn_back():
    ended = threading.Event()

    async def body():
        threads = Threads()
        calls = [asyncio.ensure_future(threads.run(ended.wait)) for _ in range(100)]
        await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert await threads.run(partial(max, 1, 2)) == 2

    try:
        run(body())
    finally:
        ended.set()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_signal_to_a_forked_process_does_not_reach_the_loop_that_forked_it(new_loop):
    def fork():
        ready, tell = os.pipe()
        if child := os.fork():
            os.close(tell)
            os.read(ready, 1)  # the child lives
            os.close(ready)
            return child
        os.write(tell, b".")
        time.sleep(20)
        os._exit(0)

    async def body():
        heard, told = [], asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: (heard.append(1), told.set()))
        try:
            with heard_here(signal.SIGTERM):
                for child in (fork(), await in_thread(fork)):
                    os.kill(child, signal.SIGTERM)
                    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            await asyncio.sleep(0.1)  # the loop looks at what has arrived
            assert heard == []
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(told.wait(), 10)
            assert heard == [1]
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(body())
