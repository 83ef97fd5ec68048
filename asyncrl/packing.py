"""Groups -> padding-free rows for the learner. The only place where tokens are shifted against their predictions.

Several trajectories share a row; `segments` keeps their attention apart and `positions` start at 0 in each. None is
ever cut or dropped. Each learner rank gets its share of the trajectories, balanced by tokens, in as many micro-batches
as every other rank. Trained tokens are flat columns: entry k says that the model's output at
(`rows[k]`, `columns[k]`), which has seen everything up to the token before, predicts `targets[k]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.algo.advantage import estimate, normalizers, overlong_punishment
from asyncrl.algo.method import Loss
from asyncrl.types import Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Rows [R, L] that go through the model together, and n trained tokens in them."""

    input_ids: Tensor  # int64[R, L]
    positions: Tensor  # int64[R, L]
    segments: Tensor  # int64[R, L], -1 where the row is empty
    rows: Tensor  # int64[n]
    columns: Tensor  # int64[n]
    targets: Tensor  # int64[n]
    behavior_logprobs: Tensor  # float32[n]
    versions: Tensor  # int64[n]
    advantages: Tensor  # float32[n]
    normalizers: Tensor  # float32[n]
    sequence: Tensor  # int64[n], trajectory inside this micro-batch
    num_sequences: int
    members: Tensor  # int64[num_sequences], trajectory inside the batch
    reference_logprobs: Tensor | None = None  # float32[n], once they have been scored

    def to(self, device: torch.device) -> MicroBatch:
        tensors: dict[str, Any] = {
            name: value.to(device) for name in self.__slots__ if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **tensors)

    def attention_mask(self) -> Tensor:
        """bool[R, 1, L, L]: True where a token may see another, itself and earlier ones of its own trajectory."""
        length = self.segments.shape[1]
        same = self.segments[:, :, None] == self.segments[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
        return (same & causal)[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One optimizer step's data. Advantages and denominators were computed over all ranks, before any mask."""

    micro_batches: tuple[MicroBatch, ...]  # of one rank; what follows is of all ranks
    advantages: Tensor  # float32[N], per trajectory
    rewards: Tensor  # float32[N], with the overlong punishment
    groups: Tensor  # int64[N], equal for trajectories of one prompt
    kept: Tensor  # bool[N]: not masked for being truncated
    num_tokens: int  # trained tokens
    fill: float  # share of row positions that hold a token


def pack(
    groups: Sequence[Sequence[Trajectory]],
    loss: Loss,
    *,
    row_tokens: int,
    micro_batch_tokens: int,
    max_new_tokens: int,
    mask_truncated: bool = False,
    rank: int = 0,
    num_ranks: int = 1,
    overlong_tail: int = 0,
) -> Batch:
    """Packs whole groups into rows of at most `row_tokens`, first-fit decreasing, and returns those of `rank`.

    Every rank packs the same groups and finds the same shares, so nothing has to be sent between them.

    Raises `RuntimeError` for a trajectory longer than a row: the configuration sizes rows so that it cannot happen.
    """
    trajectories = [trajectory for group in groups for trajectory in group]
    index = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    rewards = torch.tensor([trajectory.reward for trajectory in trajectories], dtype=torch.float32)
    lengths = torch.tensor([int(trajectory.mask.sum()) for trajectory in trajectories])
    if overlong_tail:
        rewards = rewards + overlong_punishment(lengths, max_new_tokens, overlong_tail)
    advantage = estimate(rewards, index, loss)
    kept = torch.tensor([not mask_truncated or trajectory.finish != "length" for trajectory in trajectories])
    advantage = torch.where(kept, advantage, 0.0)
    normalizer = normalizers(loss.aggregate, lengths, index, max_new_tokens)
    num_held = [len(trajectory.token_ids) for trajectory in trajectories]
    bins = [_first_fit(share, num_held, row_tokens) for share in _shares(num_held, num_ranks)]
    length = max(sum(num_held[i] for i in members) for rows in bins for members in rows)
    # A rank that made fewer passes than another would leave it waiting in a collective.
    num_passes = max(math.ceil(len(rows) / max(1, micro_batch_tokens // length)) for rows in bins)
    micro_batches = tuple(
        _rows(members, length, trajectories, advantage, normalizer) if members else _no_rows()
        for members in _even_parts(bins[rank], num_passes)
    )
    num_rows = sum(len(rows) for rows in bins)
    fill = sum(num_held) / (num_rows * length)
    return Batch(micro_batches, advantage, rewards, index, kept, int(lengths.sum()), fill)


def _shares(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Items of each rank: the longest first, always to the rank that has the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for item in _longest_first(range(len(lengths)), lengths):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += lengths[item]
    return shares


def _longest_first(items: Iterable[int], lengths: Sequence[int]) -> list[int]:
    return sorted(items, key=lambda i: -lengths[i])


def _even_parts(rows: list[list[int]], num_parts: int) -> Iterator[list[list[int]]]:
    """`num_parts` runs of consecutive rows whose counts differ by one at most; some are empty if there are more parts
    than rows.
    """
    for part in range(num_parts):
        yield rows[len(rows) * part // num_parts : len(rows) * (part + 1) // num_parts]


def _first_fit(items: Iterable[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    space: list[int] = []
    for item in _longest_first(items, lengths):
        if lengths[item] > row_tokens:
            raise RuntimeError(f"a trajectory of {lengths[item]} tokens does not fit a row of {row_tokens}")
        place = next((at for at, free in enumerate(space) if free >= lengths[item]), None)
        if place is None:
            bins.append([])
            space.append(row_tokens)
            place = len(bins) - 1
        bins[place].append(item)
        space[place] -= lengths[item]
    return bins


def _rows(
    bins: Sequence[Sequence[int]],
    length: int,
    trajectories: Sequence[Trajectory],
    advantage: Tensor,
    normalizer: Tensor,
) -> MicroBatch:
    shape = (len(bins), length)
    input_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int64)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("row", "column", "target", "logprob", "version")}
    members: list[int] = []
    for row, bin_members in enumerate(bins):
        start = 0
        for item in bin_members:
            trajectory = trajectories[item]
            end = start + len(trajectory.token_ids)
            input_ids[row, start:end] = trajectory.token_ids
            positions[row, start:end] = np.arange(end - start)
            segments[row, start:end] = len(members)
            trained = np.flatnonzero(trajectory.mask)
            columns["row"].append(np.full(len(trained), row))
            columns["column"].append(start + trained - 1)  # the shift: the output before a token predicts it
            columns["target"].append(trajectory.token_ids[trained])
            columns["logprob"].append(trajectory.logprobs[trained])
            columns["version"].append(trajectory.versions[trained])
            members.append(item)
            start = end
    flat = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()}
    counts = torch.tensor([len(part) for part in columns["row"]])
    chosen = torch.tensor(members)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        rows=flat["row"].long(),
        columns=flat["column"].long(),
        targets=flat["target"].long(),
        behavior_logprobs=flat["logprob"].float(),
        versions=flat["version"].long(),
        advantages=advantage[chosen].repeat_interleave(counts),
        normalizers=normalizer[chosen].repeat_interleave(counts),
        sequence=torch.arange(len(members)).repeat_interleave(counts),
        num_sequences=len(members),
        members=chosen,
    )


def _no_rows() -> MicroBatch:
    """One empty place: a pass that takes part in the collectives of the other ranks and trains nothing."""
    place, nothing = torch.zeros(1, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return MicroBatch(
        input_ids=place,
        positions=place,
        segments=place - 1,
        rows=nothing,
        columns=nothing,
        targets=nothing,
        behavior_logprobs=nothing.float(),
        versions=nothing,
        advantages=nothing.float(),
        normalizers=nothing.float(),
        sequence=nothing,
        num_sequences=0,
        members=nothing,
    )
