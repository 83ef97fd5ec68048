"""What the journal records, and what the records add up to: an account of every prompt."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from asyncrl.types import Prompt, Version


class _Record(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    at_s: float = msgspec.field(default_factory=time.time)
    """Seconds since 1970."""


class Started(_Record, frozen=True, array_like=True, kw_only=True, tag="started"):
    """First record of a journal: what a checkpoint knew, if there was one and the journal before it is lost."""

    version: Version = 0
    next_id: int = 0
    open_ids: tuple[int, ...] = ()


class Admitted(_Record, frozen=True, array_like=True, kw_only=True, tag="admitted"):
    """The prompt is drawn, to be played (a second time after a resume) or to be dropped at once by a curriculum."""

    id: int
    checksum: int
    """Of its tokens and target: a resumed run must draw the same prompt under this id."""


class Generated(_Record, frozen=True, array_like=True, kw_only=True, tag="generated"):
    id: int
    oldest: Version
    newest: Version
    stored: str
    """Digest of the file with the group's tokens; empty if it was not stored."""
    passed: float | None = None
    """Share of the attempts whose reward reached the pass mark; None without a mark, and in journals from before it was
    written."""


class Batch(_Record, frozen=True, array_like=True, kw_only=True, tag="batch"):
    """These groups are about to be trained, in this order, in optimizer step `step`: version `step` - 1 to `step`."""

    step: Version
    ids: tuple[int, ...]


class Dropped(_Record, frozen=True, array_like=True, kw_only=True, tag="dropped"):
    """Given up, by a learner at `version`; takes back a batch of a later step that did not take place."""

    ids: tuple[int, ...]
    reason: str
    version: Version


class Synced(_Record, frozen=True, array_like=True, kw_only=True, tag="synced"):
    """Every engine holds this version, under this digest."""

    version: Version
    digest: str


class Saved(_Record, frozen=True, array_like=True, kw_only=True, tag="saved"):
    """A checkpoint of `version` is complete; the run can now be resumed at any version of `kept`."""

    version: Version
    kept: tuple[Version, ...]


class Resumed(_Record, frozen=True, array_like=True, kw_only=True, tag="resumed"):
    version: Version


Record: TypeAlias = Started | Admitted | Generated | Batch | Dropped | Synced | Saved | Resumed


@dataclass(slots=True)
class Account:
    """What is known of one prompt."""

    id: int
    checksum: int | None = None
    oldest: Version = -1
    newest: Version = -1
    stored: str = ""
    steps: list[Version] = field(default_factory=list)
    """Optimizer steps that it was trained in."""
    dropped: Dropped | None = None

    @property
    def settled(self) -> bool:
        return bool(self.steps) or self.dropped is not None

    @property
    def may_come_again(self) -> bool:
        """Whether a resumed run may issue it again: to play it, or to train the group that is stored."""
        return not self.settled or bool(self.stored)

    @property
    def fate(self) -> str:
        """ "trained", why it was dropped, or "open". A later use that was refused takes nothing back."""
        return "trained" if self.steps else self.dropped.reason if self.dropped is not None else "open"

    def uses_at(self, version: Version) -> int:
        """Times that it was trained on the way to `version`."""
        return sum(step <= version for step in self.steps)

    def resume(self, version: Version) -> None:
        """Voids what weights above `version` had a part in."""
        self.steps = [step for step in self.steps if step <= version]
        if self.dropped is not None and self.dropped.version > version:
            self.dropped = None
        if self.newest > version:
            self.forget_group()

    def forget_group(self) -> None:
        self.oldest, self.newest, self.stored = -1, -1, ""


