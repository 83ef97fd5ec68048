"""What the loss saw and did in one step: mismatch, effective sample size, masks, lag; and the alarms on them.

Computed once a step on the columns of all micro-batches together, never as a mean of means. Weights are unclipped and
in float64: clamped weights make every effective sample size look healthy. Tokens whose log-ratio or weight is not
finite are left out of the statistics and counted instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from asyncrl.algo.loss import Columns, Outcome, concatenate, kl_estimate, sequence_sum
from asyncrl.algo.loss_spec import Loss

_MISMATCH = {
    "k1": "mean of -log ratio: unbiased, noisy estimate of KL(behavior || current), may be negative",
    "k3": "mean of ratio - 1 - log ratio: estimate of KL(behavior || current), never negative",
    "probability_gap": "mean absolute change of the tokens' probability",
    "ratio_p999": "99.9th percentile of the ratio current / behavior",
    "ratio_max": "largest ratio",
    "ratio_min": "smallest ratio",
}
_SPLITS = {
    "": "all tokens",
    "_fresh": "tokens of trajectories at lag 0 throughout: the engine alone, no staleness; nan without any",
    "_stale": "tokens of lag 1 or more; nan without any",
}
"""Tokens of lag 0 behind older ones of their trajectory are in neither part: with rollout.on_update=keep they were
sampled on keys and values that older weights had made."""

_LAG_BINS = 5

METRICS: dict[str, str] = {
    **{f"mismatch/{key}{split}": f"{text} ({of})" for split, of in _SPLITS.items() for key, text in _MISMATCH.items()},
    "ess/token": "effective sample size of the unclipped token ratios, as a share of the tokens",
    "ess/sequence": "the same of the products over trajectories, as a share of them: an alarm, not a weight",
    "ess/chi2": "mean of (ratio - 1)^2 of the unclipped token ratios: estimate of chi^2(current || behavior)",
    "ess/token_capped": "effective sample size of the weights in use, as a share of the tokens: after caps, with "
    "weights outside bounds that drop as 0, and before masks",
    "clip/capped_positive": "share of all tokens that have a positive advantage and a clamped weight",
    "clip/capped_negative": "the same with a negative advantage",
    "clip/trust_positive": "share of all tokens that have a positive advantage and were removed one by one",
    "clip/trust_negative": "the same with a negative advantage",
    "clip/guard_positive": "share of all tokens that have a positive advantage and were removed with their sequence",
    "clip/guard_negative": "the same with a negative advantage",
    "clip/removed_share": "share of the gradient weight, the sum of n |c A| over tokens, that the masks removed",
    "clip/top_share": "share of the remaining gradient weight on the 1 % of tokens that have the most",
    "clip/positive_share": "share of the remaining gradient weight on positive advantages",
    "lag/mean": "learner version minus token version, mean over tokens",
    "lag/p95": "95th percentile of the lag of the tokens",
    "lag/max": "largest lag of a token",
    "lag/span": "newest minus oldest version inside one trajectory, maximum over trajectories",
    **{f"lag/share_{bin_}": f"histogram of the lag: share of the tokens at {bin_}" for bin_ in range(_LAG_BINS)},
    "lag/share_more": f"histogram of the lag: share of the tokens at {_LAG_BINS} or more",
    "policy/entropy": "entropy of the policy over the vocabulary in nats, mean over tokens",
    "policy/advantage_mean": "mean advantage of the trajectories",
    "policy/advantage_std": "standard deviation of the advantages of the trajectories",
    "policy/logprob_positive": "mean log-prob of tokens with a positive advantage; nan without any",
    "policy/logprob_negative": "mean log-prob of tokens with a negative advantage; nan without any",
    "policy/nonfinite": "tokens whose log-ratio, weight or coefficient is not finite",
}
"""Every metric of `diagnose`, in order, with its meaning."""

WITH_REFERENCE = {
    "policy/kl_reference": "mean of exp(-x) - 1 + x with x = current - reference: estimate of KL(current || reference) "
    "at the tokens as they were sampled, nats (runs with a reference model)"
}
"""What `diagnose` adds where the columns hold reference log-probs."""

_ESS_TOKEN_LOW = 0.9
_ESS_SEQUENCE_LOW = 0.1
_ESS_SEQUENCE_FALL = 3.0
_ESS_SEQUENCE_STEPS = 20
_K3_FRESH = 0.01
"""Token KL between engine and learner under the same weights; bfloat16 on both sides shows 0.0005 to 0.002."""
_K3 = 0.05
"""Token KL of all tokens."""

_REMOVED = 0.8
"""Share of the gradient weight that masks may remove: with more there is nothing left to learn from."""
_REMOVED_OF_ONE_SIGN = 0.2
"""The same where all that is left has one sign of the advantage, and masks removed the other."""
_ONE_SIGN = 0.05

_FLAT_STEPS = 10
"""Steps in a row without any advantage; a few happen to a batch of few groups."""


@torch.no_grad()
def diagnose(columns: Sequence[Columns], outcomes: Sequence[Outcome], entropy: float) -> dict[str, float]:
    """The metrics of one step, exactly the keys of `METRICS`, and of `WITH_REFERENCE` where there is one.

    `columns` and `outcomes` are those of the micro-batches of the step, at least one token in all; `entropy` is the
    mean over their tokens in nats. Log-ratios are current minus behavior.
    """
    joined, outcome = concatenate(columns, outcomes)
    values = _mismatch(joined, outcome) | _sample_sizes(joined, outcome) | _clipping(joined, outcome)
    values |= _lags(joined) | _policy(joined, outcome) | _reference(joined)
    numbers = torch.stack([value.double() for value in values.values()]).tolist()  # one transfer from the device
    metrics = dict(zip(values, numbers, strict=True)) | {"policy/entropy": entropy}
    return {name: metrics[name] for name in (*METRICS, *WITH_REFERENCE) if name in metrics}


def learning_rate_factor(loss: Loss, metrics: Mapping[str, float]) -> float:
    """What the step multiplies its learning rate by, from its own metrics: the root of the effective sample size of the
    trajectories (VCPO 2602.17616), or 1."""
    return math.sqrt(min(1.0, metrics["ess/sequence"])) if loss.learning_rate_scale == "sqrt_ess" else 1.0


def alarms(metrics: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What is wrong with this step, one sentence for each metric that shows it; empty if nothing is.

    `history` holds the metrics of earlier steps, oldest first, without this one. Metrics that are nan raise nothing.
    """
    found = {}
    if metrics["policy/nonfinite"] > 0:
        told = f"{metrics['policy/nonfinite']:.0f} tokens have a log-prob or weight that is not finite"
        found["policy/nonfinite"] = told
    if metrics["ess/token"] < _ESS_TOKEN_LOW:
        found["ess/token"] = (
            f"ess/token is {metrics['ess/token']:.3f}, below {_ESS_TOKEN_LOW}: data are far off the policy; lower "
            "buffer.max_staleness, buffer.reuse or learner.learning_rate"
        )
    now = metrics["ess/sequence"]
    recent = [row["ess/sequence"] for row in history[-_ESS_SEQUENCE_STEPS:]]
    best = max(filter(math.isfinite, recent), default=now)
    if now < _ESS_SEQUENCE_LOW and best >= _ESS_SEQUENCE_FALL * now:
        found["ess/sequence"] = f"ess/sequence fell from {best:.3f} to {now:.3f} within {_ESS_SEQUENCE_STEPS} steps"
    if (fresh := metrics["mismatch/k3_fresh"]) > _K3_FRESH:
        found["mismatch/k3_fresh"] = (
            f"mismatch/k3_fresh is {fresh:.4f}, above {_K3_FRESH}: engine and learner disagree under the same weights; "
            "do the environment's trajectories hold exactly the tokens that were given and sampled, and their mask? "
            "With rollout.top_p or rollout.top_k it is the part of the vocabulary that they leave out"
        )
    elif (k3 := metrics["mismatch/k3"]) > _K3:
        found["mismatch/k3"] = (
            f"mismatch/k3 is {k3:.4f}, above {_K3}: tokens are far off the policy; lower buffer.max_staleness, "
            "buffer.reuse or learner.learning_rate"
        )
    if told := _removed(metrics):
        found["clip/removed_share"] = (
            f"{told}: the bounds of the loss are narrower than the ratios spread; widen its trust_* or guard_* "
            "(algorithm.loss), lower buffer.max_staleness or buffer.reuse, or see what mismatch/k3_fresh says of the "
            "engine"
        )
    recent_steps = [*history[-(_FLAT_STEPS - 1) :], metrics]
    if len(recent_steps) == _FLAT_STEPS and all(map(_is_flat, recent_steps)):
        told = f"every advantage was 0 in {_FLAT_STEPS} steps in a row"
        found["policy/advantage_std"] = f"{told}, {_why_flat(recent_steps)}"
    return found


