"""Reads metrics.jsonl line by line, so that what is held does not grow with the run.

A line that cannot be read (a hole that a power cut left, a half line in the middle) is left out and counted; it refuses
nothing. The last line is left alone until it has its end: the run may be writing it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import msgspec

from asyncrl.utils import durable

Row = dict[str, Any]

_CHUNK = 2**20
_KINDS = (int, float, str, NoneType)


class Head(msgspec.Struct, frozen=True):
    """What a row begins with; the rest is skipped."""

    version: int
    time: float = 0.0


_row = msgspec.json.Decoder(Row).decode
_head = msgspec.json.Decoder(Head).decode


@dataclass(slots=True)
class Damage:
    """The lines of a file that were left out."""

    path: Path
    count: int = 0
    first: int = 0

    def add(self, line: int) -> None:
        self.count += 1
        self.first = self.first or line

    def __str__(self) -> str:
        """Empty if nothing was left out."""
        lines = "1 line cannot be read and is" if self.count == 1 else f"{self.count} lines cannot be read and are"
        return f"{self.path}: {lines} left out, the first is line {self.first}" if self.count else ""


def parse(line: bytes) -> Row | None:
    """The row of a line; None unless it is one: a version, and numbers under the names of metrics."""
    try:
        row: Row = json.loads(line) if b"Infinity" in line else _row(line)
    except (ValueError, RecursionError):  # of either library, and of bytes that are no text
        return None
    if not isinstance(row, dict) or not all(isinstance(value, _KINDS) for value in row.values()):
        return None
    if type(row.get("version")) is not int or any(type(value) is str and "/" in name for name, value in row.items()):
        return None
    return row


def read(path: Path, damage: Damage | None = None) -> Iterator[Row]:
    """The rows in the order written. Raises `ValueError` if the file itself cannot be read."""
    for number, line in _lines(path):
        row = parse(line)
        if row is not None:
            yield row
        elif damage is not None:
            damage.add(number)


def cut(path: Path, version: int) -> tuple[float, Damage]:
    """Takes out the rows of steps after `version`, which a resumed run makes again, and a last line without its end.

    Returns the latest `time` of the rows that stay, and the lines that cannot be read. Those before the first row that
    goes stay in the file. Raises `ValueError` if the file cannot be read.
    """
    damage, last_s, end, size = Damage(path), 0.0, 0, 0
    keep_from: int | None = None
    kept: list[bytes] = []
    for number, line in _lines(path):
        size += len(line)
        if (head := _head_of(line)) is None:
            damage.add(number)
            continue
        if head.version > version:
            keep_from = end if keep_from is None else keep_from
            continue
        last_s = max(last_s, head.time)
        if keep_from is None:
            end = size
        else:
            kept.append(line)
    if keep_from is not None:
        _rewrite(path, keep_from, kept)
    elif path.exists() and path.stat().st_size > size:
        os.truncate(path, size)
    return last_s, damage


def _head_of(line: bytes) -> Head | None:
    try:
        return _head(line)
    except (ValueError, RecursionError):
        row = parse(line)
        return None if row is None else Head(row["version"], row.get("time") or 0.0)


def _rewrite(path: Path, num_bytes: int, lines: Iterable[bytes]) -> None:
    """Replaces the file by its beginning and these lines, in one piece."""
    partial = path.with_name(f".{path.name}.partial")
    with path.open("rb") as source, partial.open("wb") as target:
        while num_bytes and (chunk := source.read(min(_CHUNK, num_bytes))):
            target.write(chunk)
            num_bytes -= len(chunk)
        target.writelines(lines)
        target.flush()
        os.fsync(target.fileno())
    durable.rename(partial, path)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines with their numbers, from 1; none where there is no file."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise ValueError(f"{path} is no file (a folder, or a link to nothing): remove it, the run makes a new one")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield number, line
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
