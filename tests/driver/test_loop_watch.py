"""An event loop that one call holds up is named, with that call."""

import asyncio
import re
import threading
import time

import pytest
import uvloop

from asyncrl.driver.loop_watch import watched_loop
from asyncrl.envs.attempt import EnvFault, Patience, attempt
from asyncrl.types import Prompt

FREE = threading.Event()


class Blocking:
    """Its play() waits as a program does, in a library."""

    max_prompt_tokens = 8

    async def play(self, prompt, generate):
        del prompt, generate
        FREE.wait(20)
        return ""


def busy():
    while not FREE.is_set():
        sum(range(100))


async def play():
    with pytest.raises(EnvFault):  # it gives no trajectory
        await attempt(Blocking(), Prompt(0, (1,), ""), lambda _: None, Patience(60))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize(
    ("block", "by", "remedy"),
    [
        (play, r"play\(\) in .*test_loop_watch.py", "asyncio.to_thread"),
        (lambda: asyncio.sleep(0, busy()), r"busy\(\) in .*test_loop_watch.py", "stalls.txt"),
    ],
)
def test_what_holds_up_a_loop_is_told_once_while_it_does(new_loop, block, by, remedy):
    told = []

    def tell(held):
        told.append(held)
        time.sleep(0.3)  # for a second one, were there one
        FREE.set()

    async def body():
        FREE.clear()
        with watched_loop(tell, bound_s=0.1):
            await asyncio.sleep(0.3)
            assert not told, "a loop that answers"
            await block()
            await asyncio.sleep(0.3)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(body())
    (held,) = told
    assert re.search(rf"held up for [12] s by {by}:\d+, .*{remedy}", held.message)
    assert "test_loop_watch.py" in held.stack