def _why_flat(steps: Sequence[Mapping[str, float]]) -> str:
    if any(row.get("reward/zero_variance", 1.0) < 1 for row in steps):
        return (
            "though rewards did differ: do all replies run out of tokens (completion/truncated), and does "
            "algorithm.mask_truncated mask them? Raise rollout.max_new_tokens"
        )
    return (
        "so that rewards teach nothing: are all replies to a prompt scored alike (reward/mean, and the samples in "
        "trajectories/)? Take easier or harder prompts, or mend the reward"
    )


def _removed(metrics: Mapping[str, float]) -> str:
    """What the masks took that a step cannot do without; empty if nothing is."""
    removed, positive = metrics["clip/removed_share"], metrics["clip/positive_share"]
    if removed > _REMOVED:
        return f"clip/removed_share is {removed:.2f}, above {_REMOVED}"
    for sign, share in (("positive", positive), ("negative", 1.0 - positive)):
        gone = metrics[f"clip/trust_{sign}"] + metrics[f"clip/guard_{sign}"]
        if removed > _REMOVED_OF_ONE_SIGN and share < _ONE_SIGN and gone > 0:
            return f"clip/removed_share is {removed:.2f}, and what is left has no {sign} advantages"
    return ""


def _is_flat(metrics: Mapping[str, float]) -> bool:
    return metrics["policy/advantage_mean"] == 0 == metrics["policy/advantage_std"]


