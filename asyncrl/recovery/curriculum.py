"""A curriculum by pass rate: what is always or never solved comes less often. Off unless asked for.

    next draw --> bucket of its prompt, or of its source --> new, between --------------------> played
                                                        '--> easy, hard: with probability `skip` --> drawn and dropped

What it does to training. The distribution of the prompts is no longer the environment's: a draw in bucket "easy" or
"hard" is kept with probability 1 - skip, so a bucket that held the share s of the draws holds s (1 - skip) over the sum
of what is kept. The training reward is a mean over that mixture and cannot be compared with a run without a curriculum;
held-out prompts never pass through here and can. Nothing is given up for good: `skip` is below 1, so every prompt comes
back and its bucket is found anew from its last visits, later ones under later weights.

All that it knows comes from the journal (`Generated.passed`), and each draw that it leaves out is in there as drawn and
dropped. So a resumed run goes on with the same buckets; what was decided on the way to its weights stands, and what
lost weights had a part in is decided anew. Which groups are finished at the moment of a draw depends on timing, unless
staleness is 0. If the journal is lost, what was known of the prompts is lost with it.

Every prompt that was met is remembered, some 400 bytes each: one that was forgotten would be new whenever it comes
again. A task that makes up prompts without end has hardly any that come again, and so nothing to leave out: for it,
curriculum.by is "source" or "off".
"""

from __future__ import annotations

import random
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from asyncrl.config.schema import CurriculumConfig
from asyncrl.recovery.prompt_states import Admitted, Dropped, Generated, Record, Resumed, Saved, Synced, checksum_of
from asyncrl.types import Prompt, Version

Bucket: TypeAlias = Literal["new", "hard", "between", "easy"]

REASONS: dict[Bucket, str] = {"easy": "curriculum: too easy", "hard": "curriculum: too hard"}
"""Why a draw was left out, as the journal has it."""

METRICS: dict[str, str] = {
    "curriculum/skipped_easy": "draws so far that were left out because their prompt or source is nearly always solved",
    "curriculum/skipped_hard": "draws so far that were left out because it is nearly never solved",
    "curriculum/easy": "share of the prompts or sources met so far whose last visits were nearly always solved",
    "curriculum/hard": "share of them nearly never solved",
    "curriculum/between": "share of them solved now and then: what there is to learn from",
    "curriculum/new": "share of them with too few visits to say",
}
"""Metrics of runs with a curriculum."""


@dataclass(frozen=True, slots=True, order=True)
class _Visit:
    """A finished group: its prompt's number, its newest version, and the share of attempts that passed."""

    id: int
    newest: Version
    passed: float


