"""The course of a run for a view of it: curves of a bounded number of points, and the newest steps.

What is held and what a frame costs do not grow with the run: a curve that is full takes the means of pairs of points.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from asyncrl.monitor.rows import Damage, Row, parse

_MAX_POINTS = 2048


class Curve:
    """The values of one metric, as means of 1, 2, 4, ... of them."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self.last = math.nan
        self._size, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        self.last = value
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._size:
            return
        self.points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.points) >= _MAX_POINTS:
            self.points = [(one + other) / 2 for one, other in zip(self.points[::2], self.points[1::2], strict=True)]
            self._size *= 2


class Course:
    """What the rows so far add up to: `curves` of the metrics named, the newest `steps`, the newest `version`."""

    def __init__(self, names: Sequence[str], num_steps: int, rows: Iterable[Row] = ()) -> None:
        self.curves = {name: Curve() for name in names}
        self.steps: deque[Row] = deque(maxlen=num_steps)
        self.version = 0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        for name, curve in self.curves.items():
            if (value := row.get(name)) is not None:
                curve.add(value)
        if "reward/mean" in row:
            self.steps.append(row)
            self.version = max(self.version, row["version"])


class Follower:
    """Reads a metrics file that grows; each read takes up only what is new."""

    def __init__(self, path: Path, names: Sequence[str], num_steps: int) -> None:
        self._path, self._names, self._num_steps = path, names, num_steps
        self._begin(None)

    def _begin(self, file_id: int | None) -> None:
        self._file_id, self._offset, self._num_lines = file_id, 0, 0
        self.course, self.damage = Course(self._names, self._num_steps), Damage(self._path)

    def read(self) -> Course:
        """Everything so far. A resumed run writes the file anew, without the steps that it makes again."""
        if not self._path.is_file():
            return self.course
        with self._path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._file_id or stat.st_size < self._offset:
                self._begin(stat.st_ino)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._num_lines += 1
                if (row := parse(line)) is not None:
                    self.course.add(row)
                else:
                    self.damage.add(self._num_lines)
        return self.course
