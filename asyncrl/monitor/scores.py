"""What held-out attempts say about a version: mean reward, pass@k, and how sure one can be of them.

A prompt has n attempts. Prompts are the independent units, attempts of one prompt are not: intervals are over prompts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from asyncrl.types import NOISE, Failure, Group, Version, reaches, same_reward

_Z = 1.959964
"""Of the normal distribution at 95 %."""
_NUM_RESAMPLES = 2000


def summarize(
    groups: Sequence[Group], version: Version, pass_reward: float | None, unscored: Sequence[Sequence[Failure]] = ()
) -> dict[str, float]:
    """The metrics `eval/...` of groups with n attempts each; an attempt passes with a reward of at least `pass_reward`,
    and without such a mark there is no pass@k.
    `unscored` are the failures of each prompt that is left out; one is, too, none of whose attempts has a reward. Of no
    prompt at all the means are nan.

    pass@k is there for k = 1, 2, 4, ... up to n, and for n.
    """
    unscored = [*unscored, *(group.failures for group in groups if not group.scored)]
    groups = [group for group in groups if group.scored]
    means = [_mean(group.scored) for group in groups]
    low, high = interval(means) if means else (math.nan, math.nan)
    row = {
        "eval/accuracy": _mean(means),
        "eval/low": low,
        "eval/high": high,
        "eval/mean_length": _mean([length for group in groups for length in group.lengths]),
        "eval/truncated": _mean([group.metrics.get("truncated", 0.0) for group in groups]),
        "eval/failures": float(sum(map(len, [*(group.failures for group in groups), *unscored]))),
        "eval/unscored": float(len(unscored)),
        "eval/mixed_versions": _mean([float((group.oldest, group.newest) != (version, version)) for group in groups]),
    }
    if pass_reward is not None:
        for k in ks(min((len(group.scored) for group in groups), default=1)):
            row[f"eval/pass@{k}"] = _mean(pass_at(groups, k, pass_reward))
    return row | by_source(groups, "eval")


def by_source(groups: Sequence[Group], area: str) -> dict[str, float]:
    """`area/NAME`: the mean reward of each source of prompts, such as the environments of a mixture."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        if group.prompt.source:
            rewards[group.prompt.source] += group.scored
    return {f"{area}/{source}": _mean(values) for source, values in sorted(rewards.items()) if values}


def ks(num_samples: int) -> list[int]:
    """The k of pass@k that n samples are reported with."""
    return sorted({*(2**power for power in range(num_samples.bit_length())), num_samples})


def pass_at(groups: Sequence[Group], k: int, pass_reward: float) -> list[float]:
    """pass@k of each prompt."""
    return [
        pass_at_k(len(group.scored), sum(reaches(reward, pass_reward) for reward in group.scored), k)
        for group in groups
    ]


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Probability that at least one of k samples passes, without bias: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021 (arXiv:2107.03374), equation 1. Raises `ValueError` for k above n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a prompt, got {num_samples}: raise eval.num_samples")
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean of independent values, one a prompt.

    Values within [0, 1]: Wilson's score interval (1927) at the effective sample size p (1 - p) / var(mean), which is
    the number of prompts for a single attempt each, and more for the means of several (Franco et al. 2019). It stays
    sound where all values are 0 or all are 1. Other values: percentiles of the bootstrap, with a fixed seed.
    """
    array = np.asarray(values, dtype=np.float64)
    mean, size = float(array.mean()), len(array)
    if array.min() < -NOISE or array.max() > 1 + NOISE:
        draws = np.random.default_rng(0).integers(size, size=(_NUM_RESAMPLES, size))
        low, high = np.percentile(array[draws].mean(1), [2.5, 97.5])
        return float(low), float(high)
    variance = float(array.var())
    differ = not same_reward(array.max(), array.min())  # of equal values, rounding may leave a variance
    effective = size * mean * (1 - mean) / variance if differ else size
    shrink = 1 + _Z**2 / effective
    center = (mean + _Z**2 / (2 * effective)) / shrink
    half = _Z / shrink * math.sqrt(mean * (1 - mean) / effective + (_Z / (2 * effective)) ** 2)
    return max(0.0, center - half), min(1.0, center + half)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
