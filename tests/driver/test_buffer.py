"""The buffer against a model of its rules: the bound, the slots, the order, back-pressure, reuse."""

import asyncio
import functools
from collections import Counter

import helpers
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from asyncrl.driver.buffer import Buffer, Ticket
from asyncrl.types import Group, Prompt


def group(number: int, version: int) -> Group:
    return Group(Prompt(number, (1,), ""), (0.0, 1.0), (1, 1), version, version, {}, {}, ())


run = functools.partial(helpers.run, seconds=20)


async def ready(awaitable) -> bool:
    """Whether it completes without anything else happening."""
    task = asyncio.ensure_future(awaitable)
    for _ in range(5):
        await asyncio.sleep(0)
    if task.done():
        await task
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


class Simulation:
    """Drives a buffer with arbitrary completion order and drops, as the loop would, and keeps its own accounts."""

    def __init__(self, buffer: Buffer, choices) -> None:
        self.buffer, self.choices = buffer, choices
        self.version, self.live, self.admitted = 0, 0, 0
        self.generating: dict[int, tuple[Ticket, int]] = {}
        self.trained: Counter[int] = Counter()
        self.dropped: set[int] = set()
        self.lags: list[int] = []
        self.batches: list[list[int]] = []

    async def fill(self) -> None:
        while self.buffer.charged < self.buffer.capacity:
            ticket = await self.buffer.admit()
            self.generating[ticket.number] = (ticket, self.live)
            self.admitted += 1
        assert not await ready(self.buffer.admit())

    def finish_one(self) -> None:
        number = self.choices(sorted(self.generating))
        ticket, version = self.generating.pop(number)
        if self.choices([False] * 9 + [True]):
            self.buffer.drop(ticket, "test")
            self.dropped.add(number)
        else:
            self.buffer.put(ticket, group(number, version))

    async def step(self) -> None:
        batch: list[Group] = []

        async def take() -> None:
            batch.extend(await self.buffer.take(self.version))

        while not await ready(take()):
            if self.live < self.version and self.choices([True, False]):
                await self.go_live()
                continue
            await self.fill()  # reused groups that expired gave their slots back, and producers take them at once
            if not self.generating:
                assert self.live < self.version, "the buffer waits although nothing is being generated"
                await self.go_live()
                continue
            self.finish_one()
            await self.fill()
        numbers = [item.prompt.id for item in batch]
        assert len(set(numbers)) == len(numbers) == self.buffer.groups_per_step
        self.batches.append(numbers)
        self.lags += [self.version - item.oldest for item in batch]
        self.trained.update(numbers)
        if self.live < self.version:  # this batch's gradient was computed while the weights travelled
            await self.go_live()
        self.version += 1
        if self.choices([True, False]):
            await self.go_live()

    async def go_live(self) -> None:
        self.live = self.version
        self.buffer.release()
        await self.fill()


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "groups_per_step": st.integers(1, 5),
            "max_staleness": st.integers(0, 4),
            "window": st.just(1) | st.integers(1, 30),
            "reuse": st.integers(1, 3),
        }
    ),
    st.randoms(use_true_random=False),
)
def test_bound_slots_and_accounts_hold(settings, random):
    buffer = Buffer(**settings)
    simulation = Simulation(buffer, random.choice)

    async def play():
        await simulation.fill()
        for _ in range(25):
            await simulation.step()

    run(play())
    assert max(simulation.lags) <= buffer.max_lag
    assert max(simulation.trained.values()) <= buffer.reuse
    known = set(simulation.trained) | simulation.dropped | set(simulation.generating) | set(buffer._ready)
    assert known == set(range(simulation.admitted)), "a group was lost"
    if settings["window"] == 1 and buffer.reuse == 1:
        order = [number for batch in simulation.batches for number in batch]
        assert order == sorted(order)
        assert buffer.max_lag == settings["max_staleness"]


