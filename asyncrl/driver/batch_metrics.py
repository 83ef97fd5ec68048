"""What a step's row of metrics says of its batch, of all that was generated, of the buffer, and of the driver's own
time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from asyncrl.driver.buffer import Buffer
from asyncrl.monitor.scores import by_source
from asyncrl.types import Group

_MANY = 0.5
"""Share of trajectories that ran out of tokens above which they are named as a cause."""


def of_batch(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and lengths of a batch, from its metadata."""
    num_attempts = sum(len(group.rewards) for group in groups)
    rewards = [reward for group in groups for reward in group.scored] or [math.nan]
    lengths = [length for group in groups for length in group.lengths]
    mean = sum(rewards) / len(rewards)
    row = {
        "reward/mean": mean,
        "reward/std": (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5,
        "reward/unscored": sum(len(group.rewards) - len(group.scored) for group in groups) / num_attempts,
        "reward/zero_variance": sum(not group.has_variance for group in groups) / len(groups),
        "completion/mean_length": sum(lengths) / len(lengths),
        "completion/max_length": float(max(lengths)),
        "completion/mixed_versions": sum(group.newest > group.oldest for group in groups) / len(groups),
    }
    for name in sorted({name for group in groups for name in group.metrics}):  # environments of a mixture differ
        values = [group.metrics[name] for group in groups if name in group.metrics]
        row[f"completion/{name}"] = sum(values) / len(values)
    return row | by_source(groups, "reward")


def of_buffer(buffer: Buffer, wait_s: float) -> dict[str, float]:
    """How full the buffer is after a step, and how long the batch lay in it."""
    return {
        "buffer/staleness": float(buffer.staleness),
        "buffer/ready": float(buffer.num_ready),
        "buffer/pending": float(buffer.num_pending),
        "buffer/wait_s": wait_s,
        "buffer/dropped": float(sum(buffer.dropped.values())),
    }


class Generated:
    """What was generated since the last step, whatever became of it: of what is dropped at once no batch tells."""

    def __init__(self) -> None:
        self.equal_in_a_row = 0
        """Groups without variance since the last one with some."""
        self._cut_off_in_a_row = 0.0
        self._total = 0.0
        self._num_rewards = self._num_groups = self._num_equal = 0

    def add(self, group: Group) -> None:
        self._total += sum(group.scored)
        self._num_rewards += len(group.scored)
        self._num_groups += 1
        self._num_equal += not group.has_variance
        if group.has_variance:
            self.equal_in_a_row, self._cut_off_in_a_row = 0, 0.0
        else:
            self.equal_in_a_row += 1
            self._cut_off_in_a_row += group.metrics.get("truncated", 0.0)

    def cut_off(self) -> str:
        """What is to be said of groups without variance if most of their trajectories ran out of tokens."""
        share = self._cut_off_in_a_row / max(self.equal_in_a_row, 1)
        if share <= _MANY:
            return ""
        return f" {share:.0%} of their trajectories ran out of tokens: raise rollout.max_new_tokens first."

    def take(self) -> dict[str, float]:
        """Of all since the last call; nan if there was none."""
        some = self._num_groups > 0
        row = {
            "reward/generated": self._total / self._num_rewards if self._num_rewards else math.nan,
            "reward/generated_zero_variance": self._num_equal / self._num_groups if some else math.nan,
        }
        self._total, self._num_rewards, self._num_groups, self._num_equal = 0.0, 0, 0, 0
        return row


class Clock:
    """Splits the wall time of a step of the driver into named laps."""

    def __init__(self) -> None:
        self._begin = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        laps = {f"time/{name}_s": seconds for name, seconds in self._laps.items()}
        return laps | {"time/total_s": self._last - self._begin}
