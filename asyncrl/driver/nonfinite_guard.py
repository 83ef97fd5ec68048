"""Numerical guard: what the driver does when the learner refused an optimizer step.

The learner takes no step on a gradient that is not finite, and its version stays. Such a batch is counted and its
groups are dropped; what they were is written to `nonfinite.jsonl` in the run folder, so that they can be looked at.
Too many in a row end the run: the weights, or the data, are beyond repair by waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from asyncrl.types import Group, Version

REASON = "non-finite gradient"


class StepGuard:
    """Counts refused steps."""

    def __init__(self, folder: Path, max_in_a_row: int) -> None:
        """`max_in_a_row`: refused steps that are put up with, one after the other."""
        self._path = folder / "nonfinite.jsonl"
        self._max_in_a_row = max_in_a_row
        self.num_skipped = 0
        self._in_a_row = 0

    def passed(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def skipped(self, groups: Sequence[Group], version: Version, norm: float) -> str:
        """A step was refused: writes down on what. Returns a line for the person who watches.

        Raises `RuntimeError` naming the groups once too many were refused in a row.
        """
        self.num_skipped += 1
        self._in_a_row += 1
        ids = [group.prompt.id for group in groups]
        what = {
            "version": version,
            "norm": str(norm),
            "groups": [
                {"id": group.prompt.id, "rewards": group.rewards, "lengths": group.lengths, "oldest": group.oldest}
                for group in groups
            ],
        }
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(what) + b"\n")
        told = f"the gradient of version {version} on groups {ids} is {norm}; see {self._path.name}"
        if self._in_a_row > self._max_in_a_row:
            raise RuntimeError(
                f"{self._in_a_row} optimizer steps in a row had a gradient that is not finite "
                f"(learner.max_skipped_steps is {self._max_in_a_row}); last, {told}. Lower learner.learning_rate, or "
                "go on from an earlier checkpoint"
            )
        return f"step skipped: {told}"
