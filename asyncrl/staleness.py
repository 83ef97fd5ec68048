"""How much staleness to admit: lower when the batches no longer look like the policy's own, higher while they do.

    ess/token, mismatch/k3, learner/idle --mean over PATIENCE steps--> one step down, up, or stay

More staleness can only buy time that the learner spends waiting, so it is raised only while the learner waits. Both
thresholds say the same of log-normal ratios, whose sample size is exp(-2 KL); heavy tails show in the sample size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

PATIENCE = 4
"""Steps that a decision is taken over, and that a change is given, beyond the lag itself, to show its effect."""

_ESS_POOR, _ESS_GOOD = 0.9, 0.97
_K3_POOR, _K3_GOOD = 0.05, 0.015
_IDLE = 0.02
"""Share of the time that the learner waits, from which on more staleness may pay."""


class StalenessControl:
    """The admitted staleness of a run between two bounds. A resumed run starts at the lower one again."""

    def __init__(self, lowest: int, highest: int) -> None:
        self.staleness = lowest
        self._lowest, self._highest = lowest, highest
        self._rows: deque[tuple[float, float, float]] = deque(maxlen=PATIENCE)
        self._wait = 0

    def decide(self, metrics: Mapping[str, float]) -> str | None:
        """Takes in the metrics of a step. If `staleness` changed because of them: from what to what, and why."""
        self._wait -= 1
        if self._wait >= 0:  # batches admitted before the last change are still on their way
            return None
        self._rows.append((metrics["ess/token"], metrics["mismatch/k3"], metrics["learner/idle"]))
        if len(self._rows) < PATIENCE:
            return None
        ess, k3, idle = (sum(column) / PATIENCE for column in zip(*self._rows, strict=True))
        before = self.staleness
        if ess < _ESS_POOR or k3 > _K3_POOR:
            self.staleness = max(self._lowest, before - 1)
        elif ess > _ESS_GOOD and k3 < _K3_GOOD and idle > _IDLE:
            self.staleness = min(self._highest, before + 1)
        if self.staleness == before:
            return None
        self._rows.clear()
        self._wait = max(before, self.staleness) + 1
        return (
            f"staleness {before} -> {self.staleness}: over {PATIENCE} steps ess/token {ess:.3f}, mismatch/k3 {k3:.4f}, "
            f"learner idle {idle:.0%}"
        )