@pytest.mark.parametrize(("staleness", "window", "bound"), [(0, 8, 0), (3, 1, 3), (3, 10, 5), (3, 32, 7), (1, 8, 2)])
def test_bound_is_reached_by_a_straggler(staleness, window, bound):
    """The bound is tight: one prompt that never finishes until everybody allowed has overtaken it."""

    async def play() -> int:
        buffer = Buffer(8, staleness, window=window)
        assert buffer.max_lag == bound
        tickets, version = {}, 0
        straggler, lag = None, None
        while lag is None:
            while buffer.charged < buffer.capacity:
                ticket = await buffer.admit()
                tickets[ticket.number] = (ticket, version)
                # Admitted last into a full buffer at the start of a step: everything older goes first.
                if straggler is None and version == 2 and buffer.charged == buffer.capacity:
                    straggler = ticket.number
            for number in [n for n in tickets if n != straggler]:
                ticket, born = tickets.pop(number)
                buffer.put(ticket, group(number, born))
            taking = asyncio.ensure_future(buffer.take(version))
            await asyncio.sleep(0)
            if not taking.done():  # everybody allowed has overtaken it
                ticket, born = tickets.pop(straggler)
                buffer.put(ticket, group(straggler, born))
            batch = await taking
            lag = next((version - item.oldest for item in batch if item.prompt.id == straggler), None)
            version += 1
            buffer.release()
        return lag

    assert run(play()) == bound


def test_windowed_order_lets_exactly_window_minus_one_overtake():
    async def play():
        buffer = Buffer(1, 7, window=4)
        tickets = [await buffer.admit() for _ in range(8)]
        for ticket in tickets[1:]:
            buffer.put(ticket, group(ticket.number, 0))
        overtaken = []
        while await ready(take_one(buffer, overtaken)):
            buffer.release()
        assert overtaken == [1, 2, 3]
        buffer.put(tickets[0], group(0, 0))
        await take_one(buffer, overtaken)
        assert overtaken[-1] == 0

    async def take_one(buffer, into):
        into += [item.prompt.id for item in await buffer.take(0)]

    run(play())


def test_admission_waits_for_release_not_for_take():
    async def play():
        buffer = Buffer(2, 0)
        for number in range(2):
            buffer.put(await buffer.admit(), group(number, 0))
        assert not await ready(buffer.admit())
        await buffer.take(0)
        assert not await ready(buffer.admit()), "prompts admitted before release would see old weights"
        buffer.release()
        assert await ready(buffer.admit())

    run(play())


def test_a_cancelled_waiter_passes_its_turn_on():
    async def play():
        buffer = Buffer(1, 0)
        ticket = await buffer.admit()
        first, second = asyncio.ensure_future(buffer.admit()), asyncio.ensure_future(buffer.admit())
        await asyncio.sleep(0)
        buffer.drop(ticket, "test")
        first.cancel()
        assert (await second).number == 1
        assert buffer.dropped == {"test": 1}

    run(play())


def test_reused_groups_fill_the_batch_until_spent():
    async def play():
        buffer = Buffer(2, 0, reuse=2)
        for number in range(2):
            buffer.put(await buffer.admit(), group(number, 0))
        first = [item.prompt.id for item in await buffer.take(0)]
        buffer.release()
        assert buffer.charged == 2, "groups that may be trained again keep their slots"
        again = [item.prompt.id for item in await buffer.take(1)]
        buffer.release()
        assert first == again == [0, 1]
        assert buffer.charged == 0

    run(play())


def test_a_batch_of_groups_that_are_given_out_again_is_ready_with_their_release():
    """At staleness 0 all slots are theirs, so no new group will come and wake whoever waits."""

    async def body():
        buffer = Buffer(2, 0, reuse=2)
        for number in range(2):
            buffer.put(await buffer.admit(), group(number, 0))
        assert len(await buffer.take(0)) == 2
        waiting = asyncio.ensure_future(buffer.take(1))
        await asyncio.sleep(0)
        buffer.release()
        assert sorted(given.prompt.id for given in await waiting) == [0, 1]

    run(body())


def test_close_releases_everyone_who_waits():
    async def play():
        buffer = Buffer(1, 0)
        await buffer.admit()
        waiters = [asyncio.ensure_future(buffer.admit()), asyncio.ensure_future(buffer.take(0))]
        await asyncio.sleep(0)
        buffer.close()
        assert await asyncio.gather(*waiters) == [None, []]

    run(play())


def test_broken_use_is_refused():
    async def play():
        buffer = Buffer(1, 0)
        ticket = await buffer.admit()
        buffer.put(ticket, group(0, 0))
        with pytest.raises(RuntimeError, match="spent before"):
            buffer.drop(ticket, "twice")
        with pytest.raises(RuntimeError, match="above the bound 0"):
            await buffer.take(1)
        with pytest.raises(ValueError, match="groups_per_step"):
            Buffer(0, 0)

    run(play())
