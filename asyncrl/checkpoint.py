"""Checkpoints: a folder that `transformers` loads as it is, with the optimizer and the place in the run beside it.

    checkpoints/step-000120/   model.safetensors, config.json, tokenizer files
                               optimizer.safetensors, cursor.json
Written under a temporary name and renamed when complete, so a folder of this name is always whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file, save_file
from torch import Tensor


class Cursor(msgspec.Struct, frozen=True):
    """Where a run goes on: the learner's version, the next prompt to draw, and the drawn ones not yet trained."""

    version: int
    next_prompt: int
    open_prompts: list[int]


def save(
    root: Path,
    cursor: Cursor,
    model: Any,
    tokenizer: Any,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    keep: int,
) -> Path:
    """Writes one checkpoint atomically and deletes all but the newest `keep`. Returns its folder.

    `weights` are those of `model`, whole: its own may be split between ranks.
    """
    folder = root / f"step-{cursor.version:06d}"
    partial = root / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial, state_dict=weights)
    tokenizer.save_pretrained(partial)
    save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, partial / "optimizer.safetensors")
    (partial / "cursor.json").write_bytes(msgspec.json.encode(cursor))
    for path in partial.iterdir():
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _sync(root)
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return folder


def latest(root: Path) -> Path:
    """The newest checkpoint. Raises `ValueError` if there is none."""
    folders = sorted(root.glob("step-*"))
    if not folders:
        raise ValueError(f"no checkpoint in {root}; the run stopped before its first one, start it anew")
    return folders[-1]


def load_cursor(folder: Path) -> Cursor:
    return msgspec.json.decode((folder / "cursor.json").read_bytes(), type=Cursor)


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "optimizer.safetensors")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
