"""Runs a training job: command line -> configuration -> actors -> the loop -> exit code.

    python launch/run.py [CONFIG.toml] [--num-rollout-actors 4] [section.key=value ...] [--watch]
                         [--dry-run] [--resume RUN_DIR]

Without CONFIG.toml it runs configs/largest_digit.toml.

Exit code: 0 after the last step; 75 when Ctrl-C, SIGTERM or SIGHUP ended the run before it, saved, for --resume to go
on; 130 or 143 when one of them interrupted it at once; 2 for what the last line says, and 1 with a stack for anything
else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import uvloop

from asyncrl.config import loading as configuration
from asyncrl.config import warnings as cautions
from asyncrl.config.schema import Config
from asyncrl.monitor.plain import plain
from asyncrl.recovery import run_folder
from asyncrl.utils import settings_text as tables
from asyncrl.utils.quote import LONGEST, cut
from asyncrl.utils.threads import kept_handlers

DEFAULT = Path(__file__).parents[2] / "configs" / "largest_digit.toml"
STOPPED = os.EX_TEMPFAIL
"""The exit code of a run that was saved before its last step: what starts it again is not to take it for finished."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        config = resolve(options)
        changes = run_folder.differences(options.resume, config) if options.resume else []
    except ValueError as error:
        return fail(error)
    for line in cautions.warnings(config):
        print(f"warning: {line}", file=sys.stderr)
    if options.dry_run:
        for line in changes:
            print(f"the resume would change {line}", file=sys.stderr)
        print(json.dumps(configuration.to_tree(config), indent=2))
        return 0
    with kept_handlers(signal.SIGTERM, signal.SIGHUP) as before:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # as nohup has SIGHUP
                signal.signal(number, lambda number, _frame: sys.exit(number))  # as Ray does, once it starts
        try:
            return start(config, options)
        except KeyboardInterrupt:
            return interrupted(signal.SIGINT)
        except SystemExit as end:
            if end.code not in (signal.SIGTERM, signal.SIGHUP):
                raise
            return interrupted(signal.Signals(end.code))


def start(config: Config, options: argparse.Namespace) -> int:
    """Runs the job. Returns the exit code."""
    from asyncrl.driver.rollout_pool import RolloutFailed
    from asyncrl.driver.run import train  # after the checks: it imports torch, transformers and Ray
    from asyncrl.envs.attempt import EnvFault

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(train(config, options.resume, watch=options.watch))
    except (ValueError, EnvFault, RolloutFailed) as error:
        return fail(error)
    except ExceptionGroup as group:
        known, others = group.split((ValueError, EnvFault, RolloutFailed))
        if known is None or others is not None:
            raise
        return fail(known)
    return 0 if result.version >= config.num_steps else STOPPED


def interrupted(number: signal.Signals) -> int:
    """Says so, after a run that had its folder said how to go on. Returns the exit code that shells know it by."""
    tell(f"interrupted: {number.name}")
    return 128 + number


def fail(error: Exception) -> int:
    """Says what ended the run, in one line. Returns the exit code."""
    while isinstance(error, ExceptionGroup):  # those who failed together were told the same
        error = error.exceptions[0]
    cause = getattr(error, "cause", error)  # of one that Ray brings from an actor, without the stack there
    tell(f"error: {plain(cut(str(cause), LONGEST))}")
    return 2


def tell(line: str) -> None:
    """On standard error, if there is one left."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = tables.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml | section.key=value")
    parser.add_argument("--num-rollout-actors", type=int, metavar="N", help="short for rollout.num_actors=N")
    parser.add_argument("--watch", action="store_true", help="show the run as a live view instead of one line a step")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on from the newest checkpoint of a run")
    return parser.parse_intermixed_args(arguments)


def resolve(options: argparse.Namespace) -> Config:
    """The configuration that the command line asks for."""
    return configuration.from_words(
        options.words, DEFAULT, num_actors=options.num_rollout_actors, resume=options.resume
    )


if __name__ == "__main__":
    sys.exit(main())
