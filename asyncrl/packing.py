"""Groups -> padding-free rows for the learner. The only place where tokens are shifted against their predictions.

Several trajectories share a row; `segments` keeps their attention apart and `positions` start at 0 in each. None is
ever cut or dropped. Trained tokens are flat columns: entry k says that the model's output at
(`rows[k]`, `columns[k]`), which has seen everything up to the token before, predicts `targets[k]`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """One optimizer step's data. Advantages and denominators were computed over all of it, before any mask."""

    micro_batches: tuple[MicroBatch, ...]
    advantages: Tensor  # float32[N], per trajectory
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
    overlong_tail: int = 0,
) -> Batch:
    """Packs whole groups into rows of at most `row_tokens`, first-fit decreasing.

    Raises `RuntimeError` for a trajectory longer than a row: the configuration sizes rows so that it cannot happen.
    """
    trajectories = [trajectory for group in groups for trajectory in group]
    index = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    rewards = torch.tensor([trajectory.reward for trajectory in trajectories], dtype=torch.float32)
    lengths = torch.tensor([int(trajectory.mask.sum()) for trajectory in trajectories])
    if overlong_tail:
        rewards = rewards + overlong_punishment(lengths, max_new_tokens, overlong_tail)
    advantage = estimate(rewards, index, loss)
    if mask_truncated:
        kept = torch.tensor([trajectory.finish != "length" for trajectory in trajectories])
        advantage = torch.where(kept, advantage, 0.0)
    normalizer = normalizers(loss.aggregate, lengths, index, max_new_tokens)
    bins = _first_fit([len(trajectory.token_ids) for trajectory in trajectories], row_tokens)
    length = max(sum(len(trajectories[i].token_ids) for i in members) for members in bins)
    rows_at_once = max(1, micro_batch_tokens // length)
    micro_batches = tuple(
        _rows(bins[start : start + rows_at_once], length, trajectories, advantage, normalizer)
        for start in range(0, len(bins), rows_at_once)
    )
    num_held = sum(len(trajectory.token_ids) for trajectory in trajectories)
    return Batch(micro_batches, advantage, int(lengths.sum()), num_held / (len(bins) * length))


def _first_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    space: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
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
    )