def _mismatch(columns: Columns, outcome: Outcome) -> dict[str, Tensor]:
    log_ratio = outcome.log_ratio.double()
    gap = (columns.logprobs.double().exp() - columns.behavior_logprobs.double().exp()).abs()
    finite = log_ratio.isfinite()
    fresh = _lag_of_trajectories(columns, "amax")[columns.sequence] == 0
    chosen = {"": finite, "_fresh": finite & fresh, "_stale": finite & (columns.lag > 0)}
    statistics: dict[str, Callable[[Tensor], Tensor]] = {
        "k1": lambda x: -x.mean(),
        "k3": lambda x: (x.expm1() - x).mean(),
        "ratio_p999": lambda x: _percentile(x, 0.999).exp(),
        "ratio_max": lambda x: _percentile(x, 1.0).exp(),
        "ratio_min": lambda x: _percentile(x, 0.0).exp(),
    }
    values: dict[str, Tensor] = {}
    for split, tokens in chosen.items():
        ascending = log_ratio[tokens].sort().values
        values |= {f"mismatch/{name}{split}": of(ascending) for name, of in statistics.items()}
        values[f"mismatch/probability_gap{split}"] = gap[tokens].mean()
    return values


def _sample_sizes(columns: Columns, outcome: Outcome) -> dict[str, Tensor]:
    token = _finite(outcome.log_ratio.double())
    in_use = outcome.log_weight.double().masked_fill(outcome.dropped, -math.inf)
    sequence = _finite(sequence_sum(outcome.log_ratio.double(), columns))
    return {
        "ess/token": _sample_size(token),
        "ess/sequence": _sample_size(sequence),
        "ess/chi2": token.expm1().square().mean(),
        "ess/token_capped": _sample_size(in_use[in_use.isfinite() | outcome.dropped]),
    }


