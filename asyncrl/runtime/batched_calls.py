"""Prompts to a rollout actor and finished groups back, several in one call, none waiting for a slower one.

    driver: Exchange                                    rollout actor: Outbox
    prompts issued in one turn of the loop --call 1-->  plays each by itself
    nothing to send, groups still out      --call 2-->     |
                            <--answer to call 1-- the groups that finished first, whichever prompts they are of
                            <--answer to call 2-- those that finished since

A call brings prompts and takes groups, not the same ones: it is answered as soon as anything is finished. So a busy
actor hands over many groups in one answer and an idle one gives each at once. One call stays open while groups are out.
The metadata of an answer goes to the driver; the tokens of its groups are one object of the runtime's store, owned by
the driver, which outlives the actor. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import time
import traceback
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from asyncrl.types import Group, Prompt, Trajectory

_LINGER_S = (0.01, 1.0)
_LINGER_SHARE = 1 / 32
"""A finished group waits for others that are about to finish for this share of what groups take, within these bounds.
So each of n groups in flight brings n / 32 others along, for one or two hundredths of its time."""

Numbered: TypeAlias = tuple[int, Prompt]
Answer: TypeAlias = tuple[int, Group | Exception]
"""Under the number of its prompt: the group, without prompt and tokens, or what went wrong."""
Tokens: TypeAlias = Sequence[Trajectory] | None
Call: TypeAlias = Callable[[list[Numbered]], tuple[asyncio.Future[list[Answer]], Any]]
"""Sends prompts; gives the answers to come, and the reference to the tokens of all of them, in the same order."""


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one group: a place in what one answer brought. Awaiting it fetches all that the answer brought."""

    batch: Any
    index: int

    def __await__(self) -> Generator[Any, None, Sequence[Trajectory]]:
        batch = yield from self.batch.__await__()
        trajectories: Sequence[Trajectory] = batch[self.index]
        return trajectories


def unite(groups: Sequence[Group]) -> tuple[list[tuple[int, int]], list[Any]]:
    """Where each group's tokens are, (batch, index), and the batches, each once."""
    numbers: dict[int, int] = {}
    places: list[tuple[int, int]] = []
    batches: list[Any] = []
    for group in groups:
        held = group.trajectories
        part = held if isinstance(held, Part) else Part([held], 0)  # of a resumed run, read from disk
        if id(part.batch) not in numbers:
            numbers[id(part.batch)] = len(batches)
            batches.append(part.batch)
        places.append((numbers[id(part.batch)], part.index))
    return places, batches


def separate(places: Sequence[tuple[int, int]], batches: Sequence[Sequence[Any]]) -> list[Any]:
    """Each group's tokens again, where the batches have been fetched."""
    return [batches[number][index] for number, index in places]


class Outbox:
    """The rollout actor's side: plays prompts and keeps what is finished until a call takes it away."""

    def __init__(self, play: Callable[[Prompt], Awaitable[Group]]) -> None:
        self._play = play
        self._running: set[asyncio.Future[None]] = set()
        self._finished: list[tuple[Answer, Tokens]] = []
        self._num_calls = 0
        self._typical_s = 0.0  # that a group takes: a moving average
        self._turn = asyncio.Lock()  # first come, first served
        self._changed = asyncio.Event()

    async def exchange(self, prompts: Sequence[Numbered]) -> tuple[list[Answer], list[Tokens]]:
        """Starts the prompts and waits for groups. Comes back with nothing if more calls wait than prompts are out."""
        for number, prompt in prompts:
            self._running.add(asyncio.ensure_future(self._run(number, prompt)))
        self._num_calls += 1
        self._changed.set()
        try:
            async with self._turn:
                while not self._finished and self._num_calls <= len(self._running):
                    self._changed.clear()
                    await self._changed.wait()
                if self._finished:
                    await self._linger()
                finished, self._finished = self._finished, []
        finally:
            self._num_calls -= 1
        return [answer for answer, _ in finished], [tokens for _, tokens in finished]

    async def _linger(self) -> None:
        """Waits for company of what is finished, while there is any to come."""
        least, most = _LINGER_S
        with suppress(TimeoutError):
            async with asyncio.timeout(min(max(_LINGER_SHARE * self._typical_s, least), most)):
                while self._running:
                    self._changed.clear()
                    await self._changed.wait()

    async def _run(self, number: int, prompt: Prompt) -> None:
        tokens: Tokens = None
        outcome: Group | Exception
        began = time.monotonic()
        try:
            group = await self._play(prompt)
        except Exception as error:
            outcome = _portable(error)
        except BaseException as error:
            outcome = RuntimeError(f"the play of prompt {prompt.id} ended by {error!r}")
            raise
        else:
            tokens = group.trajectories
            outcome = replace(group, prompt=Prompt(prompt.id, (), ""), trajectories=None)  # the driver has the prompt
        finally:  # whatever ends it, the driver waits for an answer
            took_s = time.monotonic() - began
            self._typical_s += (took_s - self._typical_s) / (8 if self._typical_s else 1)
            task = asyncio.current_task()
            if task is not None:
                self._running.discard(task)
            self._finished.append(((number, outcome), tokens))
            self._changed.set()


class Exchange:
    """The driver's side, of one actor."""

    def __init__(self, call: Call, explain: Callable[[BaseException], Exception]) -> None:
        """`explain` says what a prompt raises when a whole call failed with an error."""
        self._call, self._explain = call, explain
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[tuple[Group, Part]]] = {}
        self._unsent: list[Numbered] = []
        self._num_calls = 0

    async def run(self, prompt: Prompt) -> Group:
        """The prompt's group, its tokens as a `Part`; or its own error, or that of the actor."""
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        self._waiting[number] = finished = loop.create_future()
        if not self._unsent:
            loop.call_soon(self._send)  # after everybody who is ready to run now, and may have a prompt too
        self._unsent.append((number, prompt))
        try:
            group, part = await finished
        finally:
            self._waiting.pop(number, None)
        return replace(group, prompt=prompt, trajectories=part)

    def _send(self) -> None:
        prompts, self._unsent = self._unsent, []
        try:
            answers, batch = self._call(prompts)
        except Exception as error:
            self._fail(error)
            return
        self._num_calls += 1
        answers.add_done_callback(partial(self._take, batch))

    def _take(self, batch: Any, answers: asyncio.Future[list[Answer]]) -> None:
        self._num_calls -= 1
        if answers.cancelled():
            return
        if (error := answers.exception()) is not None:
            self._fail(error)
            return
        for index, (number, outcome) in enumerate(answers.result()):
            finished = self._waiting.pop(number, None)
            if finished is None or finished.done():
                continue  # nobody waits for it any more
            if isinstance(outcome, Exception):
                finished.set_exception(outcome)
            else:
                finished.set_result((outcome, Part(batch, index)))
        if self._waiting and not self._num_calls and not self._unsent:
            self._send()

    def _fail(self, error: BaseException) -> None:
        failed, self._waiting, self._unsent = self._waiting, {}, []
        for finished in failed.values():
            if not finished.done():
                explained = self._explain(error)
                explained.__cause__ = error
                finished.set_exception(explained)


def _portable(error: Exception) -> Exception:
    """The error with the stack of this process as a note; one that does not survive the journey, as a likeness."""
    error.add_note(f"in the rollout actor:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        likeness = RuntimeError(f"{type(error).__name__}: {error}")
        likeness.kind = getattr(error, "kind", type(error).__name__)  # type: ignore[attr-defined]
        likeness.__notes__ = error.__notes__
        return likeness
    return error
