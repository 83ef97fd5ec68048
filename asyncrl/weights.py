"""Versioned weights: buckets, the broadcast group, the digest.

    learner (rank 0)                     engines (ranks 1..n)
    -----------------------------        ----------------------------------------
    step -> version v
    broadcast bucket 0  ---------------> pause; receive bucket 0
    broadcast bucket k  ---------------> receive bucket k
    digest of v                          resume(v) -> digest of what was loaded
            \\____ compared by the driver: any difference ends the run ____/

The same code runs over gloo (CPUs), NCCL (a GPU for each rank) and CUDA IPC (ranks that share a GPU). The group is
built straight from the backend class instead of through the default process group, so that it can be left and rebuilt
while a run goes on and so that several ranks may live in one process.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from torch.multiprocessing.reductions import reduce_tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DIGEST_CHUNK = 1 << 24
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_group_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where a broadcast group meets. `host` is the learner's node; `name` differs for every group ever built."""

    host: str
    port: int
    world_size: int
    name: str
    backend: str = "gloo"
    timeout_s: float = 120.0


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
            torch.Size(shape).numel() * DTYPES[dtype].itemsize
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def pack(self, tensors: dict[str, Tensor], device: torch.device) -> Tensor:
        """The flat buffer, uint8[num_bytes], cast to the bucket's dtypes."""
        parts = [
            tensors[name].detach().to(device=device, dtype=DTYPES[dtype]).contiguous().flatten().view(torch.uint8)
            for name, dtype in zip(self.names, self.dtypes, strict=True)
        ]
        return torch.cat(parts)

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

    sum_c (2c + 1) * sum_i (2i + 1) * G * word[c, i] mod 2^64, over 8-byte words (the last one filled up with zeros) in
    chunks of 2^24. Wrapping integer addition is associative, so every device gets the same number in whatever order it
    adds. Factors are odd, so any single word that changes is seen. A checksum against accidents, not against attacks.
    """
    if len(flat) % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8))
    words = flat.view(torch.int64)
    factors = _digest_factors(words.device, min(len(words), _DIGEST_CHUNK))
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for number, chunk in enumerate(words.split(_DIGEST_CHUNK)):
        total += (2 * number + 1) * (chunk * factors[: len(chunk)]).sum()
    return total


@functools.lru_cache(maxsize=8)
def _digest_factors(device: torch.device, count: int) -> Tensor:
    return (2 * torch.arange(count, dtype=torch.int64, device=device) + 1) * _GOLDEN


def digest(received: Iterable[tuple[Bucket, Tensor]]) -> str:
    """The digest of a version: one short hexadecimal word from its buckets and their `flat_digest`, int64[] each."""
    pairs = list(received)
    values = torch.stack([value for _, value in pairs]).tolist()
    lines = [f"{bucket}:{value % 2**64:016x}" for (bucket, _), value in zip(pairs, values, strict=True)]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def open_rendezvous(host: str, world_size: int, timeout_s: float, backend: str = "gloo") -> tuple[Rendezvous, TCPStore]:
    """A new meeting point on this node, on a free port; the store must be kept until all members have joined."""
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
    name = f"asyncrl-{store.port}-{next(_group_numbers)}"
    return Rendezvous(host, store.port, world_size, name, backend, timeout_s), store


def digest_of(buckets: Iterable[Bucket], tensors: dict[str, Tensor]) -> str:
    """The digest that these tensors have when they travel in these buckets."""
    device = next(iter(tensors.values())).device
    return digest((bucket, flat_digest(bucket.pack(tensors, device))) for bucket in buckets)


class BroadcastGroup:
    """One member of the group that weights travel through. Rank 0 is the learner and the source of every broadcast."""

    def __init__(self, where: Rendezvous, rank: int, address: str = "127.0.0.1", store: TCPStore | None = None) -> None:
        """Blocks until all members have arrived. `address` is this member's own node, for the gloo transport;
        `store` is the opened meeting point, at rank 0.

        Raises `RuntimeError` naming the rendezvous when the others do not arrive within `where.timeout_s`.
        """
        timeout = timedelta(seconds=where.timeout_s)
        self.where, self.rank = where, rank
        try:
            store = store or TCPStore(where.host, where.port, where.world_size, timeout=timeout, wait_for_workers=False)
            self._group = _backend(where, PrefixStore(where.name, store), rank, address, timeout)
        except Exception as error:
            raise RuntimeError(
                f"rank {rank} of {where.world_size} could not join the broadcast group {where.name!r} at "
                f"{where.host}:{where.port} within {where.timeout_s:g} s: {error}"
            ) from error

    @property
    def device(self) -> torch.device:
        """Where buffers must live to travel through this group."""
        return torch.device("cpu" if self.where.backend == "gloo" else "cuda")

    def start(self, flat: Tensor) -> Callable[[], None]:
        """Begins to send from rank 0, or to fill `flat` (uint8) in place elsewhere. Call what it returns to wait.

        A member whose broadcast fails leaves the group, so that the others hear of it at once and not by their timeout.
        """
        failed = (
            f"rank {self.rank}: broadcast of {flat.numel()} bytes failed or took longer than {self.where.timeout_s:g} s"
        )
        try:
            work = self._group.broadcast(flat, 0)
        except Exception as error:
            self._group = None
            raise RuntimeError(f"{failed}: {error}") from error

        def wait() -> None:
            nonlocal work
            try:
                work.wait()
                _synchronize(flat)  # the wait above is of the stream, not of this thread
            except Exception as error:
                self._group = work = None  # both hold connections open
                raise RuntimeError(f"{failed}: {error}") from error

        return wait

    def broadcast(self, flat: Tensor) -> None:
        """`start` and its wait. Blocks; call it from a thread of its own."""
        self.start(flat)()


def _backend(where: Rendezvous, store: Any, rank: int, address: str, timeout: timedelta) -> Any:
    if where.backend == "gloo":
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        return ProcessGroupGloo(store, rank, where.world_size, options)
    if where.backend == "nccl":
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group: Any = torch.distributed.ProcessGroupNCCL(store, rank, where.world_size, options)
        # NCCL meets at the first collective. Here, so that a member that is missing is missed at the join.
        group.broadcast(torch.zeros(1, device="cuda"), 0).wait()
        torch.cuda.synchronize()
        return group
    if where.backend == "ipc":
        return _IpcGroup(store, rank, where.world_size, timeout)
    raise ValueError(f"weights.backend must be 'gloo', 'nccl' or 'ipc', got {where.backend!r}")


class _IpcGroup:
    """Ranks that share one GPU: rank 0 hands out its buffer by a CUDA IPC handle, the others copy from it.

    NCCL refuses two ranks on one GPU, and gloo would take every byte through the host. The store carries the handles,
    which are pickles: like every store of torch it must be reachable for the members of the run only.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout: timedelta) -> None:
        self._store, self._rank, self._world_size, self._timeout = store, rank, world_size, timeout
        self._number = 0
        self._count("join", world_size).wait()

    def broadcast(self, flat: Tensor, _root: int) -> _Receipt:
        """Hands `flat` out at rank 0, fills it elsewhere. The receipt is of all ranks."""
        self._number += 1
        name = f"broadcast-{self._number}"
        if self._rank == 0:
            self._forget(f"broadcast-{self._number - 2}")
            _synchronize(flat)  # the others' copies are ordered by nothing else
            self._store.set(name, _export(flat))
            return _Receipt(self._store, name, self._timeout)
        self._store.wait([name], self._timeout)
        try:
            flat.copy_(_open(self._store.get(name)))
            _synchronize(flat)
        except Exception as error:
            self._count(name, self._world_size - 1, f"rank {self._rank}: {error}")
            raise
        return self._count(name, self._world_size - 1)

    def _count(self, name: str, expected: int, failure: str = "") -> _Receipt:
        """The last rank to come opens the way for all, and so does the first to fail."""
        if self._store.add(f"{name}/count", 1) == expected or failure:
            self._store.compare_set(f"{name}/all", "", failure)  # a failure that is there stays
        return _Receipt(self._store, name, self._timeout)

    def _forget(self, name: str) -> None:
        """Every rank has its receipt of the broadcast before the last, as it took part in the last one."""
        for key in (name, f"{name}/count", f"{name}/all"):
            self._store.delete_key(key)


