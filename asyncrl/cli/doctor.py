"""Prints every precondition of a run: one row for each, with what was found and what to do. A run stops at the first
that fails.

python launch/doctor.py [CONFIG.toml] [--num-rollout-actors 4] [section.key=value ...] [--resume RUN_DIR] [--start-ray]

The words are those of launch/run.py; --watch and --dry-run are taken, too, and change nothing here.
Exit code: 0 when nothing failed, 1 when something did, 2 for a bad configuration. No weights are loaded. Needs of
memory and disk are rough: they count parameters, optimizer and processes, not activations and caches.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.driver import preconditions
from asyncrl.driver.preconditions import Look
from asyncrl.driver.preflight import Check, attempt
from asyncrl.utils.importing import interpreter
from asyncrl.utils.quote import LONGEST, cut
from asyncrl.utils.settings_text import Parser

if TYPE_CHECKING:  # imported where they are used, so that a missing package is a finding and not a traceback
    from asyncrl.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml | section.key=value")
    parser.add_argument("--num-rollout-actors", type=int, metavar="N", help="short for rollout.num_actors=N")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="look at what going on with a run will need")
    for flag in ("--watch", "--dry-run"):
        parser.add_argument(flag, action="store_true", help="as launch/run.py has it; changes nothing here")
    parser.add_argument("--start-ray", action="store_true", help="start Ray and stop it again, which takes seconds")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = resolve(options.words, options.num_rollout_actors, options.resume)
        return show(list(examine(config, options.resume or Path(config.run_dir), options.start_ray)))
    except ImportError as error:
        print(f"error: {error} for {sys.executable}: run `{interpreter()} -m pip install -e .`", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {cut(str(error), LONGEST)}", file=sys.stderr)
        return 2


def resolve(words: Sequence[str], num_actors: int | None = None, resume: Path | None = None) -> Config:
    """The configuration that the command line asks for; configs/largest_digit.toml when it names no file. Raises
    `ValueError` for one that the run to `resume` cannot go on with, too."""
    from asyncrl.config import loading as configuration
    from asyncrl.recovery import run_folder

    default = ROOT / "configs" / "largest_digit.toml"
    config = configuration.from_words(words, default, num_actors=num_actors, resume=resume)
    if resume is not None:
        run_folder.differences(resume, config)
    return config


def show(checks: Sequence[Check]) -> int:
    """Prints the table and a last line. Returns the exit code."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "status", "finding", "remedy")
    for check in checks:
        table.add_row(check.name, Text(check.status, COLOURS[check.status]), Text(check.finding), Text(check.remedy))
    counts = {status: sum(check.status == status for check in checks) for status in COLOURS}
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["FAIL"] else 0


def examine(config: Config, folder: Path, start_ray: bool) -> Iterator[Check]:
    """Every precondition of the run on this machine, in the order of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        yield from preconditions.examine(Look(config, folder, scratch, num_heldout=1))
    if config.runtime == "cluster" and config.cluster.address is None and start_ray:
        yield attempt("ray start", "see the error; `ray stop` ends other Ray processes", try_ray)


def try_ray() -> str:
    """Starts Ray and stops it again."""
    import ray

    ray.init(address="local", log_to_driver=False, include_dashboard=False)
    try:
        return f"{ray.__version__} started with {ray.cluster_resources().get('GPU', 0):g} GPUs"
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
