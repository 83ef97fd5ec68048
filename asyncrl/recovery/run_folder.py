"""The folder that a run leaves behind.

runs/20261122-193000-largest-digit/
    config.json  run.json        resolved configuration; git commit, command, no-skill scores
    config.step-000120.json      what it was up to that step, if a resume changed it
    metrics.jsonl  tensorboard/  every metric of every step
    events.jsonl                 what happened, as it happened: deaths, outages, alarms, decisions, saves
    checkpoints/step-000160/     loads with transformers as it is
    journal.bin  groups/         what happened to every prompt; the finished groups that a resume may need
    timeline.jsonl               what every part of the run did, and when
    trajectories/                a few trajectories of each step, parquet
    output.log                   with --watch: what was printed besides the lines of the run
    error.txt                    what ended the run, and where it came from, if it was an error
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from asyncrl.algo import presets
from asyncrl.config import origin
from asyncrl.config.loading import completed, stored, to_store
from asyncrl.config.schema import BUILT_IN, Config
from asyncrl.utils import durable
from asyncrl.utils.importing import interpreter

_CONFIG = "config.json"
_ORIGIN = "run.json"
_KEPT = re.compile(r"config\.step-([0-9]+)(?:\.([0-9]+))?\.json")
_MAY_CHANGE = ("model.path ", 'model.date "" ', "lora.sync ")
"""How lines begin that tell of what a resume may have otherwise, though it is part of model or adapters."""


def create(config: Config, baselines: dict[str, float]) -> Path:
    """A new run folder with its configuration and origin written down. Raises `ValueError` if it cannot be."""
    task = config.env.path.rpartition(":")[2].lower()
    try:
        folder = _new(Path(config.run_dir), time.strftime(f"%Y%m%d-%H%M%S-{task}"))
    except OSError as error:
        raise ValueError(f"run_dir {config.run_dir!r} cannot be written to: {error}") from error
    config = origin.fixed(config)
    _write(folder / _CONFIG, to_store(config))
    begun = {"commit": _commit(), "command": sys.argv, "no_skill": baselines, "python": sys.version.split()[0]}
    _write(folder / _ORIGIN, begun | {"base": origin.base_of(config)})
    return folder


def _new(parent: Path, stem: str) -> Path:
    for number in itertools.count(1):
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        with suppress(FileExistsError):
            durable.make_folder(folder, 0o700)  # prompts and completions are nobody else's business
            break
    return folder


def differences(folder: Path, config: Config) -> list[str]:
    """A line for each value that is another one than the folder's configuration has.

    Raises `ValueError` for what a run cannot change on its way: its checkpoints are of that shape, or it goes on using
    the weights that it started from.
    """
    config = origin.fixed(config, folder)
    before, now = origin.located(completed(stored(folder / _CONFIG))), completed(to_store(config))
    lines = _differences(before, now)
    remedy = "go on without this change, or start a new run"
    for line in lines:
        if line.startswith(("model.", "lora.")) and not line.startswith(_MAY_CHANGE):
            raise ValueError(f"{line}: the checkpoints of {folder} are of the old value; {remedy}")
        if line.startswith(_makes_base(config)):
            made = "weights beneath the adapters" if config.lora.rank else "reference weights"
            raise ValueError(f"{line}: the old value made the {made} of {folder}; {remedy}")
        if line.startswith("critic.backbone ") and config.loss.needs_critic:
            raise ValueError(f"{line}: the checkpoints of {folder} hold the critic of the old value; {remedy}")
    if config.loss.needs_critic and not _had_critic(before):
        raise ValueError(
            f"algorithm.preset {config.algorithm.preset!r} needs a critic and the checkpoints of {folder} have none: "
            "keep a preset without one, or start a new run"
        )
    if config.lora.rank or config.loss.needs_reference:
        origin.check_base(read_json(folder / _ORIGIN).get("base", {}), config, folder)
    return lines


def _had_critic(tree: dict[str, Any]) -> bool:
    algorithm = tree["algorithm"]
    return presets.resolve(algorithm["preset"], algorithm["loss"]).needs_critic


def stretches(folder: Path) -> list[tuple[int, Path]]:
    """The configurations that the run had one after the other, each with the step that it began at."""
    found = {}
    for path in folder.glob("config.step-*.json"):
        if name := _KEPT.fullmatch(path.name):  # a person may have put others beside them
            found[int(name[1]), int(name[2] or 1)] = path
    ends = sorted(found)
    return list(zip([0, *(step for step, _ in ends)], [*(found[end] for end in ends), folder / _CONFIG], strict=True))


def changes(before: Path, now: Path) -> list[str]:
    """A line for each value of one configuration that is another one in the next."""
    return _differences(stored(before), stored(now))


def _makes_base(config: Config) -> tuple[str, ...]:
    """How lines begin that tell of another making of the first weights (`training/warmup.py`), where a resumed run goes
    on using them: beneath adapters, or as the reference of a KL. Not `model.path`, as a model may be moved: its
    contents are compared."""
    if not (config.lora.rank or config.loss.needs_reference):
        return ()
    names = ["warmup.num_steps "]
    if config.warmup.num_steps:
        names += ["warmup.", "env.path ", "env.args", "seed "]
    elif config.model.path in BUILT_IN:
        names += ["seed "]
    return tuple(names)


def keep(folder: Path, config: Config, step: int) -> None:
    """Makes this the configuration of a run that goes on from `step`; the one before stays beside it."""
    path = folder / _CONFIG
    for suffix in ("", *(f".{number}" for number in range(2, 1000))):
        old = folder / f"config.step-{step:06d}{suffix}.json"
        if not old.exists():
            durable.write(old, path.read_bytes())
            break
    _write(path, to_store(config))


def known_baselines(folder: Path, changes: Sequence[str]) -> dict[str, float]:
    """What policies without skill scored when the run began; nothing if that is not known, or if the `changes` of the
    configuration make it another task."""
    if any(line.startswith(("env.", "eval.num_prompts ")) for line in changes):
        return {}
    known: dict[str, float] = read_json(folder / _ORIGIN).get("no_skill") or {}
    return known


def keep_baselines(folder: Path, baselines: dict[str, float]) -> None:
    """Writes down what policies without skill score from here on."""
    path = folder / _ORIGIN
    _write(path, read_json(path) | {"no_skill": baselines})


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a run folder holds, nothing if there is none. Raises `ValueError` if it cannot be read."""
    if not os.path.lexists(path):
        return {}
    remedy = f"restore it from a copy{', or remove it' if path.name == _ORIGIN else ''}"
    try:
        found: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no object): {remedy}")
    return found


@contextmanager
def error_kept(folder: Path) -> Iterator[None]:
    """What ends a run is told in a line or two; where an error came from is kept in the folder."""
    path = folder / "error.txt"
    path.unlink(missing_ok=True)  # of an earlier life
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # the disk may be what is full
            path.write_text("".join(traceback.format_exception(error)), "utf-8", "backslashreplace")
            print(f"the run ended with an error, and where it came from is in {path}", file=sys.stderr)
        raise
    except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
        told = (
            "what was done since the last checkpoint is in the journal alone; go on with: "
            f"{interpreter()} launch/run.py --resume {folder}"
        )
        with suppress(OSError):  # the console may be gone
            print(told, file=sys.stderr, flush=True)
        raise


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if before == now:
        return []
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [f"{name} {json.dumps(before)} -> {json.dumps(now)}"]
    lines = []
    for key in dict.fromkeys([*before, *now]):
        lines += _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    return lines


def _write(path: Path, tree: dict[str, Any]) -> None:
    durable.write(path, json.dumps(tree, indent=2) + "\n")


def _commit() -> str | None:
    """The commit of the working directory, marked where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
