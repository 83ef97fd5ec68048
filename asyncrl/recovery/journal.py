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
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec

from asyncrl.recovery.prompt_states import Accounts, Record, Resumed, Saved
from asyncrl.types import Version
from asyncrl.utils import durable

_MAGIC = b"\xa5jr\x01"
_HEADER = struct.Struct("<4sII")  # magic, length of the payload, CRC-32 of the payload
_decoder = msgspec.msgpack.Decoder(Record)
_resumed = msgspec.msgpack.Decoder(Resumed)
_MAX_BYTES = 2**28
"""Of a record; a length above it is damage."""
_UNSYNCED = 1000
"""Records after which fsync is not put off any longer."""


class Journal:
    """The file, and the accounts that it adds up to. Belongs to the driver; only `sync` may run in another thread."""

    def __init__(
        self, path: Path | None, *, reuse: int = 1, max_lag: int = 0, resume_at: Version | None = None
    ) -> None:
        """Opens or makes the file at `path` and reads it; with None the accounts live in memory only.

        `resume_at`: the version that the run is about to be resumed at. Prompts that are settled for good by then are
        forgotten as they are read, so that memory does not grow with the history.

        An incomplete last record, which a crash leaves behind, is cut off; `torn_bytes` says how much that was. Raises
        `ValueError` if a record before the last one is damaged, if another process holds the journal, or if it cannot
        be locked.
        """
        self.accounts = Accounts(reuse=reuse, max_lag=max_lag)
        self.torn_bytes = 0
        self.num_bytes = 0
        self._unsynced = 0
        self._file: int | None = None
        self._path = path
        if path is None:
            return
        is_new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        if is_new:
            durable.sync(path.parent)
        try:
            lock(self._file, path)
            self._read(path, resume_at)
        except BlockingIOError as error:
            os.close(self._file)
            raise ValueError(f"{path} is in use: another process runs this run; stop that one first") from error
        except ValueError:
            os.close(self._file)
            raise
        self.torn_bytes = path.stat().st_size - self.num_bytes
        os.ftruncate(self._file, self.num_bytes)

    def _read(self, path: Path, resume_at: Version | None) -> None:
        """Books every record of the file."""
        floors = deque(_floors(path, resume_at)) if resume_at is not None else None
        for record, self.num_bytes in scan(path):
            self.accounts.apply(record, replaying=True)
            if floors is None or resume_at is None:
                continue
            if isinstance(record, Resumed):
                floors.popleft()
            elif isinstance(record, Saved):
                self.accounts.forget_before(floors[0], resume_at)

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

    def records(self) -> Iterator[Record]:
        """All that the file holds, one after the other; nothing where there is none."""
        return (record for record, _ in scan(self._path)) if self._path else iter(())

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
    """The records of a journal, the bytes that they take, and the size of the file. Raises `ValueError` as `scan`."""
    found = list(scan(path))
    return [record for record, _ in found], found[-1][1] if found else 0, path.stat().st_size


def scan(path: Path) -> Iterator[tuple[Record, int]]:
    """The records of a journal one after the other, each with the bytes up to its end.

    What follows the last good record is torn if no good record comes after it. Otherwise the middle of the file is
    damaged, which raises `ValueError`: records are missing, and nobody can say what they were.
    """
    end = 0
    for payload in _payloads(path):
        try:
            record = _decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path}: the record at byte {end} is of another version of asyncrl ({error})") from error
        end += _HEADER.size + len(payload)
        yield record, end
    _check_torn(path, end)


def _payloads(path: Path) -> Iterator[bytes]:
    """The payloads of the good records that the file begins with."""
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            magic, length, checksum = _HEADER.unpack(header)
            if magic != _MAGIC or length > _MAX_BYTES:
                return
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload) != checksum:
                return
            yield payload


def _check_torn(path: Path, end: int) -> None:
    """Raises `ValueError` if a good record follows what cannot be read from byte `end` on."""
    with path.open("rb") as file:
        file.seek(end)
        data = file.read()
    later = data.find(_MAGIC, 1)
    while later >= 0:
        if _payload(data, later) is not None:
            raise ValueError(
                f"{path} is damaged: the record at byte {end} of {end + len(data)} cannot be read and others follow "
                "it. Delete the file to go on from the newest checkpoint's own list of open prompts; groups that were "
                "finished since are then generated again"
            )
        later = data.find(_MAGIC, later + 1)


def _floors(path: Path, resume_at: Version) -> list[Version]:
    """For each stretch of the file between resumes: the lowest version that a later resume goes back to. What is
    settled by then is so for good."""
    found = [_resumed.decode(payload).version for payload in _payloads(path) if payload[2:9] == b"resumed"]
    floors = [resume_at]
    for version in reversed(found):
        floors.append(min(floors[-1], version))
    return floors[::-1]


def lock(file: int, path: Path, kind: int = fcntl.LOCK_EX) -> None:
    """Locks the open file at `path`, without waiting.

    Raises `BlockingIOError` if another process holds a lock on it, `ValueError` if the file system gives none.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        raise ValueError(
            f"{path} cannot be locked ({error}), which is what keeps two processes from running the same run: mount "
            "its file system with locks (Lustre with -o flock, NFS with a lock daemon), or set run_dir to a folder on "
            "another one"
        ) from error


def in_use(path: Path) -> bool:
    """Whether a process holds the journal: the run that it belongs to is in progress. Raises `ValueError` if it cannot
    be locked."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            lock(file.fileno(), path, fcntl.LOCK_SH)
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
