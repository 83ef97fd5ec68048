"""A model's own loader, watched at the first update and repeated at later ones.

first   bucket -> model.load_weights, which finds the place of each tensor by its name; every copy is noted
later   bucket -> the same copies, of small tensors in one call

In Python the places of 290 tensors take some 7 ms, and for small models that is a good part of a pause. A loader that
does more than copy is called each time, and so is one whose copies are not seen, such as those of other threads: only
what took something out of every tensor is repeated.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from asyncrl.weights.buckets import Bucket

_Place: TypeAlias = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]
"""Dtype, shape, strides and offset of a tensor inside a bucket's buffer."""
_SMALL = 1 << 24
"""Bytes up to which tensors are copied together: that saves launches, and takes half as long again for large ones."""


@dataclass(slots=True)
class _Copies:
    """Copies from a buffer to places that do not overlap, so that their order does not matter."""

    targets: list[Tensor] = field(default_factory=list)
    sources: list[_Place] = field(default_factory=list)
    spans: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Where each storage is written."""

    def add(self, target: Tensor, source: Tensor) -> bool:
        """False if the target overlaps one that is there, and is not added."""
        begin, end = _span(target)
        written = self.spans.setdefault(target.untyped_storage().data_ptr(), [])
        if any(begin < other_end and other_begin < end for other_begin, other_end in written):
            return False
        written.append((begin, end))
        self.targets.append(target)
        self.sources.append((source.dtype, tuple(source.shape), source.stride(), int(source.storage_offset())))
        return True

    def repeat(self, flat: Tensor) -> None:
        typed = {dtype: flat.view(dtype) for dtype, *_ in self.sources}
        targets, sources = [], []
        for target, (dtype, size, stride, begin) in zip(self.targets, self.sources, strict=True):
            source = typed[dtype].as_strided(size, stride, begin)
            if target.nbytes > _SMALL:
                target.copy_(source)
            else:
                targets.append(target)
                sources.append(source)
        if targets:
            torch._foreach_copy_(targets, sources)


@dataclass(frozen=True, slots=True)
class _Fill:
    """A constant, where a parameter is longer than the tensor that goes into it."""

    target: Tensor
    value: float

    def repeat(self, _: Tensor) -> None:
        self.target.fill_(self.value)


class Loader:
    """Loads buckets into a model. Between two loads nobody may give the model other parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[Bucket, list[_Copies | _Fill] | None] = {}

    @torch.no_grad()
    def load(self, bucket: Bucket, flat: Tensor) -> None:
        """`flat`: the bucket's buffer, uint8[num_bytes]."""
        if bucket not in self._seen:
            with _Watch(flat) as watch:
                self._model.load_weights(list(bucket.unpack(flat)))  # type: ignore[operator]
            self._seen[bucket] = watch.steps if watch.has_read(bucket) else None
        elif (steps := self._seen[bucket]) is None:
            self._model.load_weights(list(bucket.unpack(flat)))  # type: ignore[operator]
        else:
            for step in steps:
                step.repeat(flat)


class _Watch(TorchDispatchMode):
    """Notes what is done with the buffer `flat`. `steps` is None if it was more than views, copies and constants."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__()
        self._buffer = flat.untyped_storage().data_ptr()
        self.steps: list[_Copies | _Fill] | None = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.steps is not None and not _is_view(function):
            if function is torch.ops.aten.copy_.default and self._holds(args[1]) and not self._holds(args[0]):
                self._note_copy(args[0], args[1])
            elif function is torch.ops.aten.fill_.Scalar and not self._holds(args[0]):
                self.steps.append(_Fill(args[0], args[1]))
            else:
                self.steps = None
        return function(*args, **(kwargs or {}))

    def has_read(self, bucket: Bucket) -> bool:
        """Whether the copies that were seen took something out of every tensor of the bucket."""
        copies = [step for step in self.steps or [] if isinstance(step, _Copies)]
        begins = {begin * dtype.itemsize for step in copies for dtype, _, _, begin in step.sources}
        ends = list(accumulate(bucket.sizes))
        return len({bisect_right(ends, begin) for begin in begins}) == len(ends)

    def _holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self._buffer

    def _note_copy(self, target: Tensor, source: Tensor) -> None:
        assert self.steps is not None
        copies = self.steps[-1] if self.steps else None
        if not isinstance(copies, _Copies) or not copies.add(target, source):
            self.steps.append(copies := _Copies())
            copies.add(target, source)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses from the first byte to behind the last one."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.itemsize


def _is_view(function: Any) -> bool:
    """Whether what it returns shares memory with what it was given, and nothing is written."""
    aliases = [value.alias_info for value in function._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