def _sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / (N sum w^2), by log-sum-exp so that long trajectories do not overflow."""
    total, squares = log_weights.logsumexp(0), (2 * log_weights).logsumexp(0)
    return (2 * total - squares - math.log(max(len(log_weights), 1))).exp()


def _clipping(columns: Columns, outcome: Outcome) -> dict[str, Tensor]:
    signs = {"positive": columns.advantages > 0, "negative": columns.advantages < 0}
    events = {"capped": outcome.capped, "trust": outcome.trust_masked, "guard": outcome.guard_masked}
    values = {
        f"clip/{event}_{sign}": (happened & of_sign).double().mean()
        for event, happened in events.items()
        for sign, of_sign in signs.items()
    }
    weight = columns.normalizers.double() * outcome.log_weight.double().exp() * columns.advantages.double().abs()
    weight = torch.where(weight.isfinite(), weight, 0.0)
    left = torch.where(outcome.trust_masked | outcome.guard_masked, 0.0, weight)
    top = left.topk(math.ceil(0.01 * len(left))).values
    values["clip/removed_share"] = _share(weight.sum() - left.sum(), weight.sum())
    values["clip/top_share"] = _share(top.sum(), left.sum())
    values["clip/positive_share"] = _share(left[signs["positive"]].sum(), left.sum())
    return values


def _lags(columns: Columns) -> dict[str, Tensor]:
    lag = columns.lag.double()
    span = _lag_of_trajectories(columns, "amax") - _lag_of_trajectories(columns, "amin")
    return {
        "lag/mean": lag.mean(),
        "lag/p95": _percentile(lag.sort().values, 0.95),
        "lag/max": lag.max(),
        "lag/span": span.max(),
        **{f"lag/share_{bin_}": (lag == bin_).double().mean() for bin_ in range(_LAG_BINS)},
        "lag/share_more": (lag >= _LAG_BINS).double().mean(),
    }


def _lag_of_trajectories(columns: Columns, extreme: Literal["amin", "amax"]) -> Tensor:
    """Smallest or largest lag of each trajectory; float64[num_sequences]."""
    lag = columns.lag.double()
    start = torch.zeros(columns.num_sequences, dtype=lag.dtype, device=lag.device)
    return start.scatter_reduce(0, columns.sequence, lag, extreme, include_self=False)


def _policy(columns: Columns, outcome: Outcome) -> dict[str, Tensor]:
    advantages, logprobs = columns.advantages.double(), columns.logprobs.double()
    lengths = sequence_sum(torch.ones_like(advantages), columns)
    of_trajectory = sequence_sum(advantages, columns) / lengths
    finite = logprobs.isfinite()
    return {
        "policy/advantage_mean": of_trajectory.mean(),
        "policy/advantage_std": of_trajectory.std(correction=0),
        "policy/logprob_positive": logprobs[finite & (advantages > 0)].mean(),
        "policy/logprob_negative": logprobs[finite & (advantages < 0)].mean(),
        "policy/nonfinite": outcome.nonfinite.sum(),
    }


def _reference(columns: Columns) -> dict[str, Tensor]:
    if columns.reference_logprobs is None:
        return {}
    away = columns.logprobs.double() - columns.reference_logprobs.double()
    return {"policy/kl_reference": kl_estimate(_finite(away), "k3").mean()}


def _finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]


def _percentile(ascending: Tensor, share: float) -> Tensor:
    """Nearest-rank percentile, an element of sorted values; nan of nothing.

    (`torch.quantile` refuses large inputs, and `kthvalue` has one thread block of a GPU look for each.)
    """
    if not len(ascending):
        return ascending.new_tensor(math.nan)
    return ascending[max(1, math.ceil(share * len(ascending))) - 1]


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where there is nothing to share."""
    return torch.where(whole > 0, part / whole, 0.0)
