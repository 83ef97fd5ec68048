"""The journal: what happened to every prompt, written ahead, so that a run that is killed loses none of them.

    Admitted --> Generated --> Batch (trained in optimizer step s)      Synced(version)    Saved(version)
        \\------------ \\-------> Dropped(reason)                         Resumed(version)

One file of checksummed records, appended by the driver alone. A record is written before what it tells takes effect,
reaches the kernel at once (a killed process loses nothing) and the disk within `journal.sync_s` (fsync in batches). The
whole file is also the recorded schedule of the run: admissions, completions, batch composition, sync points, in order.
The tokens of finished groups lie beside it (`groups.py`); the file that no resume can need any more is deleted.

What a resume means. A run resumed at version v continues the history of those weights: optimizer steps above v are
lost, and every fact that lost weights had a part in is void:
  - batches of steps above v: their groups are trained again;
  - groups with a token of a version above v, and drops of such groups: their prompts are issued again.
Everything else stands. So along the history that leads to the final weights each admitted prompt is trained at least
once and at most `buffer.reuse` times, or dropped with a reason, or still open; and none is lost. Open prompts are
issued again in order, under the same ids and therefore with the same seeds; a finished group is used as it is when its
lag still allows.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import msgspec

from asyncrl.types import Prompt, Version

_MAGIC = b"\xa5jr\x01"
_HEADER = struct.Struct("<4sII")  # magic, length of the payload, CRC-32 of the payload
_UNSYNCED = 1000
"""Records after which fsync is not put off any longer."""


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
    """Share of the attempts whose reward reached `eval.pass_reward`; None in journals from before it was written."""


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
_decoder = msgspec.msgpack.Decoder(Record)


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

    def totals(self) -> Counter[str]:
        """Prompts by what became of them: "trained", "open", or why they were dropped. They add up to all drawn."""
        totals = Counter(self.closed)
        for account in self._accounts.values():
            totals["trained" if account.steps else account.dropped.reason if account.dropped else "open"] += 1
        return totals

    def apply(self, record: Record) -> None:
        """The state after one more record."""
        match record:
            case Started(version=version, next_id=next_id, open_ids=open_ids):
                self.version, self.next_id, self.kept = version, next_id, (version,)
                self._accounts = {number: Account(number) for number in open_ids}
                if next_id > len(open_ids):
                    self.closed["settled before this journal"] = next_id - len(open_ids)
            case Admitted(id=number, checksum=checksum):
                account = self._accounts.setdefault(number, Account(number))
                account.checksum = checksum
                account.forget_group()
                self.next_id = max(self.next_id, number + 1)
            case Generated(id=number, oldest=oldest, newest=newest, stored=stored):
                account = self._accounts[number]
                account.oldest, account.newest, account.stored = oldest, newest, stored
            case Batch(step=step, ids=ids):
                for number in ids:
                    self._accounts[number].steps.append(step)
            case Dropped(ids=ids, version=version):
                for number in ids:
                    account = self._accounts[number]
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

    def forget_settled(self) -> None:
        """Leaves out prompts that are settled for good: no resume at a kept version would open them again."""
        oldest = min(self.kept)
        for account in list(self._accounts.values()):
            dropped = account.dropped is not None and account.dropped.version <= oldest
            trained = account.uses_at(oldest) > 0 and not self.needs_group(account.id)
            if dropped or trained:
                del self._accounts[account.id]
                self.closed[account.dropped.reason if account.dropped else "trained"] += 1


class Journal:
    """The file, and the accounts that it adds up to. Belongs to the driver; only `sync` may run in another thread."""

    def __init__(self, path: Path | None, *, reuse: int = 1, max_lag: int = 0) -> None:
        """Opens or makes the file at `path` and reads it; with None the accounts live in memory only.

        An incomplete last record, which a crash leaves behind, is cut off; `torn_bytes` says how much that was. Raises
        `ValueError` if a record before the last one is damaged, or if another process holds the journal.
        """
        self.accounts = Accounts(reuse=reuse, max_lag=max_lag)
        self.torn_bytes = 0
        self.num_bytes = 0
        self._unsynced = 0
        self._file: int | None = None
        self._path = path
        if path is None:
            return
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            records, self.num_bytes, size = read(path)
        except BlockingIOError as error:
            os.close(self._file)
            raise ValueError(f"{path} is in use: another process runs this run; stop that one first") from error
        except ValueError:
            os.close(self._file)
            raise
        self.torn_bytes = size - self.num_bytes
        os.ftruncate(self._file, self.num_bytes)
        for record in records:
            self.accounts.apply(record)

    def append(self, *records: Record) -> None:
        """Writes the records at once, then books them. Raises `OSError` if the disk does not take them."""
        if self._file is not None:
            frame = b"".join(_frame(msgspec.msgpack.encode(record)) for record in records)
            written = os.write(self._file, frame)
            if written < len(frame):  # a disk that fills up takes a part
                os.ftruncate(self._file, self.num_bytes)
                raise OSError(f"the journal took {written} of {len(frame)} bytes: the disk is full or failing")
            self.num_bytes += len(frame)
            self._unsynced += len(records)
            if self._unsynced >= _UNSYNCED:
                self.sync()
        for record in records:
            self.accounts.apply(record)

    def records(self) -> list[Record]:
        """All that the file holds; nothing where there is none."""
        return read(self._path)[0] if self._path else []

    def sync(self) -> None:
        """Everything written so far survives a power failure once this returns."""
        if self._file is not None and self._unsynced:
            self._unsynced = 0
            os.fsync(self._file)

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            os.close(self._file)
            self._file = None


def read(path: Path) -> tuple[list[Record], int, int]:
    """The records of a journal, the bytes that they take, and the size of the file.

    What follows the last good record is torn if no good record comes after it. Otherwise the middle of the file is
    damaged, which raises `ValueError`: records are missing, and nobody can say what they were.
    """
    data = path.read_bytes()
    records: list[Record] = []
    end = 0
    while (payload := _payload(data, end)) is not None:
        records.append(_decoder.decode(payload))
        end += _HEADER.size + len(payload)
    later = data.find(_MAGIC, end + 1)
    while later >= 0:
        if _payload(data, later) is not None:
            raise ValueError(
                f"{path} is damaged: the record at byte {end} of {len(data)} cannot be read and others follow it. "
                "Delete the file to go on from the newest checkpoint's own list of open prompts; groups that were "
                "finished since are then generated again"
            )
        later = data.find(_MAGIC, later + 1)
    return records, end, len(data)


def in_use(path: Path) -> bool:
    """Whether a process holds the journal: the run that it belongs to is in progress."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _frame(payload: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload


def _payload(data: bytes, start: int) -> bytes | None:
    """The record's bytes at `start`; None if there is no whole one."""
    if start + _HEADER.size > len(data):
        return None
    magic, length, checksum = _HEADER.unpack_from(data, start)
    payload = data[start + _HEADER.size : start + _HEADER.size + length]
    good = magic == _MAGIC and len(payload) == length and zlib.crc32(payload) == checksum
    return payload if good else None


def checksum_of(prompt: Prompt) -> int:
    """CRC-32 of what a prompt asks."""
    return zlib.crc32(repr((prompt.token_ids, prompt.target)).encode())
