"""Versioned weights: buckets, the digest, what leaves the learner.

    learner (rank 0)                     engines (ranks 1..n)
    -----------------------------        ----------------------------------------
    step -> version v
    broadcast bucket 0  ---------------> pause; receive bucket 0
    broadcast bucket k  ---------------> receive bucket k; load bucket k - 1
    digest of v                          resume(v) -> digest of what was loaded
            \\____ compared by the driver: any difference ends the run ____/

The broadcast itself is in `transport.py`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import TCPStore

from asyncrl.weights.broadcast import Audience, BroadcastGroup, Rendezvous, open_rendezvous
from asyncrl.weights.buckets import Bucket, digest, flat_digest
from asyncrl.weights.ipc import IN_FLIGHT


def receive(group: BroadcastGroup, buckets: Sequence[Bucket], load: Callable[[Bucket, Tensor], None]) -> None:
    """Takes part in the broadcast of each bucket and hands it to `load`, in order, as uint8[num_bytes]."""
    arriving = iter(buckets)
    _travel(group, (bucket.empty(group.device) for bucket in buckets), lambda flat: load(next(arriving), flat))


def _travel(group: BroadcastGroup, buffers: Iterator[Tensor], arrived: Callable[[Tensor], None]) -> None:
    """Broadcasts the buffers in order. `IN_FLIGHT` of them exist at a time: while one is made or is dealt with after it
    has arrived, the other one travels."""
    on_their_way = deque[tuple[Tensor, Callable[[], None]]]()
    try:
        while True:
            while len(on_their_way) < IN_FLIGHT and (flat := next(buffers, None)) is not None:
                on_their_way.append((flat, group.start(flat)))
            if not on_their_way:
                return
            flat, wait = on_their_way.popleft()
            wait()
            arrived(flat)
            del flat  # which makes room for the next one
    finally:
        on_their_way.clear()  # a traceback would keep them, and with them connections that should be closed


class Outgoing:
    """One version on its way out, on the learner's side. The first bucket is put together when this is made.

    So that is done before the engines are asked to pause, and each later bucket is put together while the one before it
    travels. On a GPU all of it has a stream of its own, so that it does not queue behind the gradient of the next step.
    Where the tensors are split between learner ranks, putting together is a gather that every rank makes one of these
    for; only the first has a group to send to.
    """

    def __init__(self, buckets: Sequence[Bucket], tensors: Mapping[str, Tensor], group: BroadcastGroup | None) -> None:
        """`group`: where they go, and whose buffers they are put together in; None at a rank that only gives its
        parts."""
        self._buckets, self._tensors, self._group = buckets, tensors, group
        self._largest = max(bucket.num_bytes for bucket in buckets)
        self._num_gathered = 0
        self._digests: list[Tensor] = []
        self._stream = None
        if next(iter(tensors.values())).device.type == "cuda":
            self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # which does nothing for None
            self._ready = self._next()

    def send(self) -> str:
        """Broadcasts every bucket in order; returns the digest of what was sent, which is of nothing without a group.

        After a failure the remaining buckets are still gathered: the other ranks cannot know, and would wait.
        """
        group = self._group
        with torch.cuda.stream(self._stream):
            try:
                if group is not None:
                    _travel(group, self._put_together(), lambda _: None)
            finally:
                self._group = self._ready = None
                while self._num_gathered < len(self._buckets):
                    self._next()
            return digest(zip(self._buckets, self._digests, strict=True)) if group is not None else ""

    def _put_together(self) -> Iterator[Tensor]:
        while self._ready is not None:
            flat, self._ready = self._ready, None
            yield flat
            self._ready = self._next()

    def _next(self) -> Tensor | None:
        if self._num_gathered == len(self._buckets):
            return None
        bucket = self._buckets[self._num_gathered]
        self._num_gathered += 1
        if self._group is None:
            bucket.gather(self._tensors)
            return None
        flat = bucket.pack(self._tensors, self._group.buffer(bucket.num_bytes, self._largest))
        self._digests.append(flat_digest(flat))
        return flat


class Sender:
    """The learner's side of its broadcast groups, one for each audience, and of the version on its way to each.

    Every learner rank has one; only the first is in the groups, the others give their parts.
    """

    def __init__(self, address: str, backend: str, timeout_s: float, *, is_first: bool) -> None:
        """`address`: this node's own; `timeout_s`: of the groups; `is_first`: whether this is the first rank."""
        self._address, self._backend, self._timeout_s, self._is_first = address, backend, timeout_s, is_first
        self._meetings: dict[Audience, tuple[Rendezvous, TCPStore]] = {}
        self._groups: dict[Audience, BroadcastGroup] = {}
        self._outgoing: dict[Audience, Outgoing] = {}
        self._slots = defaultdict[Audience, list[Tensor]](list)  # send buffers, which go from group to group

    def rendezvous(self, world_size: int, audience: Audience) -> Rendezvous:
        """Opens the meeting point of a new group, on this node; `join` then enters it as rank 0."""
        self._meetings[audience] = open_rendezvous(self._address, world_size, self._timeout_s, self._backend)
        return self._meetings[audience][0]

    def join(self, audience: Audience) -> None:
        """Leaves the group that the audience had, and blocks until every engine has joined the new one."""
        if audience in self._groups:
            self._groups.pop(audience).leave()
        where, store = self._meetings[audience]
        self._groups[audience] = BroadcastGroup(where, 0, self._address, store, self._slots[audience])

    def prepare(self, audience: Audience, buckets: Sequence[Bucket], tensors: Mapping[str, Tensor]) -> None:
        """Gets `tensors` ready to leave in `buckets`. Every rank."""
        group = self._groups.get(audience)
        if group is None and self._is_first:
            raise RuntimeError("prepare() before join()")
        self._outgoing[audience] = Outgoing(buckets, tensors, group)

    def broadcast(self, audience: Audience) -> str:
        """Sends what was prepared; returns its digest, which is empty but at the first rank. Every rank."""
        if audience not in self._outgoing:
            raise RuntimeError("broadcast() before join() and prepare()")
        return self._outgoing.pop(audience).send()
