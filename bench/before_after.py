"""What reinforcement learning adds on a task: one model evaluated before and after a run, on the same held-out prompts.

    python bench/before_after.py CONFIG.toml --folder runs/NAME [--minutes 8] [--eval KEY=VALUE]... [KEY=VALUE ...]

    warm-up --> before: greedy, sampled --> launch/run.py, ended after so many minutes --> after: the same --> table
    (cached)

Each stage is a process of its own and leaves something in the folder. Called again, it goes on after the last stage
that is complete, and a run that was killed goes on from its checkpoint. `--eval` words are for the evaluations alone,
such as `--eval env.args.heldout=test --eval eval.num_prompts=1319`. The difference is a mean over the prompts, with its
95 % interval.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from asyncrl.config import loading as configuration
from asyncrl.monitor.scores import interval

LAUNCH = Path(__file__).parent.parent / "launch"
KINDS = {"greedy": 1, "sampled": 4}
"""Attempts at each prompt, by name."""
STOPPED = os.EX_TEMPFAIL
"""Exit status of a run that ended well before its last step."""
GRACE_S = 300.0
"""For a run that was told to end: its step, its checkpoint and its shutdown."""
INTERRUPTED = (130, -signal.SIGINT)
"""Exit statuses of a run that was told to end before it could end well: its own, and Python's during imports."""


def main(arguments: list[str] | None = None) -> int:
    try:
        return measure(parse(arguments))
    except (ValueError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(options: argparse.Namespace) -> int:
    """Every stage that is not complete, then the table."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"run_dir={folder}", *options.words]
    start = warmed_up(options.config, words)
    print(f"before: {start}", flush=True)
    same = [word for word in words if not word.startswith("eval.num_samples=")]  # of the run; here --n says it
    evaluate(folder / "before.json", [start, options.config, *same, *options.eval])
    trained = train(folder, options.config, words, options.minutes)
    print(f"after: {trained}", flush=True)
    evaluate(folder / "after.json", [str(trained), *options.eval])
    print(table(folder))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.toml")
    parser.add_argument("words", nargs="*", metavar="section.key=value")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="end the run after so long, with a checkpoint")
    parser.add_argument("--eval", action="append", default=[], metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def warmed_up(config: str, words: list[str]) -> str:
    """The model that the run starts from. Made in another process, which takes its GPU memory along when it ends."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_prepare, (config, words))


def _prepare(config: str, words: list[str]) -> str:
    from asyncrl.training.warmup import prepare

    return str(prepare(configuration.load(config, words)))


def evaluate(path: Path, words: list[str]) -> None:
    if not path.exists():
        call("evaluate.py", [*words, "--n", ",".join(map(str, KINDS.values())), "--output", str(path)])


def train(folder: Path, config: str, words: list[str], minutes: float | None) -> Path:
    """The folder of the run, which was run to its end, or for so many minutes more."""
    done = folder / "trained.txt"
    if done.exists():
        return Path(done.read_text())
    unfinished = sorted(path.parent for path in folder.glob("*/run.json"))
    call("run.py", ["--resume", str(unfinished[-1])] if unfinished else [config, *words], minutes)
    trained = sorted(path.parent for path in folder.glob("*/run.json"))[-1]
    done.write_text(str(trained))
    return trained


def call(script: str, words: list[str], minutes: float | None = None) -> None:
    """Runs a script of `launch/`, told to end after `minutes`.

    Raises `CalledProcessError` if it fails, `ValueError` if it was still starting when it was told to end.
    """
    command = [sys.executable, str(LAUNCH / script), *words]
    print("$", " ".join(command[1:]), flush=True)
    with subprocess.Popen(command) as process:
        try:
            process.wait(None if minutes is None else 60 * minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE_S)
            finally:
                process.kill()
    if minutes is not None and process.returncode in INTERRUPTED:
        raise ValueError(f"after --minutes {minutes:g} launch/{script} was not training yet: raise --minutes")
    if process.returncode and (minutes is None or process.returncode != STOPPED):
        raise subprocess.CalledProcessError(process.returncode, command)


def table(folder: Path) -> str:
    """Markdown: each kind of attempt before and after, and the difference on the same prompts."""
    lines = ["| | before | after | difference | no skill |", "|---|---|---|---|---|"]
    results = [json.loads((folder / f"{when}.json").read_text()) for when in ("before", "after")]
    for kind, before, after in zip(KINDS, *results, strict=True):
        no_skill = ", ".join(f"{score:.3f} ({name})" for name, score in before["no_skill"].items())
        name = f"{kind}, {before['num_prompts']} x {before['num_samples']}"
        cells = [f"{name}: mean reward", _mean(before), _mean(after), _difference(before, after), no_skill]
        lines.append(f"| {' | '.join(cells)} |")
        for metric in [one for one in before["metrics"] if one.startswith("eval/pass@") and before["num_samples"] > 1]:
            values = " | ".join(f"{result['metrics'][metric]:.3f}" for result in (before, after))
            lines.append(f"| {name}: {metric.removeprefix('eval/')} | {values} | | |")
    return "\n".join(lines)


def _mean(result: dict[str, Any]) -> str:
    row = result["metrics"]
    return f"{row['eval/accuracy']:.3f} ({row['eval/low']:.3f} to {row['eval/high']:.3f})"


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Raises `ValueError` unless both were evaluated on the same prompts."""
    if (before["env_args"], before["num_prompts"]) != (after["env_args"], after["num_prompts"]):
        raise ValueError("before and after were evaluated on other prompts: remove the files of one of them")
    first, last = (
        {one["id"]: sum(one["rewards"]) / len(one["rewards"]) for one in each["prompts"]} for each in (before, after)
    )
    changes = [last[id_] - first[id_] for id_ in first.keys() & last.keys()]  # the rest could not be scored
    low, high = (2 * end - 1 for end in interval([(1 + change) / 2 for change in changes]))  # as rewards from 0 to 1
    return f"{sum(changes) / len(changes):+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    sys.exit(main())
