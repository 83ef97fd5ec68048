"""Files that survive a power cut.

    write beside the place --> fsync --> rename --> fsync the folder

A rename alone is not enough: the new name may reach the disk before the content, and the file is then empty. Everything
that a resume or another run reads is written by this module; logs, reports and samples are not, and their readers take
what is left of them. A folder of several files is sealed: its manifest holds the checksum of each.
"""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

MANIFEST = "manifest.json"
_NUM_THREADS = 4
"""For checksums and fsync; both leave the interpreter to others."""


class Manifest(msgspec.Struct, frozen=True):
    files: dict[str, str]
    """Hexadecimal BLAKE2b checksum of each file, by its path within the folder."""


def write(path: Path, content: bytes | str) -> None:
    """Replaces the file in one piece: after a power cut it holds the old content or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    rename(partial, path)


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder that was synced; the new name survives a power cut once this returns."""
    source.rename(target)
    sync(target.parent)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Makes a folder, and those above it. Raises `FileExistsError` if it is there already."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=mode)
    for parent in path.absolute().parents:
        sync(parent)
        if parent == above:
            break


def seal(folder: Path) -> None:
    """Syncs every file in the folder and writes the manifest of their checksums."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        checksums = list(threads.map(lambda name: _sync_and_sum(folder / name), names))
    (folder / MANIFEST).write_bytes(msgspec.json.encode(Manifest(dict(zip(names, checksums, strict=True)))))
    for path in (folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def damage(folder: Path) -> str | None:
    """The first thing that is wrong with a sealed folder; None if every file is the one that was written."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        return f"{MANIFEST}: {error}"
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        problems = threads.map(lambda item: _damage_of(folder, *item), sorted(manifest.files.items()))
        return next(filter(None, problems), None)


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems have no fsync of folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _damage_of(folder: Path, name: str, checksum: str) -> str | None:
    try:
        found = _sum(folder / name)
    except OSError as error:  # gone, or the disk does not give it back
        return f"{name}: {error}"
    return None if found == checksum else f"{name} has another checksum than when it was written"


def _sync_and_sum(path: Path) -> str:
    sync(path)
    return _sum(path)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