class Accounts:
    """Every prompt that is not settled for good: always exactly what the records so far add up to."""

    def __init__(self, *, reuse: int = 1, max_lag: int = 0) -> None:
        self.reuse, self.max_lag = reuse, max_lag
        self.version: Version = 0
        self.next_id = 0
        self.kept: tuple[Version, ...] = (0,)
        """Versions that the run can be resumed at; 0 is the initial checkpoint."""
        self.published: dict[Version, str] = {}
        self.closed: Counter[str] = Counter()
        """Prompts settled for good and forgotten here: "trained", or the reason why they were dropped."""
        self._accounts: dict[int, Account] = {}

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def __getitem__(self, prompt_id: int) -> Account:
        return self._accounts[prompt_id]

    @property
    def open_ids(self) -> list[int]:
        """Drawn and neither trained nor dropped, in order."""
        return sorted(account.id for account in self._accounts.values() if not account.settled)

    @property
    def first_needed(self) -> int:
        """The lowest id of a prompt that a resumed run may issue again; that of the next one if there is none."""
        return min((one.id for one in self._accounts.values() if one.may_come_again), default=self.next_id)

    def totals(self) -> Counter[str]:
        """Prompts by what became of them: "trained", "open", or why they were dropped. They add up to all drawn."""
        totals = Counter(self.closed)
        for account in self._accounts.values():
            totals[account.fate] += 1
        return totals

    def apply(self, record: Record, *, replaying: bool = False) -> None:
        """The state after one more record. `replaying`: it is read from the file, and may be of a prompt that
        `forget_before` left out."""
        match record:
            case Started():
                self._start(record)
            case Admitted(id=number, checksum=checksum):
                account = self._accounts.setdefault(number, Account(number))
                account.checksum = checksum
                account.forget_group()
                self.next_id = max(self.next_id, number + 1)
            case Generated(id=number, oldest=oldest, newest=newest, stored=stored):
                for account in self._of((number,), replaying):
                    account.oldest, account.newest, account.stored = oldest, newest, stored
            case Batch(step=step, ids=ids):
                for account in self._of(ids, replaying):
                    account.steps.append(step)
            case Dropped(ids=ids, version=version):
                for account in self._of(ids, replaying):
                    account.steps = [step for step in account.steps if step <= version]
                    account.dropped = record
            case Synced(version=version, digest=digest):
                self.version = version
                self.published[version] = digest
            case Saved(kept=kept):
                self.kept = kept
            case Resumed(version=version):
                self.version = version
                self.kept = tuple(v for v in self.kept if v <= version) or (version,)
                self.published = {v: digest for v, digest in self.published.items() if v <= version}
                for account in self._accounts.values():
                    account.resume(version)

    def _start(self, record: Started) -> None:
        self.version, self.next_id, self.kept = record.version, record.next_id, (record.version,)
        self._accounts = {number: Account(number) for number in record.open_ids}
        if num_settled := record.next_id - len(record.open_ids):
            self.closed["settled before this journal"] = num_settled

    def _of(self, ids: Iterable[int], replaying: bool) -> list[Account]:
        return [self._accounts[number] for number in ids if not replaying or number in self._accounts]

    def usable_at(self, account: Account, version: Version) -> bool:
        """Whether a learner resumed at `version` could train on the stored group."""
        dropped = account.dropped is not None and account.dropped.version <= version
        fresh = account.newest <= version <= account.oldest + self.max_lag
        return bool(account.stored) and fresh and not dropped and account.uses_at(version) < self.reuse

    def needs_group(self, prompt_id: int) -> bool:
        """Whether the group's file can still be of use: in this run now, or after a resume at any kept version."""
        account = self._accounts.get(prompt_id)
        if account is None:
            return False
        return not account.settled or any(self.usable_at(account, version) for version in (*self.kept, self.version))

    def _comes_again(self, account: Account) -> bool:
        """Whether the buffer may still give the group out, on disk or not."""
        left = len(account.steps) < self.reuse and account.dropped is None
        return left and account.oldest + self.max_lag >= self.version

    def forget_settled(self) -> None:
        """Leaves out prompts that are settled for good: no resume at a kept version would open them again."""
        oldest = min(self.kept)
        for account in list(self._accounts.values()):
            dropped = account.dropped is not None and account.dropped.version <= oldest
            ended = not self.needs_group(account.id) and not self._comes_again(account)
            if dropped or (ended and account.uses_at(oldest) > 0):
                del self._accounts[account.id]
                self.closed[account.fate] += 1

    def forget_before(self, floor: Version, resume_at: Version) -> None:
        """Of a file that is read: leaves out prompts that are settled by `floor`, the lowest version that the file goes
        back to from here on, and of no use to a run that is resumed at `resume_at`; and versions too old for both."""
        for account in list(self._accounts.values()):
            dropped = account.dropped is not None and account.dropped.version <= floor
            useful = self.usable_at(account, resume_at) or self._comes_again(account)
            if dropped or (account.uses_at(floor) > 0 and not useful):
                del self._accounts[account.id]
                self.closed[account.fate] += 1
        oldest = min(floor, self.version) - self.max_lag - 1
        self.published = {version: digest for version, digest in self.published.items() if version >= oldest}


def checksum_of(prompt: Prompt) -> int:
    """CRC-32 of what a prompt asks."""
    return zlib.crc32(repr((prompt.token_ids, prompt.target)).encode())
