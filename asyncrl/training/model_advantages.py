"""Rewards and advantages that take a model to make: KL to the reference off the rewards, and GAE with a critic.

packed micro-batches -> reference log-probs -> rewards less KL -> values -> GAE -> advantages of every token
                                                                         `---> the critic learns the returns

Whatever is a mean or a deviation here is of all ranks and micro-batches, and in float64: the rounded mean of equal
float32 numbers is not that number, and dividing by as small a deviation would make advantages of the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from asyncrl.algo.advantage import bessel, centered, estimate, of_scored, scaled, spreads
from asyncrl.algo.gae import gae
from asyncrl.algo.loss import kl_estimate
from asyncrl.algo.loss_spec import Loss
from asyncrl.config.schema import CriticConfig
from asyncrl.training.critic import METRICS as CRITIC
from asyncrl.training.critic import Critic
from asyncrl.training.packing import Batch, MicroBatch
from asyncrl.training.sharding import Ranks

METRICS = {
    "reward/kl": "estimate of KL(behavior || reference), mean over tokens, whose multiple was taken off the rewards "
    "(runs with algorithm.loss.reward_kl)",
    **{name: f"{text} (runs with a critic)" for name, text in CRITIC.items()},
}


def shape(
    batch: Batch,
    parts: list[MicroBatch],
    loss: Loss,
    settings: CriticConfig,
    *,
    reference: Callable[[MicroBatch], tuple[Tensor, Tensor]] | None,
    critic: Critic | None,
    ranks: Ranks,
) -> tuple[list[MicroBatch], dict[str, float]]:
    """`parts` with the advantages that `loss` asks for, and metrics; the critic has learned from them. Every rank.

    `parts` are the micro-batches of `batch` on their device. Most losses get them back as they came: their advantages
    come from rewards alone.
    """
    if not (loss.reward_kl or critic):
        return parts, {}
    rewards = batch.rewards.to(parts[0].advantages.device)
    scored = ~rewards.isnan()
    charges = [torch.zeros_like(part.advantages) for part in parts]
    metrics = {}
    if loss.reward_kl:
        if reference is None:
            raise RuntimeError("the rewards are charged with the KL to a reference model, and none was given")
        parts, kl = _score(parts, loss, reference)
        total = ranks.sum(torch.stack([values.sum() for values in kl]).sum())
        metrics["reward/kl"] = float(total) / batch.num_tokens
        charges = [-loss.reward_kl * values for values in kl]
        if loss.reward_kl_level == "sequence":
            rewards = rewards + _of_trajectories(parts, charges, rewards, ranks)
            charges = [torch.zeros_like(charge) for charge in charges]
    if critic:
        advantages, learned = _with_critic(parts, charges, rewards, critic, settings)
        advantages = _whitened(parts, advantages, batch, loss, ranks) if loss.scale == "token_std" else advantages
        metrics |= learned
    elif loss.reward_kl_level == "sequence":
        of_rewards = estimate(rewards.cpu(), batch.groups, batch.lengths, loss).to(rewards.device)
        advantages = [of_rewards[_owner(part)] for part in parts]
    else:
        advantages = _with_charges(parts, charges, batch, loss, ranks)
    kept = batch.kept.to(rewards.device) & scored
    return [
        replace(part, advantages=torch.where(kept[_owner(part)], values, 0.0).to(part.advantages))
        for part, values in zip(parts, advantages, strict=True)
    ], metrics


@torch.no_grad()
def _score(
    parts: Sequence[MicroBatch], loss: Loss, reference: Callable[[MicroBatch], tuple[Tensor, Tensor]]
) -> tuple[list[MicroBatch], list[Tensor]]:
    """The micro-batches with their reference log-probs, and the KL estimate of each token.

    A reward belongs to what was sampled, so the KL is that of the policy that sampled it.
    """
    logprobs = [reference(part)[0] for part in parts]
    scored = [replace(part, reference_logprobs=some) for part, some in zip(parts, logprobs, strict=True)]
    away = [part.behavior_logprobs - some for part, some in zip(parts, logprobs, strict=True)]
    return scored, [kl_estimate(values, loss.reward_kl_estimator) for values in away]


def _of_trajectories(parts: Sequence[MicroBatch], values: Sequence[Tensor], like: Tensor, ranks: Ranks) -> Tensor:
    """Sum over the tokens of each trajectory of the batch, whichever rank has it; float32[N]."""
    total = torch.zeros_like(like)
    for part, some in zip(parts, values, strict=True):
        total.index_add_(0, _owner(part), some)
    return ranks.sum(total)


def _with_critic(
    parts: Sequence[MicroBatch], charges: Sequence[Tensor], rewards: Tensor, critic: Critic, settings: CriticConfig
) -> tuple[list[Tensor], dict[str, float]]:
    scored = ~rewards.isnan()
    rewards = rewards.nan_to_num(nan=0.0)
    with torch.no_grad():
        values = [critic.values(part) for part in parts]
    advantages = []
    for part, charge, value in zip(parts, charges, values, strict=True):
        earned = charge.clone()
        earned[_last(part)] += rewards[part.members]
        estimated = gae(earned, value, part.sequence, settings.gamma, settings.lam)
        # Of one without a reward the return is what the critic says already.
        advantages.append(torch.where(scored[_owner(part)], estimated, 0.0))
    returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
    return advantages, critic.update(parts, values, returns)


def _with_charges(
    parts: Sequence[MicroBatch], charges: Sequence[Tensor], batch: Batch, loss: Loss, ranks: Ranks
) -> list[Tensor]:
    """Advantages from the rewards and from what each token and those after it are charged.

    A scale divides both by one number, so that rewards and charges that grow alike change nothing: the root of the
    variance of the rewards, over trajectories, and that of the charges ahead, over tokens. With the first alone, a
    group of equal rewards would make huge advantages of any charge.
    """
    rewards, device = batch.rewards, charges[0].device
    if loss.advantage:
        values = estimate(rewards, batch.groups, batch.lengths, loss)
    else:
        values = of_scored(
            lambda some: centered(rewards[some], batch.groups[some], loss.center), rewards, batch.groups, loss
        )
    base = values.to(device)
    ahead = [
        gae(charge, torch.zeros_like(charge), part.sequence, 1.0, 1.0)
        for part, charge in zip(parts, charges, strict=True)
    ]
    if loss.scale == "token_std":
        both = [base[_owner(part)] + some for part, some in zip(parts, ahead, strict=True)]
        return _whitened(parts, both, batch, loss, ranks)
    index = batch.groups if loss.scale == "group_std" else torch.zeros_like(batch.groups)
    ahead, of_charges = _centered(parts, ahead, index, batch.lengths, ranks, correction=loss.std_correction)
    both = [base[_owner(part)] + some for part, some in zip(parts, ahead, strict=True)]
    if loss.scale == "none":
        return both

    def spread_of(some: Tensor) -> Tensor:
        return spreads(rewards[some], values[some], batch.groups[some], loss.scale, loss.std_correction)

    of_rewards = of_scored(spread_of, rewards, batch.groups, loss).to(device)
    spread = (of_rewards.square() + of_charges.square()).sqrt()
    return [scaled(some, spread[_owner(part)]) for part, some in zip(parts, both, strict=True)]


def _whitened(
    parts: Sequence[MicroBatch], values: Sequence[Tensor], batch: Batch, loss: Loss, ranks: Ranks
) -> list[Tensor]:
    """With mean 0 and standard deviation 1 over all tokens of the step; equal ones become 0."""
    one = torch.zeros_like(batch.groups)
    centered_values, spread = _centered(parts, values, one, batch.lengths, ranks, correction=loss.std_correction)
    return [scaled(some, spread[0]) for some in centered_values]


def _centered(
    parts: Sequence[MicroBatch],
    values: Sequence[Tensor],
    index: Tensor,
    lengths: Tensor,
    ranks: Ranks,
    *,
    correction: int,
) -> tuple[list[Tensor], Tensor]:
    """Values of tokens less the mean of all whose trajectories share an `index` int64[N], float64; and the standard
    deviation of these n values, over n - `correction`, of each trajectory, float64[N]."""
    counts = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, lengths.double())
    device = values[0].device
    index, counts = index.to(device), counts.to(device)
    places = [index[_owner(part)] for part in parts]

    def mean(some: Sequence[Tensor]) -> Tensor:
        totals = torch.zeros_like(counts)
        for place, part_values in zip(places, some, strict=True):
            totals.index_add_(0, place, part_values)
        return ranks.sum(totals) / counts

    exact = [some.double() for some in values]
    means = mean(exact)
    off = [some - means[place] for some, place in zip(exact, places, strict=True)]
    variance = mean([some.square() for some in off]) * bessel(counts, correction)
    return off, variance.sqrt()[index]


def _owner(part: MicroBatch) -> Tensor:
    """Trajectory of the batch that each trained token belongs to; int64[n]."""
    return part.members[part.sequence]


def _last(part: MicroBatch) -> Tensor:
    """Place of the last trained token of each trajectory; int64[num_sequences]."""
    return torch.bincount(part.sequence, minlength=part.num_sequences).cumsum(0) - 1
