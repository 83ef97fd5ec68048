"""Trains again on the recorded batches of a run and compares the weights of every version with those of the run.

    python launch/replay.py RUN_DIR [--checkpoints FOLDER] [section.key=value ...]

The run has to have kept its groups (journal.keep_groups=true). Its journal is the schedule: which groups made which
step, in which order, and under which digest each version was sent to the engines. Nothing is generated. On a CPU in
float32 the replay is exact, bit by bit, of asynchronous runs too, and of resumed ones, whose lost steps are left out.
Where a resume trained on with other settings, it ends.
Where it differs it says at which step, and in which tensors by the first checkpoint from there on that is still there.
Words change the configuration, to see from where on they matter. Exits with 1 if anything differed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file

from asyncrl.config import cores
from asyncrl.config import loading as configuration
from asyncrl.config.schema import Config
from asyncrl.monitor.plain import plain
from asyncrl.recovery import checkpoint, journal, run_folder
from asyncrl.recovery import group_files as groups
from asyncrl.recovery.prompt_states import Batch, Generated, Resumed, Started, Synced
from asyncrl.runtime.build import LearnerPart
from asyncrl.runtime.placement import plan
from asyncrl.training.warmup import prepare
from asyncrl.types import Group, Version
from asyncrl.utils import settings_text as tables
from asyncrl.utils.importing import check_run
from asyncrl.weights.buckets import digest_of


@dataclass(slots=True)
class Schedule:
    """What the history of the final weights was made of."""

    batches: dict[Version, list[tuple[int, str]]] = field(default_factory=dict)
    """Prompt ids of each step, in order, each with the digest of its group's file."""
    digests: dict[Version, str] = field(default_factory=dict)
    """Of the weights of each version, as the engines had them."""

    def cut(self, last: Version) -> None:
        """Leaves out what came after a version."""
        self.batches = {step: ids for step, ids in self.batches.items() if step <= last}
        self.digests = {known: digest for known, digest in self.digests.items() if known <= last}


def read_schedule(path: Path, last: Version | None = None) -> Schedule:
    """The schedule in a journal, up to version `last` if given. Raises `ValueError` if its beginning is missing."""
    records, _, _ = journal.read(path)
    schedule, stored = Schedule(), {}
    for record in records:
        match record:
            case Started(version=version) if version > 0:
                raise ValueError(f"{path} begins at version {version}: what was trained before is not recorded")
            case Generated(id=number, stored=digest):
                stored[number] = digest
            case Batch(step=step, ids=ids):  # one that was refused is followed by another of the same step
                schedule.batches[step] = [(number, stored[number]) for number in ids]
            case Synced(version=version, digest=digest):
                schedule.digests[version] = digest
            case Resumed(version=version):
                schedule.cut(version)
    schedule.batches = {step: ids for step, ids in schedule.batches.items() if step in schedule.digests}
    if last is not None:
        schedule.cut(last)
    return schedule


_TRAINS = (
    *("seed ", "model.", "env.", "warmup.", "learner.", "lora.", "algorithm.", "critic.", "weights.bucket_mb "),
    *("rollout.temperature ", "rollout.max_new_tokens ", "rollout.dtype "),
)
"""How the names of settings begin that a replay depends on."""


def find_settings(folder: Path) -> tuple[Path, Version | None, str]:
    """The configuration that the run began to train with, the last step that it held for (None: the very last), and
    what was changed then."""
    for (_, before), (step, now) in pairwise(run_folder.stretches(folder)):
        if lines := [line for line in run_folder.changes(before, now) if line.startswith(_TRAINS)]:
            return before, step, ", ".join(lines)
    return folder / "config.json", None, ""


def replay(folder: Path, checkpoints: Path, words: Sequence[str] = ()) -> Iterator[str]:
    """Trains the recorded steps; yields a line for every difference, the first ones first, and none if it is exact."""
    settings, last, _ = find_settings(folder)
    config = configuration.load(settings, list(words))
    schedule = read_schedule(folder / "journal.bin", last)
    part = make_learner(config)
    saved = {checkpoint.version_of(path): path for path in checkpoint.folders(checkpoints)}
    differs = False
    for version in range(1 + max(schedule.digests, default=0)):
        if version:
            batch = []
            for number, digest in schedule.batches[version]:
                group, told = read_group(folder / "groups", number, digest)
                batch.append(group.trajectories)
                if told:
                    yield f"step {version}: {told}"
            part.learner.step(batch)
        if not differs and digest_of(part.learner.buckets, part.learner.published()) != schedule.digests[version]:
            differs = True
            yield f"step {version}: the weights have another digest than in the run{'' if version else ' at its start'}"
        if version in saved and (told := first_difference(part, saved[version])):
            yield f"step {version}: against {saved[version].name}, {told}"
            return
    if differs:
        yield "which tensors differ cannot be said: no checkpoint of a later step is left (checkpoint.keep)"


def make_learner(config: Config) -> LearnerPart:
    """The learner at version 0. Raises `ValueError` if this run cannot be replayed."""
    if config.learner.num_gpus > 1:
        raise ValueError(
            f"the run had learner.num_gpus={config.learner.num_gpus}: ranks add gradients in another order than one "
            "learner, so only a run of one rank can be replayed"
        )
    torch.set_num_threads(cores.here(config).learner)
    return LearnerPart(config, str(prepare(config, quiet=True)), None, plan(config, num_gpus=0))


def read_group(folder: Path, number: int, digest: str) -> tuple[Group, str]:
    """The group of a prompt, and what is wrong with it, if anything is. Raises `ValueError` if it is not there."""
    path = groups.path_of(folder, number)
    if not path.exists():
        raise ValueError(f"{path} is not there: only a run with journal.keep_groups=true can be replayed")
    if (group := groups.read(folder, number, digest)) is not None:
        return group, ""
    return groups.read_any(folder, number), f"{path.name} is not the file that was written in the run"


def first_difference(part: LearnerPart, saved: Path) -> str:
    """The tensors that differ from those of a checkpoint, bit by bit; empty if none does."""
    expected = load_file(saved / "model.safetensors")
    found = [name for name, tensor in part.learner.weights().items() if not torch.equal(tensor, expected[name])]
    if not found:
        return ""
    most = float((part.learner.weights()[found[0]] - expected[found[0]]).abs().max())
    return f"{len(found)} of {len(expected)} tensors differ, first {found[0]} (by up to {most:.3g})"


def main(arguments: list[str] | None = None) -> int:
    parser = tables.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument("words", nargs="*", metavar="section.key=value")
    parser.add_argument("--checkpoints", type=Path, help="folder of checkpoints to compare with, instead of the run's")
    options = parser.parse_intermixed_args(arguments)
    try:
        told = report(options.folder, options.checkpoints or options.folder / "checkpoints", options.words)
    except ValueError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    return int(told)


def report(folder: Path, checkpoints: Path, words: Sequence[str]) -> bool:
    """Prints what differs, or that nothing does; whether anything did."""
    check_run(folder)
    differs = False
    _, last, changed = find_settings(folder)
    if last is not None:
        print(f"up to step {last}, where the run went on with {changed}")
    for line in replay(folder, checkpoints, words):
        differs = True
        print(plain(line), flush=True)
    if not differs:
        schedule = read_schedule(folder / "journal.bin", last)
        num_groups = sum(map(len, schedule.batches.values()))
        print(f"exact: {len(schedule.batches)} steps on {num_groups} groups gave the weights of every version")
    return differs


if __name__ == "__main__":
    sys.exit(main())
