"""Advantages of trajectories, and the factor by which each of their tokens enters the loss.

Both are computed once on the global batch, before packing, micro-batches and masks: a mask that changed a denominator
would raise the learning rate on the tokens that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.algo import own
from asyncrl.algo.method import Aggregate, Center, Loss, Scale

_STD_FLOOR = 1e-6
"""Added to a standard deviation, so that rewards that hardly differ are not blown up."""


def estimate(rewards: Tensor, groups: Tensor, loss: Loss) -> Tensor:
    """The advantages that `loss` asks for: `advantages`, or the user's own function of the same two tensors.

    ValueError if that function returns something else than one finite number a trajectory.
    """
    if not loss.advantage:
        return advantages(rewards, groups, loss.center, loss.scale)
    values = own.load(loss.advantage)(rewards, groups)
    if not isinstance(values, Tensor) or values.shape != rewards.shape or not bool(values.isfinite().all()):
        raise ValueError(
            f"{loss.advantage!r} must return a finite tensor of shape {list(rewards.shape)}, one advantage a "
            f"trajectory; got {values}"
        )
    return values.detach().to(rewards.dtype)


def overlong_punishment(lengths: Tensor, max_length: int, tail: int) -> Tensor:
    """Added to the rewards of long replies (DAPO 2503.14476, equation 13); float32[N] in [-1, 0].

    0 up to `max_length` - `tail` tokens, then falling in a line to -1 at `max_length` and beyond. `lengths` int64[N] is
    of the longest reply of each trajectory: `max_length` cuts a reply, and the sum of several has no such limit.
    """
    return ((max_length - tail - lengths.float()) / tail).clamp(-1.0, 0.0)


def advantages(rewards: Tensor, groups: Tensor, center: Center, scale: Scale) -> Tensor:
    """Advantage of each trajectory; float[N] of the dtype of `rewards`.

    `rewards` float[N]; `groups` int64[N], equal for trajectories of one prompt. `center`: "mean" subtracts the group
    mean (GRPO 2402.03300), "loo" the mean of the others of the group (RLOO 2402.14740), "batch" the mean of all rewards
    (REINFORCE++ 2501.03262). `scale` divides by the population standard deviation of the group's rewards, or of all
    centered rewards of the batch (ScaleRL 2510.13786). With "none" and "critic" nothing is subtracted here. Equal
    rewards of what is centered get exactly 0. ValueError if "loo" meets a group of one.
    """
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    exact = rewards.double()
    if center == "batch":
        index, sizes = torch.zeros_like(index), sizes.sum().view(1)
    # Centered on the smallest reward first: equal rewards then have a mean of exactly 0.
    low = torch.full_like(sizes, torch.inf, dtype=torch.float64).scatter_reduce(0, index, exact, "amin")
    above = exact - low[index]
    deviation = above - _group_mean(above, index, sizes)
    centered = deviation
    if center in ("none", "critic"):
        centered = exact
    elif center == "loo":
        if bool((sizes == 1).any()):
            raise ValueError(
                'center = "loo" needs at least 2 trajectories in each group, got a group of 1; '
                'sample more per prompt or set center = "none"'
            )
        count = sizes[index]
        centered = deviation * count / (count - 1)
    if scale == "group_std":
        centered = centered / (_group_mean(deviation.square(), index, sizes).sqrt() + _STD_FLOOR)
    elif scale == "batch_std":
        spread = centered.std(correction=0)
        centered = centered / (spread + _STD_FLOOR) if spread > 0 else centered  # equal ones stay what they are
    return centered.to(rewards.dtype)


def normalizers(aggregate: Aggregate, lengths: Tensor, groups: Tensor, max_length: int) -> Tensor:
    """Factor n of every token of each trajectory; float32[N].

    `lengths` int64[N] counts the trained tokens, `groups` int64[N] names the prompt, over the whole batch of all
    learner ranks. "token" 1/sum T (DAPO), "seq_mean" 1/(N T_i) (GRPO), "seq_sum" 1/N, "prompt" every prompt equal and
    its tokens equal inside it (ScaleRL), "constant" 1/(N max_length) with `max_length` the most tokens of a reply (Dr.
    GRPO); the replies of several turns may add up to more, which is one factor for all alike. RuntimeError if a
    trajectory has no trained token.
    """
    if bool((lengths < 1).any()):
        raise RuntimeError("a trajectory without trained tokens has no place in the loss")
    exact = lengths.double()
    num_sequences = len(lengths)
    if aggregate == "token":
        factor = torch.full_like(exact, 1.0) / exact.sum()
    elif aggregate == "seq_mean":
        factor = 1.0 / (num_sequences * exact)
    elif aggregate == "seq_sum":
        factor = torch.full_like(exact, 1.0 / num_sequences)
    elif aggregate == "prompt":
        _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
        totals = torch.zeros(len(sizes), dtype=exact.dtype, device=exact.device).index_add(0, index, exact)
        factor = 1.0 / (len(sizes) * totals[index])
    else:
        factor = torch.full_like(exact, 1.0 / (num_sequences * max_length))
    return factor.float()


def _group_mean(values: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    totals = torch.zeros(len(sizes), dtype=values.dtype, device=values.device).index_add(0, index, values)
    return (totals / sizes)[index]
