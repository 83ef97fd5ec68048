"""The values that flow through the system, and the one index convention.

    Prompt --generate--> Completion --env.play--> Trajectory --x G--> Group --buffer--> [Group] --packing--> Batch

Index convention: `x[t]` describes token `t`, everywhere. `logprobs[t]` is the log-probability of `token_ids[t]` given
the tokens before it; `mask[t]` says whether token `t` is trained on. The shift to next-token targets happens once, in
`packing.py`. Columns are one-dimensional numpy arrays of equal length; every value here is frozen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Version: TypeAlias = int
"""Learner steps baked into a set of weights; 0 is the initial checkpoint."""

Finish: TypeAlias = Literal["stop", "length", "abort"]
"""Why a completion ended: a stop token or text, even where it is the last token that the budget allows; the budget; or
an abort."""

RELATIVE_NOISE, NOISE = 1e-6, 1e-9
"""How far rewards may be apart that are the same number: a share of the larger one, or this much. The parts of a score
add up with a rounding error, 0.7 + 0.2 + 0.1 to less than 1, and the learner holds rewards in float32."""

Ints: TypeAlias = npt.NDArray[np.int32]
Floats: TypeAlias = npt.NDArray[np.float32]
Bools: TypeAlias = npt.NDArray[np.bool_]


UNSCORED = float("nan")
"""The reward of an attempt that cannot be scored: it stays in its group without a part in means or deviations, with
advantage 0. An environment returns this very object; any other nan is a fault."""


def same_reward(one: float, other: float) -> bool:
    """Whether two rewards are equal but for rounding."""
    return math.isclose(one, other, rel_tol=RELATIVE_NOISE, abs_tol=NOISE)


def reaches(reward: float, mark: float) -> bool:
    """Whether a reward is at least `mark`, but for rounding."""
    return reward >= mark or same_reward(reward, mark)


_COLUMNS = {
    "token_ids": ("iu", "integers"),
    "mask": ("b", "booleans"),
    "logprobs": ("f", "floats"),
    "versions": ("iu", "integers"),
}
"""Of a trajectory: the kinds of numpy's types that a column may have, and what they are called."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One draw from an environment.

    `id` counts draws from 0: it names the group, seeds its samples and is the cursor that a resumed run continues from.
    """

    id: int
    token_ids: tuple[int, ...]
    target: str
    """What its environment needs to score an attempt."""
    source: str = ""
    """The environment that drew it, by its name in a mixture; or the value of a data set's source column."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off. A stop token, or one that
    completes a text in `stop`, ends a completion and is part of it."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What an engine generated for one request; columns of length n, the stop token included.

    `logprobs` are of the distribution that was sampled from, after temperature, top-p and top-k. `versions` is stamped
    by the engine, token by token; `digests` maps each of those versions to the digest of the weights that made it.
    """

    token_ids: Ints
    logprobs: Floats
    versions: Ints
    finish: Finish
    digests: dict[Version, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One scored attempt: prompt, completions and tool output in one row of length T.

    Tokens that the model did not sample (prompt, tool output) have `mask` False; their `logprobs` and `versions` are 0.
    """

    token_ids: Ints
    mask: Bools
    logprobs: Floats
    versions: Ints
    reward: float
    """Finite, or nan where there is none (`UNSCORED`)."""
    finish: Finish
    digests: dict[Version, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (kinds, words) in _COLUMNS.items():
            column = getattr(self, name)
            if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype.kind not in kinds:
                got = (
                    f"one of {column.dtype} and shape {column.shape}"
                    if isinstance(column, np.ndarray)
                    else type(column)
                )
                raise RuntimeError(f"{name} of a trajectory is a one-dimensional numpy array of {words}, got {got}")
        lengths = {len(self.token_ids), len(self.mask), len(self.logprobs), len(self.versions)}
        if len(lengths) != 1:
            raise RuntimeError(f"the columns of a trajectory differ in length: {sorted(lengths)}")
        if not self.mask.any() or self.mask[0]:
            raise RuntimeError("a trajectory starts with a prompt token and holds at least one sampled token")


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that came to nothing: the kind that it is counted under, and what was wrong."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The G trajectories of one prompt: the unit of buffering and of advantages, never split.

    The driver sees this metadata only. `trajectories` is either the trajectories themselves or the runtime's reference
    to them, resolved where the learner runs.
    """

    prompt: Prompt
    rewards: tuple[float, ...]
    lengths: tuple[int, ...]
    oldest: Version
    newest: Version
    digests: dict[Version, str]
    metrics: dict[str, float]
    trajectories: Any
    stored: str = ""
    """Digest of the file that holds the group in the run folder; empty if there is none."""
    failures: tuple[Failure, ...] = ()
    """Attempts that were made again; not stored, as they are counted when the group is handed over."""

    @property
    def scored(self) -> tuple[float, ...]:
        """The rewards of the attempts that have one."""
        return tuple(reward for reward in self.rewards if not math.isnan(reward))

    @property
    def has_variance(self) -> bool:
        """Whether the rewards differ; without variance every group-relative advantage is zero.

        These are the environment's rewards, before any overlong punishment, as DAPO's dynamic sampling goes by accuracy
        alone (2503.14476, equation 11): a group that is solved throughout is dropped whatever its lengths.
        """
        rewards = self.scored
        return len(rewards) > 1 and not same_reward(min(rewards), max(rewards))
