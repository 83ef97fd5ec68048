"""Groups -> padding-free rows for the learner. The only place where tokens are shifted against their predictions.

    row      prompt | completion | completion | completion | prompt | completion | ...
    groups      0   |     0      |     0      |     0      |    1   |     1      |
    segments   -1   |     0      |     1      |     2      |   -1   |     3      |

Several groups share a row, and the trajectories of a group that are in the same row share the prompt, which goes
through the model once for all of them (the idea of Prefix Grouper, 2506.05433): log-probs and gradients are those of
separate rows. `groups` and `segments` keep attention apart and `positions` go on from the prompt in each trajectory.
None is ever cut or dropped; only the last trained token of each is no input, as nothing is predicted from it. Each
learner rank gets its share of the trajectories, balanced by tokens, in as many micro-batches as every other rank.
Trained tokens are flat columns: entry k says that the model's output at (`rows[k]`, `columns[k]`), which has seen
everything up to the token before, predicts `targets[k]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from asyncrl.algo.advantage import estimate, normalizers, overlong_punishment
from asyncrl.algo.loss_spec import Loss
from asyncrl.types import Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Rows [R, L] that go through the model together, and n trained tokens in them."""

    input_ids: Tensor  # int64[R, L]
    positions: Tensor  # int64[R, L]
    groups: Tensor  # int64[R, L], group inside the batch, -1 where the row is empty
    segments: Tensor  # int64[R, L], trajectory inside this micro-batch, -1 where the row is empty or a prompt is shared
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
    starts: Tensor  # int32[s + 1], where runs of one segment start in the R * L places, and the end
    longest: int  # of these runs
    reference_logprobs: Tensor | None = None  # float32[n], once they have been scored

    def to(self, device: torch.device) -> MicroBatch:
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **tensors)

    def attention_mask(self) -> Tensor:
        """bool[R, 1, L, L]: True where a token may see another: itself and earlier ones of its own trajectory, the
        prompt that it shares with others included.
        """
        length = self.segments.shape[1]
        same_group = self.groups[:, :, None] == self.groups[:, None, :]
        same = (self.segments[:, :, None] == self.segments[:, None, :]) | (self.segments[:, None, :] < 0)
        causal = torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
        return (same_group & same & causal)[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One optimizer step's data. Advantages and denominators were computed over all ranks, before any mask."""

    micro_batches: tuple[MicroBatch, ...]  # of one rank; what follows is of all ranks
    advantages: Tensor  # float32[N], per trajectory
    rewards: Tensor  # float32[N], with the overlong punishment
    groups: Tensor  # int64[N], equal for trajectories of one prompt
    lengths: Tensor  # int64[N], trained tokens
    kept: Tensor  # bool[N]: not masked for being truncated, which leaves a trajectory no part in any term of the loss
    num_tokens: int  # trained tokens
    num_held: int  # tokens of all trajectories, prompts included
    num_inputs: int  # tokens that go through the model: a shared prompt counts once
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
    share_prompts: bool = True,
) -> Batch:
    """Packs whole groups into rows of at most `row_tokens` and returns those of `rank`.

    Without `share_prompts` every trajectory has its prompt to itself: no segment then sees another. Every rank packs
    the same groups and finds the same shares, so nothing has to be sent between them. Rows are filled first-fit
    decreasing where prompts are shared, and evenly where not; those of a micro-batch are as long as its longest one.

    Raises `RuntimeError` for a trajectory longer than a row: the configuration sizes rows so that it cannot happen.
    """
    trajectories = [trajectory for group in groups for trajectory in group]
    index = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    rewards = torch.tensor([trajectory.reward for trajectory in trajectories], dtype=torch.float32)
    trained = [np.flatnonzero(trajectory.mask) for trajectory in trajectories]
    lengths = torch.tensor([len(where) for where in trained])
    if overlong_tail:
        replies = torch.tensor([_longest_reply(where) for where in trained])
        rewards = rewards + overlong_punishment(replies, max_new_tokens, overlong_tail)
    advantage = estimate(rewards, index, lengths, loss)
    kept = torch.tensor([not mask_truncated or trajectory.finish != "length" for trajectory in trajectories])
    advantage = torch.where(kept, advantage, 0.0)
    normalizer = torch.where(kept, normalizers(loss.aggregate, lengths, index, max_new_tokens), 0.0)
    pieces = _pieces(groups, iter(trained), share_prompts)
    longest = max(len(trajectory.token_ids) for trajectory in trajectories)
    if longest > row_tokens:
        raise RuntimeError(f"a trajectory of {longest} tokens does not fit a row of {row_tokens}")
    shares = _shares([piece.num_inputs for piece in pieces], num_ranks)
    fill = _first_fit if share_prompts else _even_rows
    bins = [fill([pieces[i] for i in share], row_tokens) for share in shares]
    sizes = [[_num_inputs(row) for row in rows] for rows in bins]
    length = max(map(max, filter(None, sizes)))
    # A rank that made fewer passes than another would leave it waiting in a collective.
    num_passes = max(math.ceil(len(rows) / max(1, micro_batch_tokens // length)) for rows in bins)
    micro_batches = tuple(
        _rows(rows, advantage, normalizer) if rows else _no_rows() for rows in _even_parts(bins[rank], num_passes)
    )
    num_inputs = sum(map(sum, sizes))
    num_places = sum(len(part) * max(part) for rows in sizes for part in _even_parts(rows, num_passes) if part)
    return Batch(
        micro_batches,
        advantage,
        rewards,
        index,
        lengths,
        kept,
        num_tokens=int(lengths.sum()),
        num_held=sum(len(trajectory.token_ids) for trajectory in trajectories),
        num_inputs=num_inputs,
        fill=num_inputs / num_places,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A trajectory as it is packed: `shared` tokens that it has in common with its group, and what follows."""

    item: int
    group: int
    shared: int
    num_inputs: int  # what is shared included
    trained: np.ndarray  # where its trained tokens are
    trajectory: Trajectory

    @property
    def num_own(self) -> int:
        return self.num_inputs - self.shared


_Row: TypeAlias = list[_Piece]
_Item = TypeVar("_Item")


def _pieces(groups: Sequence[Sequence[Trajectory]], trained: Iterator[np.ndarray], share_prompts: bool) -> list[_Piece]:
    pieces: list[_Piece] = []
    for number, group in enumerate(groups):
        members = list(zip(group, trained, strict=False))  # the next ones of all
        shared = _num_common([item.token_ids[: where[0]] for item, where in members]) if share_prompts else 0
        for trajectory, where in members:
            pieces.append(_Piece(len(pieces), number, shared, int(where[-1]), where, trajectory))
    return pieces


def _longest_reply(trained: np.ndarray) -> int:
    """Tokens of the longest of a trajectory's replies, which what the environment said keeps apart."""
    ends = np.flatnonzero(np.diff(trained) > 1)
    return int(np.diff([-1, *ends, len(trained) - 1]).max())


def _num_common(prompts: Sequence[np.ndarray]) -> int:
    """Leading tokens that all have in common."""
    first = prompts[0].tobytes()
    if all(prompt.tobytes() == first for prompt in prompts):  # as in every group of a single turn
        return len(prompts[0])
    shortest = min(map(len, prompts))
    block = np.stack([prompt[:shortest] for prompt in prompts])
    same = (block == block[0]).all(axis=0)
    return shortest if same.all() else int(same.argmin())


def _num_inputs(row: _Row) -> int:
    shared = {piece.group: piece.shared for piece in row}
    return sum(shared.values()) + sum(piece.num_own for piece in row)


def _shares(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Items of each rank: the longest first, always to the rank that has the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += lengths[item]
    return shares


def _even_parts(rows: list[_Item], num_parts: int) -> Iterator[list[_Item]]:
    """`num_parts` runs of consecutive rows whose counts differ by one at most; some are empty if there are more parts
    than rows.
    """
    for part in range(num_parts):
        yield rows[len(rows) * part // num_parts : len(rows) * (part + 1) // num_parts]


def _first_fit(pieces: Sequence[_Piece], row_tokens: int) -> list[_Row]:
    """Group after group, those with the longest trajectory first; a row that has the prompt is preferred."""
    longest: dict[int, int] = {}
    for piece in pieces:
        longest[piece.group] = max(longest.get(piece.group, 0), piece.num_inputs)
    rows: list[_Row] = []
    space: list[int] = []
    group, of_group = -1, list[int]()
    for piece in sorted(pieces, key=lambda piece: (-longest[piece.group], piece.group, -piece.num_inputs)):
        if piece.group != group:
            group, of_group = piece.group, []
        taken = piece.num_own
        place = next((at for at in of_group if space[at] >= taken), None)
        if place is None:
            taken = piece.num_inputs
            place = next((at for at, left in enumerate(space) if left >= taken), len(rows))
            of_group.append(place)
        if place == len(rows):
            rows.append([])
            space.append(row_tokens)
        rows[place].append(piece)
        space[place] -= taken
    return rows


def _even_rows(pieces: Sequence[_Piece], row_tokens: int) -> list[_Row]:
    """As few rows as the pieces need, of about the same length: the longest alone sets how much memory a step takes.

    Nothing may be shared between pieces. Rows of which one were longer than the others would leave empty places in
    those, which attention over segments would take for one long segment.
    """
    lengths = [piece.num_inputs for piece in pieces]
    fewest = max(1, math.ceil(sum(lengths) / row_tokens))
    for count in range(fewest, len(pieces) + 1):  # one row a piece always does
        rows = [[pieces[i] for i in share] for share in _shares(lengths, count)]
        if max(map(_num_inputs, rows)) <= row_tokens:
            return rows
    return []


def _rows(rows: Sequence[_Row], advantage: Tensor, normalizer: Tensor) -> MicroBatch:
    length = max(map(_num_inputs, rows))
    grids = np.zeros((4, len(rows), length), np.int64)  # input ids, positions, groups, segments
    grids[2:] = -1
    pieces = [piece for row in rows for piece in row]
    columns: list[np.ndarray] = []
    for at, row in enumerate(rows):
        columns += _lay_out(row, grids[:, at], len(columns))
    input_ids, positions, groups, segments = map(torch.from_numpy, grids)
    counts = torch.tensor([len(piece.trained) for piece in pieces])
    chosen = torch.tensor([piece.item for piece in pieces])
    row_of = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))

    flat = grids[3].ravel()
    starts = torch.tensor([0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1), len(flat)], dtype=torch.int32)

    def trained(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(p.trajectory, name)[p.trained] for p in pieces]))

    return MicroBatch(
        input_ids=input_ids,
        positions=positions,
        groups=groups,
        segments=segments,
        rows=row_of.repeat_interleave(counts),
        columns=torch.from_numpy(np.concatenate(columns)),
        targets=trained("token_ids").long(),
        behavior_logprobs=trained("logprobs").float(),
        versions=trained("versions").long(),
        advantages=advantage[chosen].repeat_interleave(counts),
        normalizers=normalizer[chosen].repeat_interleave(counts),
        sequence=torch.arange(len(pieces)).repeat_interleave(counts),
        num_sequences=len(pieces),
        members=chosen,
        starts=starts,
        longest=int(starts.diff().max()),
    )


def _lay_out(row: _Row, grid: np.ndarray, first: int) -> list[np.ndarray]:
    """Writes a row to `grid` [4, L], its pieces numbered from `first` on; the columns that predict what each trains."""
    columns, group, prompt, end = [], -1, 0, 0
    for number, piece in enumerate(row, first):
        shared = piece.shared
        if piece.group != group:
            group, prompt, end = piece.group, end, end + shared
            _write(grid[:, prompt:end], piece.trajectory.token_ids[:shared], 0, group, -1)
        start, end = end, end + piece.num_own
        _write(grid[:, start:end], piece.trajectory.token_ids[shared : piece.num_inputs], shared, group, number)
        source = piece.trained - 1  # the shift: the output before a token predicts it
        columns.append(source + np.where(source < shared, prompt, start - shared))
    return columns


def _write(grid: np.ndarray, token_ids: np.ndarray, position: int, group: int, segment: int) -> None:
    grid[0], grid[1] = token_ids, np.arange(position, position + len(token_ids))
    grid[2], grid[3] = group, segment


def _no_rows() -> MicroBatch:
    """One empty place: a pass that takes part in the collectives of the other ranks and trains nothing."""
    place, nothing = torch.zeros(1, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return MicroBatch(
        input_ids=place,
        positions=place,
        groups=place - 1,
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
        starts=torch.tensor([0, 1], dtype=torch.int32),
        longest=1,
    )
