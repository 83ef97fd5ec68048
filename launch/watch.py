"""A live view of a run in the terminal, from the files in its folder: attach and detach (Ctrl-C) as you like.

python launch/watch.py RUN_DIR [--once]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncrl.monitor.blame import blame, longest

Row = dict[str, Any]

_REFRESH_S = 0.5
_RECENT = 20
"""Steps that the rates and the waits are taken over."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVES = (
    ("reward", "reward/mean", "{:.3f}"),
    ("held-out", "eval/accuracy", "{:.3f}"),
    ("entropy", "policy/entropy", "{:.3f}"),
    ("lag", "lag/mean", "{:.2f}"),
    ("effective samples", "ess/token", "{:.1%}"),
    ("tokens/s", "rollout/tokens_per_s", "{:,.0f}"),
    ("weight update", "sync/total_s", "{:.3f} s"),
)
_WAITS = (
    ("learner", (("groups", "wait/learner_for_groups_s"), ("weights", "wait/learner_for_weights_s"))),
    ("rollout actors", (("slots", "wait/rollout_for_slots_s"), ("weights", "wait/rollout_for_weights_s"))),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--once", action="store_true", help="print the view once and stop")
    options = parser.parse_args(arguments)
    if not (options.run / "config.json").exists():
        print(f"error: {options.run} is no run folder: it has no config.json", file=sys.stderr)
        return 2
    with suppress(KeyboardInterrupt):  # detached: the run does not notice
        watch(options.run, once=options.once)
    return 0


def watch(folder: Path, *, once: bool, console: Console | None = None) -> None:
    """Shows the run until its last step is done."""
    console = console or Console()
    config = json.loads((folder / "config.json").read_text())
    rows = Follower(folder / "metrics.jsonl")
    if once:
        console.print(view(folder.name, config, rows.read()))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = rows.read()
            live.update(view(folder.name, config, found), refresh=True)
            if newest_version(found) >= config["num_steps"]:
                return
            time.sleep(_REFRESH_S)


class Follower:
    """The rows of a metrics file that grows; each read parses only what is new."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._rows: list[Row] = []

    def read(self) -> list[Row]:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole) + len(newline)
            self._rows += [json.loads(line) for line in whole.splitlines()]
        return self._rows


def newest_version(rows: Sequence[Row]) -> int:
    return max((row["version"] for row in rows if "reward/mean" in row), default=0)


def view(name: str, config: dict[str, Any], rows: Sequence[Row]) -> RenderableType:
    """The whole screen."""
    steps = [row for row in rows if "reward/mean" in row]
    parts: list[RenderableType] = [progress(config, steps)]
    if steps:
        found = blame(steps)
        parts += [Text(), curves(rows), Text(), waits(steps[-_RECENT:])]
        parts += [Text(), Text(found.sentence, style="yellow")] if found else []
    else:
        parts.append(Text("no step has ended yet", style="dim"))
    return Panel(Group(*parts), title=f"asyncrl · {name}", border_style="blue", padding=(1, 2))


def progress(config: dict[str, Any], steps: Sequence[Row]) -> RenderableType:
    done, total = newest_version(steps), config["num_steps"]
    recent = [row["wait/window_s"] for row in steps[-_RECENT:] if row.get("wait/window_s")]
    left_s = (total - done) * sum(recent) / len(recent) if recent else math.nan
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True)
    table.add_row(f"step {done} of {total}", ProgressBar(total=total, completed=done), f"{duration(left_s)} left")
    return table


def curves(rows: Sequence[Row]) -> Table:
    """One line a metric: its last value and its course over the whole run."""
    table = Table.grid(padding=(0, 2))
    for title, name, form in _CURVES:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            table.add_row(Text(title, style="dim"), form.format(values[-1]), Text(sparkline(values, 40), style="cyan"))
    return table


def waits(steps: Sequence[Row]) -> Table:
    """Bars of the last steps: who waited for what share of the time."""
    window_s = sum(row.get("wait/window_s") or 0.0 for row in steps) or math.nan
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("waits", style="bold"), "", Text(f"share of the last {len(steps)} steps", style="dim"))
    for who, reasons in _WAITS:
        for reason, name in reasons:
            share = sum(row.get(name) or 0.0 for row in steps) / window_s
            share = share if math.isfinite(share) else 0.0
            bar = Text("█" * round(30 * share), style="red") + Text("░" * (30 - round(30 * share)), style="dim")
            table.add_row(Text(f"{who} for {reason}", style="dim"), f"{share:.0%}", bar)
    table.add_row(Text("longest wait of the last step", style="dim"), "", longest(steps[-1]))
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of the values in at most `width` characters, each the mean of its share of them."""
    size = max(1, math.ceil(len(values) / width))
    means = [sum(part) / len(part) for at in range(0, len(values), size) if (part := values[at : at + size])]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in means)


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


if __name__ == "__main__":
    sys.exit(main())
