"""Checkpoints: a folder that `transformers` loads as it is, with the optimizer and the place in the run inside it.

    checkpoints/step-000120/   model.safetensors, config.json, tokenizer files
                               learner/: optimizer.safetensors, random.safetensors, cursor.json
                               adapter/: adapter_model.safetensors, adapter_config.json (runs with LoRA)
                               manifest.json: the BLAKE2 checksum of each of these files
The learner's part has a folder of its own because engines take every *.safetensors beside the model's for weights.
Written under a hidden name, synced to disk file by file and renamed when complete, so a folder of this name was whole
once; to be deleted it is hidden again. What happened to it since is checked when a run is resumed: a damaged checkpoint
is set aside with a warning and the one before it is used. Safetensors and JSON: nothing is unpickled. The learning rate
is a function of the version, so no scheduler has a state of its own.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from asyncrl.types import Version
from asyncrl.utils import durable

_LEARNER = "learner"
_Content = TypeVar("_Content")
_LEFT_OVER = re.compile(r"\.step-[0-9]+\.(partial|old)")
"""Names of saves and deletions that were cut short."""


class Cursor(msgspec.Struct, frozen=True):
    """Where a run goes on: the learner's version, the next prompt to draw, and the drawn ones not yet trained."""

    version: int
    next_prompt: int
    open_prompts: list[int]
    journal_bytes: int = 0
    """Length of the journal at that time: a shorter one has lost records."""


def save(
    root: Path,
    cursor: Cursor,
    model: Any,
    tokenizer: Any,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    keep: int,
    more: Callable[[Path], None] | None = None,
) -> Path:
    """Writes one checkpoint atomically and deletes all but the newest `keep`. Returns its folder.

    `weights` are those of `model`, whole: its own may be split between ranks. `more` adds files of its own.
    """

    def fill(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in optimizer.items()}
        save_file(state, folder / _LEARNER / "optimizer.safetensors")
        if more is not None:
            more(folder)

    return write(root, cursor, fill, keep=keep)


def write(root: Path, cursor: Cursor, fill: Callable[[Path], None], *, keep: int) -> Path:
    """The checkpoint whose files `fill` puts into the folder it is given. Nothing is left behind if that fails.

    Raises `OSError` if the disk does not take it.
    """
    folder = folder_of(root, cursor.version)
    partial = root / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if not root.exists():
        durable.make_folder(root, 0o700)
    partial.mkdir(mode=0o700)
    (partial / _LEARNER).mkdir()
    try:
        fill(partial)
        save_file(_random_state(), partial / _LEARNER / "random.safetensors")
        (partial / _LEARNER / "cursor.json").write_bytes(msgspec.json.encode(cursor))
        durable.seal(partial)
        if folder.exists():
            _hide(folder)
        durable.rename(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _of_disk(error):
            raise OSError(f"{partial} could not be written: {error}") from error
        raise
    _rotate(root, keep)
    return folder


def _of_disk(error: BaseException) -> bool:
    """Whether it is what a library in Rust makes of an error of the system: safetensors has a class for it, tokenizers
    raises an `Exception` that ends in "(os error 28)"."""
    return isinstance(error, SafetensorError) or (type(error) is Exception and "(os error " in str(error))


def _rotate(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep`. What fails is tried again after the next save: this one is complete."""
    try:
        for old in folders(root)[:-keep]:
            _hide(old)
    except OSError as error:
        warnings.warn(f"an old checkpoint stays for now: {error}", stacklevel=2)
    clear(root)


def _hide(folder: Path) -> None:
    """Renames a checkpoint that is to be deleted: half of one must never be taken for a whole one."""
    folder.rename(folder.with_name(f".{folder.name}.old"))


def clear(root: Path) -> tuple[int, int]:
    """Deletes what is left of saves and deletions that were cut short. Returns how many folders went, and their bytes.

    One that cannot be deleted is warned of: NFS keeps the files that another process still reads.
    """
    count = num_bytes = 0
    for folder in (path for path in root.glob(".step-*") if _LEFT_OVER.fullmatch(path.name)):
        try:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
        except OSError as error:
            warnings.warn(f"{folder} stays for now and goes with the next save: {error}", stacklevel=2)
        else:
            count, num_bytes = count + 1, num_bytes + size
    return count, num_bytes


def folder_of(root: Path, version: Version) -> Path:
    """Where the checkpoint of a version is."""
    return root / f"step-{version:06d}"


def folders(root: Path) -> list[Path]:
    """The checkpoints in `root`, oldest first, whole or not. Warns of other things with a name like theirs, which
    nobody touches."""
    found = list(root.glob("step-*"))
    own = [path for path in found if re.fullmatch("step-[0-9]{6,}", path.name) and path.is_dir()]
    if others := sorted({path.name for path in found if path.exists()} - {path.name for path in own}):
        warnings.warn(
            f"{root}: {', '.join(others)} is no checkpoint and is left alone (checkpoints are folders named "
            "step-NUMBER); move it elsewhere",
            stacklevel=2,
        )
    return sorted(own, key=version_of)


def version_of(folder: Path) -> Version:
    return int(folder.name.removeprefix("step-"))


def newest(root: Path, *, set_aside: bool = True) -> Path | None:
    """The newest checkpoint that is whole; None if there is none at all.

    Damaged ones are passed over with a warning and, with `set_aside`, renamed to `damaged-...`: that is for the run
    itself. Raises `ValueError` if every one is damaged, as long as any of them is there: without it a run would begin
    anew in the folder of its history.
    """
    for folder in reversed(folders(root)):
        problem = durable.damage(folder)
        if problem is None:
            return folder
        if not folder.exists():  # a run in progress has made newer ones meanwhile
            return newest(root, set_aside=set_aside)
        left = _set_aside(folder) if set_aside else folder
        warnings.warn(
            f"checkpoint {folder} is damaged ({problem}): it is left as {left.name}, and the one before it is tried",
            stacklevel=2,
        )
    if damaged := sorted(path.name for path in (*root.glob("damaged-step-*"), *folders(root))):
        raise ValueError(
            f"every checkpoint in {root} is damaged: {', '.join(damaged)}; restore one of them from a copy, under its "
            "name step-..., or start a new run"
        )
    return None


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def latest(root: Path) -> Path:
    """The newest whole checkpoint, for whoever only reads: nothing is renamed, as the run may be going on.

    Raises `ValueError` if there is none.
    """
    folder = newest(root, set_aside=False)
    if folder is None:
        raise ValueError(
            f"no checkpoint in {root}: the run has not come to its first one; wait for it, or if the run has ended, go "
            f"on with launch/run.py --resume {root.parent}"
        )
    return folder


def load_cursor(folder: Path) -> Cursor:
    return _whole(folder / _LEARNER / "cursor.json", lambda path: msgspec.json.decode(path.read_bytes(), type=Cursor))


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    return _whole(folder / _LEARNER / "optimizer.safetensors", load_file)


def load_random_state(folder: Path) -> None:
    """Puts torch's random generators, as far as this process has them, where they were when the checkpoint was made."""
    for name, state in _whole(folder / _LEARNER / "random.safetensors", load_file).items():
        device, _, index = name.partition(":")
        if device == "cpu":
            torch.set_rng_state(state)
        elif int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(index))


def _whole(path: Path, read: Callable[[Path], _Content]) -> _Content:
    """What a file of a checkpoint holds. Raises `ValueError` if it cannot be read."""
    try:
        return read(path)
    except (OSError, msgspec.MsgspecError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): restore it from a copy, or move {path.parent.parent.name} out of "
            "checkpoints/ to go on from the one before"
        ) from error


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states
