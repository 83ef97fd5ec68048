"""The bounded replay buffer: slots, order, the staleness bound, back-pressure, reuse.

    admit ---------> put ------------------> take ---------------> release
    charges a slot   the group is ready      P groups, in order    frees the slots once the weights
       |                                                           trained on them are live
       +-----------> drop(reason): frees the slot, counted

Staleness is bounded by admission, not by eviction. With P groups a step and a staleness target of S, there are
C = (S + 1) P slots, and a slot stays charged from `admit` to `release`. Between the admission of a group and its
training, only groups that held a slot before (at most C - 1) and younger ones that overtook it (at most window - 1)
can be trained, each at most `reuse` times, P of them a step. Its tokens are no older than its admission. Therefore

    lag <= max_lag = reuse * (C + window - 2) // P

and with strict order (window 1) and no reuse, max_lag = S. `take` asserts it for every group. Nothing is dropped for
age before it was trained once: dropping the old would drop the long, since long answers take longest to generate.

Holds metadata only, lives in the driver's event loop, and needs no lock.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, insort
from collections import Counter, deque
from dataclasses import dataclass

from asyncrl.types import Group, Version


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to fill one slot, spent once by `put` or `drop`. `number` counts admissions."""

    number: int


@dataclass(slots=True, eq=False)
class _Entry:
    ticket: Ticket
    group: Group
    ready_at: float
    uses: int = 0


class Buffer:
    """Groups on their way from the rollout actors to the learner."""

    def __init__(self, groups_per_step: int, max_staleness: int, *, window: int = 1, reuse: int = 1) -> None:
        """`window` - 1 younger groups may overtake a straggler; staleness 0 allows none."""
        if groups_per_step < 1 or max_staleness < 0 or window < 1 or reuse < 1:
            raise ValueError(
                "a buffer needs groups_per_step >= 1, max_staleness >= 0, window >= 1 and reuse >= 1; "
                f"got {groups_per_step}, {max_staleness}, {window}, {reuse}"
            )
        self.groups_per_step, self.staleness = groups_per_step, max_staleness
        self.capacity = (max_staleness + 1) * groups_per_step
        self.window = 1 if max_staleness == 0 else min(window, self.capacity)
        self.reuse = reuse
        self.max_lag = reuse * (self.capacity + self.window - 2) // groups_per_step if self.capacity > 1 else reuse - 1
        self.dropped: Counter[str] = Counter()
        self._next_number = 0
        self._pending: dict[int, Ticket] = {}  # admitted, not finished; in order of admission
        self._ready: dict[int, _Entry] = {}  # finished, not trained
        self._order: list[int] = []  # its keys, sorted
        self._taken: deque[list[_Entry]] = deque()  # the batches being trained or not yet live, the oldest first
        self._replays: dict[int, _Entry] = {}  # trained fewer than `reuse` times
        self._admissions: deque[asyncio.Future[None]] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def charged(self) -> int:
        """Slots in use."""
        return len(self._pending) + len(self._ready) + sum(map(len, self._taken)) + len(self._replays)

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    async def admit(self) -> Ticket | None:
        """Waits for a free slot and charges it; None once the buffer is closed."""
        while not self._closed and self.charged >= self.capacity:
            turn = asyncio.get_running_loop().create_future()
            self._admissions.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake_admissions(1)  # it was this waiter's turn: pass it on
                raise
        if self._closed:
            return None
        ticket = Ticket(self._next_number)
        self._next_number += 1
        self._pending[ticket.number] = ticket
        return ticket

    def put(self, ticket: Ticket, group: Group, uses: int = 0) -> None:
        """The group of `ticket` is finished and may be trained. `uses`: times that it was trained before a resume."""
        self._spend(ticket)
        entry = _Entry(ticket, group, time.monotonic(), uses)
        if uses:
            self._replays[ticket.number] = entry
        else:
            self._ready[ticket.number] = entry
            insort(self._order, ticket.number)
        self._changed.set()

    def drop(self, ticket: Ticket, reason: str) -> None:
        """Gives the slot back without a group, counted under `reason`."""
        self._spend(ticket)
        self.dropped[reason] += 1
        self._changed.set()  # the oldest outstanding ticket may have gone
        self._wake_admissions(1)

    async def take(self, version: Version) -> list[Group]:
        """Waits for the next batch of P groups for a learner at `version`; empty once the buffer is closed.

        Untrained groups go first; where they do not fill the batch, groups that were trained fewer than `reuse` times
        do. The batch before may still be on its way to the engines, the one before that not. Raises `RuntimeError` if a
        group is older than the bound: that would be a bug in this file.
        """
        if len(self._taken) > 1:
            raise RuntimeError("take() with two batches before it not released")
        while not self._closed:
            if batch := self._select(version):
                break
            self._changed.clear()
            await self._changed.wait()
        else:
            return []
        for entry in batch:
            lag = version - entry.group.oldest
            if lag > self.max_lag:
                raise RuntimeError(f"group {entry.group.prompt.id} has lag {lag}, above the bound {self.max_lag}")
        self._taken.append(batch)
        return [entry.group for entry in batch]

    def release(self) -> float:
        """The weights trained on the oldest batch are live: frees its slots. Returns its mean wait in seconds."""
        now = time.monotonic()
        batch = self._taken.popleft()
        for entry in batch:
            entry.uses += 1
            if entry.uses < self.reuse:
                self._replays[entry.ticket.number] = entry
        self._changed.set()  # a batch of groups that are given out again needs no new one
        self._wake_admissions(self.capacity - self.charged)
        return sum(now - entry.ready_at for entry in batch) / max(len(batch), 1)

    def discard(self, reason: str) -> None:
        """The newest batch was not trained and will not be: frees its slots, counted under `reason`."""
        self.dropped[reason] += len(self._taken.pop())
        self._wake_admissions(self.capacity - self.charged)

    def close(self) -> None:
        """No more admissions and no more batches: those waiting get None and []."""
        self._closed = True
        self._changed.set()
        self._wake_admissions(len(self._admissions))

    def _spend(self, ticket: Ticket) -> None:
        if self._pending.pop(ticket.number, None) is None:
            raise RuntimeError(f"ticket {ticket.number} was spent before or never issued")

    def _wake_admissions(self, count: int) -> None:
        while count > 0 and self._admissions:
            turn = self._admissions.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1

    def _select(self, version: Version) -> list[_Entry] | None:
        within_window = bisect_left(self._order, self._oldest_pending + self.window)
        picked = self._order[: min(within_window, self.groups_per_step)]
        missing = self.groups_per_step - len(picked)
        if missing > len(self._replays):
            return None
        self._expire_replays(version)
        if missing > len(self._replays):
            return None
        entries = [self._ready.pop(number) for number in picked]
        del self._order[: len(picked)]
        return entries + [self._replays.pop(number) for number in sorted(self._replays)[:missing]]

    @property
    def _oldest_pending(self) -> int:
        return next(iter(self._pending), self._next_number)

    def _expire_replays(self, version: Version) -> None:
        expired = [n for n, entry in self._replays.items() if version - entry.group.oldest > self.max_lag]
        for number in expired:
            del self._replays[number]
        self.dropped["reuse expired"] += len(expired)
        self._wake_admissions(len(expired))
