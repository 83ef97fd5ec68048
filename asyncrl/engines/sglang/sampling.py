"""How SGLang chooses tokens here: as the seeds of the requests say, from the distribution whose log-probs it reports.

`SchedulerMixin` puts it in place of SGLang's own sampling, in the scheduler's process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_GOLDEN, _MIX_1, _MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

_BLOCK = 256
"""Tokens of the vocabulary whose probabilities are summed before one of them is looked for."""

_GREEDY = 1
"""The top-k by which SGLang writes temperature 0."""


def replace_sampling() -> None:
    """Makes SGLang's sampler follow the seeds and report log-probs of the truncated distribution.

    On its own it follows seeds in its deterministic mode only, and reports log-probs from before top-k and top-p.
    """
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    make = SamplingBatchInfo.from_schedule_batch

    def from_schedule_batch(batch: Any, vocab_size: int) -> Any:
        info = make(batch, vocab_size)
        seeds = [req.sampling_params.sampling_seed or 0 for req in batch.reqs]
        device = info.temperatures.device
        pinned = torch.tensor(seeds, dtype=torch.int64, pin_memory=device.type == "cuda")
        info.sampling_seed = pinned.to(device, non_blocking=True)
        # Greedy requests need no truncation, which waits for the device; and once a batch that goes on has needed any,
        # SGLang has it go through that to its end: one evaluation would have cost all later steps their overlap.
        info.need_top_k_sampling = any(req.sampling_params.top_k not in (TOP_K_ALL, _GREEDY) for req in batch.reqs)
        return info

    def sample(_sampler: Any, probs: Tensor, info: Any, positions: Tensor, simple: bool) -> Tensor:
        if not simple:
            # The caller takes the log-probs from `probs` afterwards.
            truncate(probs, info.top_ks, info.top_ps)
        tokens = draw(probs, info.sampling_seed, positions)
        if not info.is_any_greedy:
            return tokens
        return torch.where(info.top_ks == _GREEDY, probs.argmax(dim=-1).to(torch.int32), tokens)

    SamplingBatchInfo.from_schedule_batch = staticmethod(from_schedule_batch)
    Sampler._sample_from_probs = sample


def truncate(probs: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    """Cuts distributions, [R, V], to top-k, then to top-p of what top-k left, in place. Greedy rows stay whole."""
    size = probs.shape[1]
    rows = ((top_k != _GREEDY) & ((top_k < size) | (top_p < 1))).nonzero()[:, 0]
    ordered, order = probs[rows].sort(dim=-1, descending=True, stable=True)
    ordered.masked_fill_(torch.arange(size, device=probs.device) >= top_k[rows].unsqueeze(1), 0.0)
    shares = ordered.double() / ordered.double().sum(dim=-1, keepdim=True)
    # A token stays while the tokens before it do not reach top_p, so the most likely one always stays.
    before, limit = shares.cumsum(dim=-1) - shares, top_p[rows].unsqueeze(1)
    ordered.masked_fill_((before >= limit) & (limit < 1), 0.0)
    ordered /= ordered.sum(dim=-1, keepdim=True)
    probs[rows] = torch.empty_like(ordered).scatter_(1, order, ordered)


def draw(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """One token per row, int32[R], by inverting the cumulative distribution at a number made of seed and position.

    `probs` is [R, V] and need not be normalised; `seeds` and `positions` are integers, [R].
    """
    if probs.is_cuda:
        from asyncrl.engines.sglang import draw_kernel

        return draw_kernel.draw(probs, seeds, positions)
    # In two stages: a scan of whole rows in double precision took a seventh of a decoding step (docs/performance.md).
    size = probs.shape[1]
    whole = size - size % _BLOCK
    sums = [probs[:, :whole].unflatten(1, (-1, _BLOCK)).sum(dim=-1), probs[:, whole:].sum(dim=-1, keepdim=True)]
    block, share = _invert(torch.cat(sums, dim=1), uniforms(seeds, positions))
    columns = block.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    inside = probs.gather(1, columns.clamp(max=size - 1)).masked_fill(columns >= size, 0.0)
    place, _ = _invert(inside, share)
    return (block * _BLOCK + place).clamp(max=size - 1).to(torch.int32)


def _invert(weights: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each row's weights, [R, N], whose sum with those before it exceeds that share of the row's total.

    Also what share of the weight was needed for that, in [0, 1). A weight of 0 is never chosen.
    """
    cumulative = weights.double().cumsum(dim=-1)
    targets = shares.unsqueeze(1) * cumulative[:, -1:]
    # The bound is for rows that are not numbers: an index outside would end the process.
    chosen = torch.searchsorted(cumulative, targets, right=True).clamp(max=weights.shape[1] - 1)
    weight = weights.gather(1, chosen).double()
    reached = (targets - cumulative.gather(1, chosen)) / weight + 1
    return chosen[:, 0], reached[:, 0].nan_to_num(0.0).clamp(0.0, 1 - 2.0**-52)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, position), float64[R], by two rounds of splitmix64 (Steele et al., 2014)."""
    hashed = _mix(_mix(seeds + _GOLDEN) + (positions.to(torch.int64) + 1) * _GOLDEN)
    # 52 bits: the largest number times a total near 1 still rounds to less than the total.
    return _shift(hashed, 12).double() * 2.0**-52


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shift(values, 30)) * _MIX_1
    values = (values ^ _shift(values, 27)) * _MIX_2
    return values ^ _shift(values, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros; torch's own brings in the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
