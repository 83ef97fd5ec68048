"""Buckets: the tensors that travel as one flat buffer, and the digest of what is in them."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncrl.weights.dtensor import whole

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
