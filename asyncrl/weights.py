"""Versioned weights: buckets, the broadcast group, the digest.

    learner (rank 0)                     engines (ranks 1..n)
    -----------------------------        ----------------------------------------
    step -> version v
    broadcast bucket 0  ---------------> pause; receive bucket 0
    broadcast bucket k  ---------------> receive bucket k
    digest of v                          resume(v) -> digest of what was loaded
            \\____ compared by the driver: any difference ends the run ____/

The same code runs over gloo and NCCL. The group is built straight from the backend class instead of through the default
process group, so that it can be left and rebuilt while a run goes on and so that several ranks may live in one process.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DIGEST_CHUNK = 1 << 22
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


def tensor_digest(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's bits that depends on their order, the same on every device.

    sum_i (2i + 1) * word_i mod 2^64 over 16-bit words: wrapping integer addition is associative, so the order in which
    a device reduces does not matter. The odd factors make a swap of two different words visible.
    """
    words = tensor.detach().contiguous().flatten().view(torch.int16)
    total = 0
    for start in range(0, len(words), _DIGEST_CHUNK):
        chunk = words[start : start + _DIGEST_CHUNK].to(torch.int64)
        index = torch.arange(start, start + len(chunk), device=chunk.device, dtype=torch.int64)
        total += int((chunk * (2 * index + 1)).sum())
    return total % 2**64


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One short hexadecimal digest of named tensors, independent of their order. 2-byte and 4-byte dtypes only."""
    lines = sorted(f"{name}:{tensor_digest(tensor):016x}" for name, tensor in tensors)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def open_rendezvous(host: str, world_size: int, timeout_s: float, backend: str = "gloo") -> tuple[Rendezvous, TCPStore]:
    """A new meeting point on this node, on a free port; the store must be kept until all members have joined."""
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
    name = f"asyncrl-{store.port}-{next(_group_numbers)}"
    return Rendezvous(host, store.port, world_size, name, backend, timeout_s), store


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
            # The prefixes are those of torch's own group helper, so that engines that use it can be members too.
            prefixed = PrefixStore("cpu/", PrefixStore(f"{where.name}/", PrefixStore(where.name, store)))
            self._group = _backend(where, prefixed, rank, address, timeout)
        except Exception as error:
            raise RuntimeError(
                f"rank {rank} of {where.world_size} could not join the broadcast group {where.name!r} at "
                f"{where.host}:{where.port} within {where.timeout_s:g} s: {error}"
            ) from error

    def broadcast(self, flat: Tensor) -> None:
        """Sends from rank 0, fills `flat` (uint8) in place elsewhere. Blocks; call it from a thread of its own."""
        try:
            self._group.broadcast(flat, 0).wait()
        except Exception as error:
            raise RuntimeError(
                f"rank {self.rank}: broadcast of {flat.numel()} bytes failed or took longer than "
                f"{self.where.timeout_s:g} s: {error}"
            ) from error


def _backend(where: Rendezvous, store: Any, rank: int, address: str, timeout: timedelta) -> Any:
    if where.backend == "gloo":
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        return ProcessGroupGloo(store, rank, where.world_size, options)
    raise ValueError(f"weights.backend must be 'gloo', got {where.backend!r}")


def publish(group: BroadcastGroup, buckets: Sequence[Bucket], tensors: dict[str, Tensor], device: torch.device) -> str:
    """Learner side: broadcasts every bucket in order and returns the digest of what was sent."""
    sent: list[tuple[str, Tensor]] = []
    for bucket in buckets:
        flat = bucket.pack(tensors, device)
        group.broadcast(flat)
        sent.extend((name, tensor) for name, tensor in bucket.unpack(flat))
    return digest(sent)
