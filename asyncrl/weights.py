"""Versioned weights: buckets, the digest, what leaves the learner.

    learner (rank 0)                     engines (ranks 1..n)
    -----------------------------        ----------------------------------------
    step -> version v
    broadcast bucket 0  ---------------> pause; receive bucket 0
    broadcast bucket k  ---------------> receive bucket k
    digest of v                          resume(v) -> digest of what was loaded
            \\____ compared by the driver: any difference ends the run ____/

The broadcast itself is in `transport.py`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncrl.transport import BroadcastGroup

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DIGEST_CHUNK = 1 << 24
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


def digest_of(buckets: Iterable[Bucket], tensors: dict[str, Tensor]) -> str:
    """The digest that these tensors have when they travel in these buckets."""
    device = next(iter(tensors.values())).device
    return digest((bucket, flat_digest(bucket.pack(tensors, device))) for bucket in buckets)


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
