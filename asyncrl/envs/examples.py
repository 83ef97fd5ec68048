"""The rows of a split, ready to be drawn. A few thousand are made ready at once, so that one that cannot be used is
known before the run begins; of more, a sample is tried and each is made ready when it is drawn: hundreds of thousands
of prompts take minutes to tokenize and gigabytes to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from asyncrl.envs.data import Row

FEW = 10_000
"""Rows that are all made ready at once."""
_SAMPLE = 1000
"""Of more: how many, spread evenly, are tried at once."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row that is ready to be drawn. `scoring` is JSON of what scoring needs; `reply`, a right completion, and
    `source` may be empty."""

    token_ids: tuple[int, ...]
    scoring: str
    reply: str
    source: str


class Examples:
    """A sequence to draw from."""

    def __init__(
        self, rows: Sequence[tuple[int, Row]], make: Callable[[int, Row], Example | None], *, skips: bool
    ) -> None:
        """`rows` with their numbers in the data; `make` gives the example of one, None for one that is skipped, and
        raises what `__init__` and `drawn` do. `skips`: whether it may. `size` of an epoch is None where it is not known
        yet."""
        self._make, self._rows = make, rows
        self._ready: list[Example] | None = None
        if len(rows) <= FEW:
            self._ready = [example for row in rows if (example := make(*row))]
            self.usable = bool(self._ready)
            self.size: int | None = len(self._ready)
        else:
            tried = [make(*row) for row in rows[:: len(rows) // _SAMPLE or 1]]
            self.usable = any(tried)
            self.size = None if skips else len(rows)

    def drawn(self, order: Callable[[int], Sequence[int]], begin: int = 0) -> Iterator[Example]:
        """The examples in an order of so many numbers, from `begin` on, without those that are skipped."""
        if self._ready is not None:
            yield from (self._ready[index] for index in order(len(self._ready))[begin:])
            return
        for index in order(len(self._rows))[begin:]:
            if example := self._make(*self._rows[index]):
                yield example