@dataclass(frozen=True, slots=True)
class _Receipt:
    """A broadcast that every rank takes part in."""

    store: Any
    name: str
    timeout: timedelta

    def wait(self) -> None:
        """Raises the first failure of any rank."""
        key = f"{self.name}/all"
        self.store.wait([key], self.timeout)
        if failure := self.store.get(key):
            raise RuntimeError(failure.decode())


def _export(flat: Tensor) -> bytes:
    return pickle.dumps(reduce_tensor(flat))


def _open(handle: bytes) -> Tensor:
    rebuild, arguments = pickle.loads(handle)
    opened: Tensor = rebuild(*arguments)
    return opened


def _synchronize(flat: Tensor) -> None:
    if flat.is_cuda:
        torch.cuda.current_stream().synchronize()


def publish(group: BroadcastGroup, buckets: Sequence[Bucket], tensors: dict[str, Tensor]) -> str:
    """Broadcasts one version from rank 0; returns the digest of what was sent."""
    return Outgoing(buckets, tensors, group.device).send(group)


class Outgoing:
    """One version on its way out, on the learner's side. The first bucket is put together when this is made.

    So that is done before the engines are asked to pause, and each later bucket is put together while the one before it
    travels; two of them exist at a time.
    """

    def __init__(self, buckets: Sequence[Bucket], tensors: dict[str, Tensor], device: torch.device) -> None:
        self._buckets, self._tensors, self._device = buckets, tensors, device
        self._digests: list[Tensor] = []
        self._ready: Tensor | None = self._pack(0)

    def send(self, group: BroadcastGroup) -> str:
        """Broadcasts every bucket in order; returns the digest of what was sent."""
        for number in range(len(self._buckets)):
            assert self._ready is not None
            wait = group.start(self._ready)
            sent, self._ready = self._ready, self._pack(number + 1)
            wait()
            del sent  # it had to live until here
        return digest(zip(self._buckets, self._digests, strict=True))

    def _pack(self, number: int) -> Tensor | None:
        if number == len(self._buckets):
            return None
        flat = self._buckets[number].pack(self._tensors, self._device)
        self._digests.append(flat_digest(flat))
        return flat
