"""Split tensors (DTensor) made whole: for what is sent, and for products with split ones."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The full tensor, on every rank, which travels as `dtype`; a tensor that is not split is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    return (tensor if dtype is None else cast(DTensor, tensor.to(dtype))).full_tensor()


def replicate(tensor: Tensor) -> Tensor:
    """A split tensor with all of its rows on every rank, to compute with split ones; others as they are."""
    return tensor.redistribute(placements=[Replicate()]) if isinstance(tensor, DTensor) else tensor
