"""`sglang_sampling.draw` in one Triton kernel, as some fifty small ones cost more to launch than to run."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_GOLDEN: Any = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1: Any = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2: Any = tl.constexpr(0x94D049BB133111EB)


def draw(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Reads each row twice: for its total, and for where the share that the random number names is reached."""
    tokens = torch.empty(len(probs), dtype=torch.int32, device=probs.device)
    _draw[(len(probs),)](probs, probs.stride(0), probs.shape[1], seeds, positions, tokens, _BLOCK, num_warps=8)
    return tokens


@triton.jit  # type: ignore[untyped-decorator]
def _draw(probs, stride, size, seeds, positions, tokens, block: tl.constexpr):  # type: ignore # noqa: PLR0917
    row = tl.program_id(0)
    start = probs + row.to(tl.int64) * stride
    columns = tl.arange(0, block)
    total = tl.sum(tl.zeros([block], tl.float64))
    for begin in range(0, size, block):
        total += tl.sum(tl.load(start + begin + columns, begin + columns < size, 0.0).to(tl.float64))
    target = total * _uniform(tl.load(seeds + row), tl.load(positions + row))
    # The block is the first up to whose end the sum exceeds the target; what was before it is kept.
    chosen, before, summed = 0, total * 0, total * 0
    for begin in range(0, size, block):
        summed += tl.sum(tl.load(start + begin + columns, begin + columns < size, 0.0).to(tl.float64))
        passed = (summed <= target) & (begin + block < size)
        chosen = tl.where(passed, begin + block, chosen)
        before = tl.where(passed, summed, before)
    weights = tl.load(start + chosen + columns, chosen + columns < size, 0.0)
    reached = before + tl.cumsum(weights.to(tl.float64)) > target
    # Sums in another order end a last bit apart: a share at the very end of a block falls to its last token.
    last = tl.max(tl.where(weights > 0, columns, 0))
    first = tl.min(tl.where(reached & (weights > 0), columns, block))
    tl.store(tokens + row, (chosen + tl.minimum(first, last)).to(tl.int32))


@triton.jit
def _uniform(seed, position):  # type: ignore[no-untyped-def]
    """`sglang_sampling.uniforms` for one row."""
    mixed = _mix(_mix(seed.to(tl.uint64) + _GOLDEN) + (position.to(tl.uint64) + 1) * _GOLDEN)
    return (mixed >> 12).to(tl.float64) * 2.220446049250313e-16  # 2 ** -52


@triton.jit
def _mix(value):  # type: ignore[no-untyped-def]
    value = (value ^ (value >> 30)) * _MIX_1
    value = (value ^ (value >> 27)) * _MIX_2
    return value ^ (value >> 31)
