"""Advantages of trajectories, and the factor by which each of their tokens enters the loss.

Both are computed once on the global batch, before packing, micro-batches and masks: a mask that changed a denominator
would raise the learning rate on the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from asyncrl.algo import custom as own
from asyncrl.algo.loss_spec import Aggregate, Center, Loss, Scale
from asyncrl.types import NOISE, RELATIVE_NOISE
from asyncrl.utils.quote import quote

_STD_FLOOR = 1e-6
"""Added to a standard deviation, so that rewards that hardly differ are not blown up."""


def estimate(rewards: Tensor, groups: Tensor, lengths: Tensor, loss: Loss) -> Tensor:
    """The advantages that `loss` asks for: `advantages`, or the user's own function of the first two tensors.

    An attempt without a reward, which is nan, has advantage 0 and no part in those of others.
    ValueError if that function returns something else than one finite number a trajectory.
    """
    if bool(rewards.isnan().any()):

        def scored(some: Tensor) -> Tensor:
            return estimate(rewards[some], groups[some], lengths[some], loss)

        return of_scored(scored, rewards, groups, loss).to(rewards.dtype)
    if not loss.advantage:
        return advantages(rewards, groups, lengths, loss.center, loss.scale, correction=loss.std_correction)
    values = own.load(loss.advantage)(rewards, groups)
    if not isinstance(values, Tensor) or values.shape != rewards.shape or not bool(values.isfinite().all()):
        raise ValueError(
            f"{loss.advantage!r} must return a finite tensor of shape {list(rewards.shape)}, one advantage a "
            f"trajectory; got {quote(values)}"
        )
    return values.detach().to(rewards.dtype)


def of_scored(function: Callable[[Tensor], Tensor], rewards: Tensor, groups: Tensor, loss: Loss) -> Tensor:
    """What `function` gives for the trajectories with a reward, chosen by bool[N]; 0 for others; float64[N]. With "loo"
    the only one of a group that has a reward is among the others, as it has nothing to be compared with."""
    chosen = ~rewards.isnan()
    if loss.center == "loo":
        _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
        num_scored = torch.zeros_like(sizes).index_add_(0, index, chosen.to(sizes))
        chosen &= (num_scored[index] > 1) | (sizes[index] == 1)
    values = torch.zeros(len(rewards), dtype=torch.float64, device=rewards.device)
    if bool(chosen.any()):
        values[chosen] = function(chosen).double()
    return values


def overlong_punishment(lengths: Tensor, max_length: int, tail: int) -> Tensor:
    """Added to the rewards of long replies (DAPO 2503.14476, equation 13); float32[N] in [-1, 0].

    0 up to `max_length` - `tail` tokens, then falling in a line to -1 at `max_length` and beyond. `lengths` int64[N] is
    of the longest reply of each trajectory: `max_length` cuts a reply, and the sum of several has no such limit.
    """
    return ((max_length - tail - lengths.float()) / tail).clamp(-1.0, 0.0)


def advantages(
    rewards: Tensor, groups: Tensor, lengths: Tensor, center: Center, scale: Scale, *, correction: int = 1
) -> Tensor:
    """Advantage of each trajectory; float[N] of the dtype of `rewards`: `centered`, over a standard deviation.

    `rewards` float[N]; `groups` int64[N], equal for trajectories of one prompt; `lengths` int64[N], trained tokens.
    `scale`: "group_std" and "batch_std" divide by `spreads`; "token_std" makes mean and standard deviation those of the
    trained tokens, 0 and 1 (REINFORCE++ 2501.03262, equation 5): a long trajectory counts as often as it has tokens.
    The variance of n values divides by n - `correction`. Equal rewards (`types.same_reward`) of what is centered get
    exactly 0. ValueError if "loo" meets a group of one.
    """
    values = centered(rewards, groups, center)
    if scale == "token_std":
        weights = lengths / lengths.sum(dtype=torch.float64)
        values = values - (weights * values).sum()
        variance = (weights * values.square()).sum() * bessel(lengths.sum(dtype=torch.float64), correction)
        values = scaled(values, variance.sqrt())
    elif scale != "none":
        values = scaled(values, spreads(rewards, values, groups, scale, correction))
    return values.to(rewards.dtype)


def centered(rewards: Tensor, groups: Tensor, center: Center) -> Tensor:
    """Rewards less what they are compared with; float64[N].

    `center`: "mean" subtracts the group mean (GRPO 2402.03300), "loo" the mean of the others of the group (RLOO
    2402.14740), "batch" the mean of all rewards, however long their trajectories. With "none" and "critic" nothing is
    subtracted here. ValueError if "loo" meets a group of one.
    """
    if center in ("none", "critic"):
        return rewards.double()
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    if center == "batch":
        index, sizes = torch.zeros_like(index), sizes.sum().view(1)
    deviation = _deviation(rewards, index, sizes)
    if center == "loo":
        if bool((sizes == 1).any()):
            raise ValueError(
                'center = "loo" needs at least 2 trajectories in each group, got a group of 1; '
                'sample more per prompt or set center = "none"'
            )
        count = sizes[index]
        return deviation * count / (count - 1)
    return deviation


def spreads(rewards: Tensor, values: Tensor, groups: Tensor, scale: Scale, correction: int) -> Tensor:
    """Standard deviation of the rewards of each trajectory's group ("group_std"), or of `values`, which are all of them
    `centered` ("batch_std", ScaleRL 2510.13786); float64[N]. That of a single value is 0."""
    if scale == "batch_std":
        return values.std(correction=min(correction, len(values) - 1)).expand(len(values))
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    variance = _group_mean(_deviation(rewards, index, sizes).square(), index, sizes)
    return (variance * bessel(sizes, correction)[index]).sqrt()


def bessel(count: Tensor, correction: int) -> Tensor:
    """What a mean of `count` squares is multiplied by, to divide by `count` - `correction` instead; 1 for one value,
    which has no deviation."""
    return count / (count - correction).clamp(min=1)


def scaled(values: Tensor, spread: Tensor) -> Tensor:
    """`values` over `spread`, which is broadcast; where that is 0 but for rounding, they stay what they are."""
    return torch.where(spread > NOISE, values / (spread + _STD_FLOOR), values)


def _deviation(rewards: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    exact = rewards.double()
    none = torch.full_like(sizes, torch.inf, dtype=torch.float64)
    low, high = none.scatter_reduce(0, index, exact, "amin"), (-none).scatter_reduce(0, index, exact, "amax")
    differ = high - low > (RELATIVE_NOISE * torch.maximum(low.abs(), high.abs())).clamp(min=NOISE)
    # Centered on the smallest reward first: equal rewards then have a mean of exactly 0.
    above = torch.where(differ[index], exact - low[index], 0.0)
    return above - _group_mean(above, index, sizes)


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
