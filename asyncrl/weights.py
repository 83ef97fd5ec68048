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

import functools
import hashlib
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import TCPStore

from asyncrl.ipc import IN_FLIGHT
from asyncrl.training.sharding import whole
from asyncrl.transport import Audience, BroadcastGroup, Rendezvous, open_rendezvous

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"
"""How the names of an adapter's two parameters end; what is before is the name of the layer that it belongs to."""
_DIGEST_ROW = 1 << 12
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel as one flat byte buffer, in this order."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [
            math.prod(shape) * DTYPES[dtype].itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def empty(self, device: torch.device) -> Tensor:
        """A buffer for it, uint8[num_bytes]."""
        return torch.empty(self.num_bytes, dtype=torch.uint8, device=device)

    def pack(self, tensors: Mapping[str, Tensor], flat: Tensor) -> Tensor:
        """Fills `flat`, uint8[num_bytes], in the bucket's dtypes, and returns it. Of split tensors, on every rank."""
        for tensor, dtype, part in zip(self._whole_tensors(tensors), self.dtypes, flat.split(self.sizes), strict=True):
            wanted = DTYPES[dtype]
            if part.storage_offset() % wanted.itemsize == 0:
                part.view(wanted).view(tensor.shape).copy_(tensor)  # cast where it goes, in one pass
            else:
                part.copy_(tensor.to(wanted).flatten().view(torch.uint8))
        return flat

    def gather(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes part in another rank's `pack`."""
        for _ in self._whole_tensors(tensors):
            pass

    def _whole_tensors(self, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        for name, dtype in zip(self.names, self.dtypes, strict=True):
            yield whole(tensors[name].detach(), DTYPES[dtype])

    def unpack(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and views into `flat`, uint8[num_bytes]."""
        for name, dtype, shape, part in zip(self.names, self.dtypes, self.shapes, flat.split(self.sizes), strict=True):
            # A view needs aligned storage; a part that starts at an odd offset is copied.
            aligned = part if part.storage_offset() % DTYPES[dtype].itemsize == 0 else part.clone()
            yield name, aligned.view(DTYPES[dtype]).view(shape)


def make_buckets(tensors: Iterable[tuple[str, Tensor]], dtype: str, max_bytes: int) -> list[Bucket]:
    """Cuts named tensors into buckets of at most `max_bytes` each; a larger tensor gets a bucket of its own."""
    buckets: list[Bucket] = []
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    filled = 0

    def close() -> None:
        if names:
            buckets.append(Bucket(tuple(names), (dtype,) * len(names), tuple(shapes)))
            names.clear()
            shapes.clear()

    for name, tensor in tensors:
        size = tensor.numel() * DTYPES[dtype].itemsize
        if names and filled + size > max_bytes:
            close()
            filled = 0
        names.append(name)
        shapes.append(tuple(tensor.shape))
        filled += size
    close()
    return buckets


def flat_digest(flat: Tensor) -> Tensor:
    """A 64-bit checksum of a buffer's bytes that depends on their order: int64[], on the buffer's device.

    sum_rc G (2c + 1 + 2G (2r + 1)) word[r, c] mod 2^64, over 8-byte words (the last one filled up with zeros) in rows
    of 2^12: sums of columns and sums of rows, so that the buffer is read twice and nothing of its size is written.
    Wrapping integer addition is associative, so every device gets the same number in whatever order it adds. Factors
    are odd, so any single word that changes is seen. A checksum against accidents, not against attacks.
    """
    if len(flat) % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8))
    words = flat.view(torch.int64)
    num_rows = len(words) // _DIGEST_ROW
    rows, rest = words[: num_rows * _DIGEST_ROW].view(num_rows, _DIGEST_ROW), words[num_rows * _DIGEST_ROW :]
    of_columns = rows.sum(0)
    of_columns[: len(rest)] += rest
    of_rows = torch.cat((rows.sum(1), rest.sum().view(1)))
    # A power of two, so that buckets of many sizes share few of them.
    odd = _odd_numbers(words.device, 1 << max(_DIGEST_ROW, num_rows + 1).bit_length())
    by_column, by_row = (of_columns * odd[:_DIGEST_ROW]).sum(), (of_rows * odd[: num_rows + 1]).sum()
    return (by_column + by_row * _GOLDEN * 2) * _GOLDEN


@functools.lru_cache(maxsize=8)
def _odd_numbers(device: torch.device, count: int) -> Tensor:
    return 2 * torch.arange(count, dtype=torch.int64, device=device) + 1


def digest(received: Iterable[tuple[Bucket, Tensor]]) -> str:
    """The digest of a version: one short hexadecimal word from its buckets and their `flat_digest`, int64[] each."""
    pairs = list(received)
    values = torch.stack([value for _, value in pairs]).tolist()
    lines = [f"{bucket}:{value % 2**64:016x}" for (bucket, _), value in zip(pairs, values, strict=True)]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def digest_of(buckets: Iterable[Bucket], tensors: Mapping[str, Tensor]) -> str:
    """The digest that these tensors have when they travel in these buckets."""
    device = next(iter(tensors.values())).device
    return digest((bucket, flat_digest(bucket.pack(tensors, bucket.empty(device)))) for bucket in buckets)


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
