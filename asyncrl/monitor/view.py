"""The terminal view of a run, from the rows of its metrics.jsonl: `launch/watch.py` and `--watch` show the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncrl.monitor import events
from asyncrl.monitor.bottleneck import blame, takes_turns, told, warmed_up
from asyncrl.monitor.course import Course, Follower
from asyncrl.monitor.events import Event
from asyncrl.monitor.news import Silence, alarms, outage
from asyncrl.monitor.rows import Row
from asyncrl.recovery import run_folder
from asyncrl.utils import settings_text as tables
from asyncrl.utils.importing import check_run

_RECENT = 20
"""Steps that the rates and the waits are taken over."""
_LINGER_S = 5.0
_NEWS_BYTES = 2**16
"""Of the newest events, which hold those of an outage that goes on."""
_SENTENCE = 1000
"""Steps that the sentence is about, the newest ones: what it costs to draw does not grow with the run."""
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
NAMES = tuple(name for _, name, _ in _CURVES)
NUM_STEPS = _SENTENCE + 10
"""Steps to hold for the sentence, which leaves out the first ten of a run."""
_WAITS = (
    ("learner for groups", "wait/learner_for_groups_s"),
    ("learner for weights", "wait/learner_for_weights_s"),
    ("rollout actors for slots", "wait/rollout_for_slots_s"),
    ("rollout actors for weights", "wait/rollout_for_weights_s"),
)
_RARE_WAITS = (
    ("learner for checkpoints", "wait/learner_for_checkpoint_s"),
    ("learner for evaluators", "wait/learner_for_evaluation_s"),
    ("learner in an outage", "wait/outage_s"),
    ("engines with evaluations", "wait/rollout_for_evaluation_s"),
)
"""Shown where they take a share that can be seen."""


class View:
    """The screen of one run folder. Raises `ValueError` for a folder that is none."""

    def __init__(self, folder: Path) -> None:
        check_run(folder)
        self._name = folder.resolve().name
        self._settings, self._path = folder / "config.json", folder / "metrics.jsonl"
        self._follower = Follower(self._path, NAMES, NUM_STEPS)
        self._known = tables.read(self._settings)
        self._silence = Silence(self._path)

    def finished(self) -> bool:
        """Whether the last step is done and nothing followed for a while, such as its evaluation or further steps of a
        run that was resumed with more of them."""
        return self._follower.read().version >= num_steps(self._config()) and self._silence.seconds() > _LINGER_S

    def render(self) -> RenderableType:
        """The whole screen, as the run's files are now."""
        begin, _ = run_folder.stretches(self._path.parent)[-1]
        course, silent_s = self._follower.read(), self._silence.seconds()
        damage = str(self._follower.damage)
        news = events.read(self._path.parent, _NEWS_BYTES)
        return screen(self._name, self._config(), course, silent_s=silent_s, begin=begin, damage=damage, news=news)

    def _config(self) -> dict[str, Any]:
        """As it is now, as a resume changes it on its way; where it cannot be read any more, as it was."""
        with suppress(ValueError):
            self._known = tables.read(self._settings)
        return self._known


def num_steps(config: Mapping[str, Any]) -> int:
    return int(config.get("num_steps", 0))


def screen(
    name: str,
    config: dict[str, Any],
    course: Course,
    *,
    silent_s: float = 0.0,
    begin: int = 0,
    damage: str = "",
    news: Sequence[Event] = (),
) -> RenderableType:
    """`silent_s`: seconds since the run last wrote a row. `begin`: the step that it has this configuration from.
    `damage`: what cannot be read, in a line. `news`: the run's newest events."""
    steps = list(course.steps)
    out = outage(news)
    parts: list[RenderableType] = [progress(config, course.version, steps, known=not out)]
    parts += [Text(out, style="bold red")] if out else []
    if steps:
        recent = warmed_up([row for row in steps if row["version"] > begin])[-_SENTENCE:]
        found = blame(recent, turns=takes_turns(config))
        parts += [Text(), curves(course), Text(), waits(steps[-_RECENT:])]
        parts += [Text(found.sentence, style="yellow")] if found else []
        parts += silence(silent_s, steps) if course.version < num_steps(config) else []
    else:
        parts.append(Text("no step has ended yet", style="dim"))
    parts += [Text(damage, style="red")] if damage else []
    parts += alarms(news)
    return Panel(Group(*parts), title=f"asyncrl · {name}", border_style="blue", padding=(0, 2))


def silence(silent_s: float, steps: Sequence[Row]) -> list[RenderableType]:
    """A line when the run has been quiet for far longer than its steps take."""
    usual_s = mean_step_s(steps)
    if silent_s < max(60.0, 10 * usual_s):
        return []
    said = f"no step for {duration(silent_s)}, they took {usual_s:.1f} s: has the run ended? If not, see stalls.txt"
    return [Text(said, style="bold red")]


def mean_step_s(steps: Sequence[Row]) -> float:
    """Seconds from step to step lately; nan before the second one."""
    recent = [row["wait/window_s"] for row in steps[-_RECENT:] if row.get("wait/window_s")]
    return sum(recent) / len(recent) if recent else math.nan


def progress(config: dict[str, Any], done: int, steps: Sequence[Row], *, known: bool = True) -> RenderableType:
    """`done`: steps so far; `steps`: the newest ones, for the time that they take. `known`: whether the rest will take
    as long, which nobody can say in an outage."""
    total = max(done, num_steps(config))
    left_s = (total - done) * mean_step_s(steps)
    told = f"{duration(left_s)} left" if known else "time left unknown"
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True)
    table.add_row(f"step {done} of {total}", ProgressBar(total=total, completed=done), told)
    return table


def curves(course: Course) -> Table:
    """One line a metric: its last value and its course over the whole run."""
    table = Table.grid(padding=(0, 2))
    for title, name, form in _CURVES:
        curve = course.curves[name]
        if curve.points:
            line = Text(sparkline(curve.points, 40), style="cyan")
            table.add_row(Text(title, style="dim"), form.format(curve.last), line)
    return table


def waits(steps: Sequence[Row]) -> Table:
    """Bars of these steps: who waited for what share of the time."""
    window_s = sum(row.get("wait/window_s") or 0.0 for row in steps) or math.nan
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("waits", style="bold"), "", Text(f"share of the last {len(steps)} steps", style="dim"))
    for who, name in (*_WAITS, *_RARE_WAITS):
        share = sum(row.get(name) or 0.0 for row in steps) / window_s
        share = min(1.0, share) if math.isfinite(share) else 0.0
        filled = round(30 * share)
        if filled or (who, name) in _WAITS:
            bar = Text("█" * filled, style="red") + Text("░" * (30 - filled), style="dim")
            table.add_row(Text(who, style="dim"), f"{share:.0%}", bar)
    table.add_row(Text("of the last step", style="dim"), "", told(steps[-1]))
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
