"""Rewards and advantages that take a model to make: KL to the reference off the rewards, and GAE with a critic.

packed micro-batches -> reference log-probs -> rewards less KL -> values -> GAE -> advantages of every token
                                                                         `---> the critic learns the returns
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from asyncrl.algo.advantage import estimate
from asyncrl.algo.gae import gae, whiten
from asyncrl.algo.loss import kl_estimate
from asyncrl.algo.method import Loss
from asyncrl.config import CriticConfig
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
        advantages = _split(whiten(torch.cat(advantages)), parts) if loss.scale == "batch_std" else advantages
        metrics |= learned
    else:
        base = estimate(rewards.cpu(), batch.groups, loss).to(rewards.device)
        ahead = _ahead(parts, charges, batch.num_tokens, ranks)
        advantages = [base[_owner(part)] + some for part, some in zip(parts, ahead, strict=True)]
    kept = batch.kept.to(rewards.device)
    return [
        replace(part, advantages=torch.where(kept[_owner(part)], values, 0.0))
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
    with torch.no_grad():
        values = [critic.values(part) for part in parts]
    advantages = []
    for part, charge, value in zip(parts, charges, values, strict=True):
        earned = charge.clone()
        earned[_last(part)] += rewards[part.members]
        advantages.append(gae(earned, value, part.sequence, settings.gamma, settings.lam))
    returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
    return advantages, critic.update(parts, values, returns)


def _ahead(parts: Sequence[MicroBatch], charges: Sequence[Tensor], num_tokens: int, ranks: Ranks) -> list[Tensor]:
    """The charges from each token to the end of its trajectory, less the mean of that over all tokens of the step."""
    ahead = [
        gae(charge, torch.zeros_like(charge), part.sequence, 1.0, 1.0)
        for part, charge in zip(parts, charges, strict=True)
    ]
    mean = ranks.sum(torch.stack([some.sum() for some in ahead]).sum()) / num_tokens
    return [some - mean for some in ahead]


def _owner(part: MicroBatch) -> Tensor:
    """Trajectory of the batch that each trained token belongs to; int64[n]."""
    return part.members[part.sequence]


def _last(part: MicroBatch) -> Tensor:
    """Place of the last trained token of each trajectory; int64[num_sequences]."""
    return torch.bincount(part.sequence, minlength=part.num_sequences).cumsum(0) - 1


def _split(values: Tensor, parts: Sequence[MicroBatch]) -> list[Tensor]:
    return list(values.split([len(part.advantages) for part in parts]))
