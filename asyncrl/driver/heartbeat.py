"""Heartbeats: a rollout actor that does not answer for too long counts as dead.

A process that is stopped, swapped out or cut off from the network is there and does nothing. No error tells of it:
calls wait, and a broadcast in which one member stalls fails at all of them, so it does not say which one it was. Each
actor is asked on its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from asyncrl.runtime.handles import ActorSilent, RolloutHandle

_LOOKS = 16
"""Within the bound."""


@dataclass(slots=True)
class _Question:
    answer: asyncio.Task[None]
    waited_s: float = 0.0


async def listen(
    actors: Callable[[], Iterable[RolloutHandle]],
    silent: Callable[[RolloutHandle, ActorSilent], None],
    timeout_s: float,
) -> None:
    """Asks each of the `actors` again and again, until cancelled; calls `silent` for one that does not answer within
    `timeout_s`. A death is left to the calls that it fails."""
    asked: dict[RolloutHandle, _Question] = {}
    look_s = timeout_s / _LOOKS
    try:
        while True:
            now = {actor: asked.get(actor) or _Question(asyncio.create_task(actor.ping())) for actor in actors()}
            _give_up(question for actor, question in asked.items() if actor not in now)
            asked = now
            began = time.monotonic()
            await asyncio.sleep(look_s)
            # This process may have been stopped itself: then the others had no longer to answer than one look.
            waited_s = min(time.monotonic() - began, 2 * look_s)
            for actor, question in list(asked.items()):
                question.waited_s += waited_s
                if question.answer.done():
                    _give_up([asked.pop(actor)])
                elif question.waited_s > timeout_s:
                    _give_up([asked.pop(actor)])
                    silent(actor, ActorSilent(f"no answer for {question.waited_s:.0f} s (weights.timeout_s)"))
    finally:
        _give_up(asked.values())


def _give_up(questions: Iterable[_Question]) -> None:
    for question in questions:
        question.answer.cancel()
        question.answer.add_done_callback(lambda task: task.cancelled() or task.exception())