class Curriculum:
    """What is known of each prompt (or source), and whether its next draw is left out."""

    def __init__(self, settings: CurriculumConfig, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self.version: Version = 0
        """The newest version that a decision made now may depend on."""
        self._keys: dict[int, int | str] = {}
        """Of draws that are not finished: what their result will be booked under."""
        self._replaying = True
        self._visits: dict[int | str, list[_Visit]] = {}
        self._buckets: Counter[Bucket] = Counter()
        """How many of `_visits` are in each: they are too many to be counted at every step."""
        self._unsettled: set[int | str] = set()
        """Keys with visits of versions that the last save did not settle: all that the next one has to look at."""
        self._decided: dict[int, Version] = {}
        """Draws, and the version under which it was decided to play them or to leave them out."""
        self._void: set[int] = set()
        """Draws whose decision was made by a life of the run that is lost."""

    def meet(self, prompt: Prompt) -> Prompt:
        """The prompt, whose records may follow. Raises `ValueError` for one without a source where sources count."""
        if self._settings.by == "source" and not prompt.source:
            raise ValueError(
                "curriculum.by is 'source', and the prompts of this environment have none: set it to 'prompt', or draw "
                "from a mixture, or name the column env.args.source_column of a data set"
            )
        self._keys[prompt.id] = prompt.source if self._settings.by == "source" else checksum_of(prompt)
        return prompt

    def replay(self, records: Iterable[Record]) -> None:
        """Takes up what a journal says of prompts that were all met. Call it once, before the first draw."""
        for record in records:
            self.apply(record)
        self._keys.clear()
        self._replaying = False

    def apply(self, record: Record) -> None:
        """The state after one more record."""
        match record:
            case Admitted(id=number):
                if (visits := self._visits_of(number)) is not None:  # it is played again, whatever came of it before
                    with self._counted_anew(visits):
                        visits[:] = [visit for visit in visits if visit.id != number]
                self._decided[number] = self.version
                self._void.discard(number)
            case Generated(id=number, newest=newest, passed=passed):
                visits = self._visits_of(number)
                if visits is not None and passed is not None:
                    with self._counted_anew(visits):
                        insort(visits, _Visit(number, newest, passed))
                    self._unsettled.add(self._keys[number])
                    self.version = max(self.version, newest)  # an engine may have it before all of them do
                self._close([number])
            case Dropped(ids=ids):
                self._close(ids)
            case Synced(version=version):
                self.version = max(self.version, version)
            case Saved(kept=kept):
                self._forget(min(kept))
            case Resumed(version=version):
                self.version = version
                self._void |= {number for number, at in self._decided.items() if at > version}
                self._decided = {number: at for number, at in self._decided.items() if at <= version}
                for visits in self._visits.values():
                    visits[:] = [visit for visit in visits if visit.newest <= version]
                self._buckets = Counter(map(self._bucket, self._visits.values()))

    def reason(self, prompt: Prompt, *, again: bool) -> str:
        """Why this draw is left out, "" if it is played. `again`: it was drawn before the run was resumed."""
        if again and prompt.id not in self._void:
            return ""
        reason = REASONS.get(self._bucket(self._visits.get(self._keys[prompt.id], [])), "")
        chance = random.Random(f"curriculum {self._seed} {prompt.id}").random()
        return reason if chance < self._settings.skip else ""

    def metrics(self, totals: Counter[str]) -> dict[str, float]:
        """`totals`: prompts by what became of them (`Accounts.totals`)."""
        names: tuple[Bucket, ...] = ("easy", "hard", "between", "new")
        share = {f"curriculum/{name}": self._buckets[name] / max(1, len(self._visits)) for name in names}
        return share | {f"curriculum/skipped_{name}": float(totals[reason]) for name, reason in REASONS.items()}

    def _bucket(self, visits: list[_Visit]) -> Bucket:
        known = visits[-self._settings.visits :]
        if len(known) < self._settings.visits:
            return "new"
        rate = sum(visit.passed for visit in known) / len(known)
        hard, easy = self._settings.bounds
        return "easy" if rate >= easy else "hard" if rate <= hard else "between"

    def _visits_of(self, number: int) -> list[_Visit] | None:
        key = self._keys.get(number)
        if key is None:
            return None
        if key not in self._visits:
            self._visits[key] = []
            self._buckets["new"] += 1
        return self._visits[key]

    @contextmanager
    def _counted_anew(self, visits: list[_Visit]) -> Iterator[None]:
        """Around a change of these visits: they may come to be in another bucket."""
        self._buckets[self._bucket(visits)] -= 1
        yield
        self._buckets[self._bucket(visits)] += 1

    def _close(self, numbers: Iterable[int]) -> None:
        """No result of these draws is to come; in a journal that is read again one may, of a later life."""
        for number in () if self._replaying else numbers:
            self._keys.pop(number, None)

    def _forget(self, oldest: Version) -> None:
        """Leaves out what no resume at a kept version can bring to matter again."""
        self._decided = {number: at for number, at in self._decided.items() if at > oldest}
        for key in list(self._unsettled):
            visits = self._visits[key]
            settled = [visit for visit in visits if visit.newest <= oldest]
            if len(settled) == len(visits):
                self._unsettled.remove(key)
            gone = set(settled[: -self._settings.visits])
            visits[:] = [visit for visit in visits if visit not in gone]
