"""The output layer: log-prob and entropy of chosen tokens from hidden states, without all their logits at once.

    hidden [n, d] x weight [v, d] -> logits [chunk, v], float32 -> log-prob and entropy, float32[n]

The gradient is written out: the slope of a log-prob by the logits is `one_hot - p`, that of the entropy
`-p (log p + H)`. So a chunk's logits are made, read and dropped, and made once more in the backward pass; a single
chunk keeps them. Products may take bfloat16 and give float32, at twice the rate of float32 inputs on tensor cores
(TF32), and as an engine in bfloat16 rounds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Head:
    """A function of hidden states, targets and the output weight; it holds no parameter itself."""

    def __init__(self, *, temperature: float, chunk: int, bfloat16: bool, entropy: bool, compiled: bool) -> None:
        """`temperature`: of sampling. `chunk`: positions whose logits exist at a time. `bfloat16`: of the inputs of
        products. `entropy`: give the entropy a gradient. `compiled`: read logits in one kernel instead of several."""
        self.scale, self.chunk, self.entropy = 1.0 / temperature, chunk, entropy
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.read: Callable[..., tuple[Tensor, Tensor, Tensor]] = _compiled(_read) if compiled else _read
        self.slope: Callable[..., Tensor] = _compiled(_slope) if compiled else _slope

    def __call__(self, hidden: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob of each target and entropy of its distribution, float32[n] each.

        `hidden` float32 or bfloat16[n, d], `targets` int64[n], `weight` float32[v, d].
        """
        logprobs, entropies = _LogProbs.apply(hidden, weight, targets, self)
        return logprobs, entropies


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        matrix = weight.to(head.dtype)
        kept, parts = None, []
        for some, wanted in zip(hidden.split(head.chunk), targets.split(head.chunk), strict=True):
            logits = _product(some.to(head.dtype), matrix.T)
            parts.append(head.read(logits, wanted, head.scale))
            kept = logits if len(some) == len(hidden) else None
        logprobs, normalizers, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.head, ctx.kept = head, kept
        if not head.entropy:
            ctx.mark_non_differentiable(entropies)
        ctx.save_for_backward(hidden, weight, targets, logprobs, normalizers, entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, of_logprobs: Tensor, of_entropies: Tensor) -> tuple[Tensor | None, ...]:
        head: Head = ctx.head
        hidden, weight, *columns = ctx.saved_tensors
        matrix = weight.to(head.dtype)
        to_hidden, to_weight = [], torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        cut = [column.split(head.chunk) for column in (hidden, *columns, of_logprobs, of_entropies)]
        for some, targets, logprobs, normalizers, entropies, slopes, entropy_slopes in zip(*cut, strict=True):
            states = some.to(head.dtype)
            logits = _product(states, matrix.T) if ctx.kept is None else ctx.kept
            # By the unscaled logits: p_j (-slope - entropy_slope (log p_j + H)), and of the target + slope.
            linear = -head.scale * entropy_slopes
            constant = linear * entropies - head.scale * slopes
            change = head.slope(logits, normalizers, constant, linear, scale=head.scale, dtype=head.dtype)
            # The target's own, not as a difference of rounded numbers: it is small where its log-prob is near 0.
            own = linear * logprobs.exp() * (logprobs + entropies) - head.scale * slopes * logprobs.expm1()
            change.scatter_(1, targets[:, None], own.to(head.dtype)[:, None])
            to_hidden.append(_product(change, matrix).to(hidden.dtype))
            if to_weight is not None:
                _add_product(to_weight, change.T, states)
        return torch.cat(to_hidden), to_weight, None, None


def _read(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of the target, logarithm of the normalizer, and entropy, of each row."""
    logits = logits if scale == 1 else logits * scale
    most = logits.amax(-1, keepdim=True)
    away = logits - most
    shares = away.exp()
    total = shares.sum(-1)  # both sums in one pass, as sum(p log p) = sum(shares * away) / total - log(total)
    entropies = total.log() - (shares * away).sum(-1) / total
    normalizers = most.squeeze(-1) + total.log()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - normalizers, normalizers, entropies


def _slope(
    logits: Tensor, normalizers: Tensor, constant: Tensor, linear: Tensor, *, scale: float, dtype: torch.dtype
) -> Tensor:
    """p (constant + linear log p) of every token of the vocabulary; the last two of each row."""
    away = (logits if scale == 1 else logits * scale) - normalizers[:, None]
    return (away.exp() * (constant[:, None] + linear[:, None] * away)).to(dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in float32. Of bfloat16 inputs a GPU gives that from its accumulators, unrounded."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in float32. Of bfloat16 inputs a GPU adds to `total` itself, without a copy of it."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += _product(left, right)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for any number of rows. A single row, which a last chunk may have, is not worth the seconds that a
    program of its own would cost some step: dynamic shapes begin at 2."""
    of_many = torch.compile(function, dynamic=True)
    return lambda rows, *others, **options: (of_many if len(rows) > 1 else function)(rows, *others, **options)
