"""Finished groups on disk: one file a group, written by the rollout actor that made it, beside the journal.

The journal holds each file's digest, so a file that is missing, torn or of an earlier try counts as not there, and its
prompt is played again. That is why these files need no fsync. msgpack; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from asyncrl.types import Finish, Group, Prompt, Trajectory, Version

_COLUMNS: dict[str, Any] = {"token_ids": np.int32, "mask": np.bool_, "logprobs": np.float32, "versions": np.int32}


class _Trajectory(msgspec.Struct, frozen=True):
    columns: dict[str, bytes]
    reward: float
    finish: Finish
    digests: dict[Version, str]
    metrics: dict[str, float]


class _Group(msgspec.Struct, frozen=True):
    id: int
    token_ids: tuple[int, ...]
    target: str
    source: str
    rewards: tuple[float, ...]
    lengths: tuple[int, ...]
    oldest: Version
    newest: Version
    digests: dict[Version, str]
    metrics: dict[str, float]
    trajectories: list[_Trajectory]


def path_of(folder: Path, prompt_id: int) -> Path:
    return folder / f"{prompt_id:09d}.msgpack"


def write(folder: Path, group: Group) -> Group:
    """Stores a group whose trajectories are at hand; returns it with the digest of its file in `stored`."""
    payload = msgspec.msgpack.encode(_pack(group))
    path_of(folder, group.prompt.id).write_bytes(payload)
    return replace(group, stored=_digest(payload))


def read(folder: Path, prompt_id: int, stored: str) -> Group | None:
    """The group whose file has the digest `stored`; None if there is none, or the disk does not give it back."""
    try:
        payload = path_of(folder, prompt_id).read_bytes()
    except OSError:
        return None
    if _digest(payload) != stored:
        return None
    return replace(_unpack(msgspec.msgpack.decode(payload, type=_Group)), stored=stored)


def read_any(folder: Path, prompt_id: int) -> Group:
    """The group in a file, whatever its digest. Raises `ValueError` if it is no group."""
    path = path_of(folder, prompt_id)
    try:
        return _unpack(msgspec.msgpack.decode(path.read_bytes(), type=_Group))
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def delete(folder: Path, prompt_id: int) -> None:
    """Deletes a group's file. Warns if that cannot be done: no run ends for it."""
    _unlink(path_of(folder, prompt_id))


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} cannot be deleted ({error.strerror}) and is left alone: remove it", stacklevel=3)


def delete_others(folder: Path, keep: set[int]) -> None:
    """Deletes the files of all groups but these."""
    kept = {path_of(folder, number) for number in keep}
    for path in folder.glob("*.msgpack"):
        if path.stem.isdecimal() and path not in kept:
            _unlink(path)


def _digest(payload: bytes) -> str:
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def _pack(group: Group) -> _Group:
    trajectories = [
        _Trajectory(
            {name: np.ascontiguousarray(getattr(t, name), kind).tobytes() for name, kind in _COLUMNS.items()},
            float(t.reward),
            t.finish,
            t.digests,
            {name: float(value) for name, value in t.metrics.items()},
        )
        for t in group.trajectories
    ]
    prompt = group.prompt
    return _Group(
        prompt.id,
        prompt.token_ids,
        prompt.target,
        prompt.source,
        tuple(float(reward) for reward in group.rewards),
        group.lengths,
        group.oldest,
        group.newest,
        group.digests,
        {name: float(value) for name, value in group.metrics.items()},
        trajectories,
    )


def _unpack(stored: _Group) -> Group:
    trajectories = [
        Trajectory(
            **{name: np.frombuffer(t.columns[name], kind) for name, kind in _COLUMNS.items()},
            reward=t.reward,
            finish=t.finish,
            digests=t.digests,
            metrics=t.metrics,
        )
        for t in stored.trajectories
    ]
    return Group(
        prompt=Prompt(stored.id, stored.token_ids, stored.target, stored.source),
        rewards=stored.rewards,
        lengths=stored.lengths,
        oldest=stored.oldest,
        newest=stored.newest,
        digests=stored.digests,
        metrics=stored.metrics,
        trajectories=trajectories,
    )
