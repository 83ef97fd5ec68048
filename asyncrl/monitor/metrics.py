"""What a run logs, and its way out: JSON lines, other sinks, and one console line a step.

Names are `area/name`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from asyncrl.algo.diagnostics import METRICS as DIAGNOSTICS
from asyncrl.algo.diagnostics import WITH_REFERENCE, alarms
from asyncrl.config.schema import Config, MetricsConfig
from asyncrl.monitor import events, rows
from asyncrl.monitor.bottleneck import METRICS as WAITS
from asyncrl.monitor.bottleneck import Blame, blame, told, waits, warmed_up
from asyncrl.monitor.samples import Samples
from asyncrl.monitor.sinks import Prometheus, Sink, TensorBoard, WeightsAndBiases
from asyncrl.monitor.terminal import open_terminal
from asyncrl.monitor.timeline import Timeline
from asyncrl.recovery.curriculum import METRICS as CURRICULUM
from asyncrl.training.model_advantages import METRICS as SHAPING
from asyncrl.types import Group
from asyncrl.utils.importing import interpreter

_SENTENCE = 10_000
"""Steps that the verdict is about at most."""

METRICS: dict[str, str] = {
    "reward/mean": "mean reward of the batch, made by lagged policies; with algorithm.drop_zero_variance or a "
    "curriculum, of groups that were chosen by their rewards",
    "reward/std": "standard deviation of the rewards of the batch",
    "reward/unscored": "share of attempts without a reward, as every reward function said None: their advantage is 0",
    "reward/zero_variance": "share of groups whose rewards are all equal: they teach nothing",
    "reward/generated": "mean reward of all groups finished since the last step, those that drop_zero_variance keeps "
    "out of the batch included; nan without any",
    "reward/generated_zero_variance": "share of them whose rewards are all equal",
    "eval/accuracy": "held-out reward, mean over the attempts at every prompt (greedy unless configured otherwise)",
    "eval/low": "lower end of its 95 % confidence interval, over prompts",
    "eval/high": "upper end of its 95 % confidence interval, over prompts",
    "eval/pass@1": "share of prompts solved by one attempt; likewise pass@k, without bias, for k = 2, 4, ... up to n",
    "eval/mean_length": "sampled tokens of a held-out attempt, mean",
    "eval/truncated": "share of held-out attempts that ran out of tokens",
    "eval/failures": "held-out attempts that the environment spoilt",
    "eval/unscored": "held-out prompts left out, as the environment spoilt every try of one of their attempts",
    "eval/mixed_versions": "share of held-out prompts with tokens of another version than the one it is logged under",
    "completion/mean_length": "sampled tokens a trajectory, mean",
    "completion/max_length": "sampled tokens a trajectory, maximum",
    "completion/truncated": "share of trajectories that ran out of tokens",
    "completion/mixed_versions": "share of groups that more than one weight version generated",
    **DIAGNOSTICS,
    "gradient/norm": "gradient norm before clipping",
    "gradient/cosine": "cosine with the gradient of the step before, on a fixed random slice of coordinates; nan in "
    "the first step of a run, and of a resumed one",
    "gradient/learning_rate": "learning rate of the step",
    "learner/skipped": "optimizer steps skipped so far because their gradient was not finite",
    "learner/num_tokens": "trained tokens in the batch",
    "learner/num_inputs": "tokens that went through the model; a prompt that trajectories of a row share counts once",
    "learner/tokens_per_s": "tokens of the batch, prompts included, over the seconds of the learner's step",
    "learner/memory_gib": "GPU memory that the first learner rank had in use at once in the step; nan on CPUs",
    "learner/mfu": "model FLOPs of the step over what the learner's GPUs could have made in it; nan on CPUs",
    "learner/row_fill": "share of row positions that hold a token; the rest is padding",
    "learner/idle": "share of the time since the last step that the learner waited for groups, or in an outage",
    "rollout/idle": "share of the time since the last step that engines had nothing to generate, mean over actors",
    "rollout/held": "share of that time that play() of the environment held the actors' threads, in which an embedded "
    "engine generates nothing and any other answers late; steps of less than 10 ms do not count",
    "rollout/num_tokens": "tokens generated since the last step, all actors",
    "rollout/num_actors": "rollout actors alive",
    "rollout/failures": "attempts that came to nothing, failed rollouts and dead actors so far",
    "rollout/tokens_per_s": "tokens generated a second, all actors",
    "rollout/effective_tokens_per_s": "the same times ess/token: on-policy tokens that would be worth as much",
    "buffer/staleness": "S, buffer.max_staleness",
    "buffer/ready": "finished groups that wait for the learner, after the step",
    "buffer/pending": "groups being generated, after the step",
    "buffer/wait_s": "seconds from a group's completion until its batch was trained and live, mean",
    "buffer/dropped": "groups dropped so far, with or without use, all reasons",
    "journal/unstored": "finished groups so far that could not be written to disk: a resumed run plays them again",
    "sync/total_s": "seconds of the weight update, as the driver saw it",
    "sync/pause_s": "seconds that generation stood still for it, the slowest actor",
    "sync/settle_s": "seconds of that until nothing of the old weights ran any more",
    "sync/receive_s": "seconds of that for the new weights to arrive and be loaded",
    **WAITS,
    "time/wait_s": "seconds of the step spent waiting for groups",
    "time/step_s": "seconds of the step spent in the learner",
    "time/sync_s": "seconds of the step that the learner waited for weights to go live",
    "time/total_s": "seconds of the step from its wait for groups on: the sum of the three above",
}
"""Every metric that any run logs, with its meaning; `ONLY_WITH` has more. `completion/` also holds what an
environment reports itself, and `reward/NAME` and `eval/NAME` are the mean rewards of each environment of a mixture."""

ONLY_WITH = WITH_REFERENCE | SHAPING | CURRICULUM
"""Metrics of runs that use what they measure."""

GAUGES: dict[str, str] = {
    "rollout/num_joining": "rollout actors that wait for their first weights",
    "rollout/outage_s": "seconds that no rollout actor has been alive for; 0 while one is",
    "rollout/failures_by_kind": "attempts that came to nothing so far, by kind",
}
"""Of the Prometheus endpoint alone. They, `rollout/num_actors` and `rollout/failures` are as of each scrape."""

_LONGEST = 300
"""Characters of the event that tells of the error that ended a run; error.txt has the rest."""
_MANY_CUT_OFF = 0.5
"""Share of trajectories that end for want of tokens above which it is an alarm."""

OVERVIEW: dict[str, dict[str, list[str]]] = {
    "learning": {
        "reward": ["reward/mean", "eval/accuracy"],
        "policy": ["policy/entropy", "gradient/norm"],
        "length": ["completion/mean_length", "completion/max_length"],
    },
    "off-policy": {
        "lag": ["lag/mean", "lag/p95", "lag/max"],
        "effective sample size": ["ess/token", "ess/sequence", "ess/token_capped"],
        "removed by the loss": ["clip/removed_share", "clip/capped_positive", "clip/capped_negative"],
    },
    "who waits": {
        "learner": [
            "wait/outage_s",
            "wait/learner_for_groups_s",
            "wait/learner_for_weights_s",
            "wait/learner_for_checkpoint_s",
        ],
        "rollout actors": ["wait/rollout_for_slots_s", "wait/rollout_for_weights_s", "wait/rollout_for_evaluation_s"],
        "throughput": ["rollout/tokens_per_s"],
    },
}
"""Sections of TensorBoard's custom scalars: charts of several metrics."""


def page() -> str:
    """The table as Markdown: docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Logged at every learner step unless said otherwise, to `metrics.jsonl` and TensorBoard. Each line of",
        "`metrics.jsonl` also has `version`, the optimizer steps in the weights that it is about, and `time`, the",
        "seconds of the run until it was written, on a clock that never runs backwards: a resume goes on from those of",
        "the last line that it keeps. `timestamp` is Unix time, as the machine had it. An evaluation has a line of its",
        "own, with the version that it is of. What happened besides is in `events.jsonl` (asyncrl/monitor/events.py).",
        "",
    ]
    rows = [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in (METRICS | ONLY_WITH).items()]
    lines += ["| metric | meaning |", "|---|---|", *rows]
    lines += ["", "The Prometheus endpoint (`metrics.prometheus_port`) also has these. They, `rollout/num_actors` and"]
    lines += ["`rollout/failures` are there as of each scrape, and not of the last step.", ""]
    lines += ["| gauge | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in GAUGES.items())]
    return "\n".join(lines) + "\n"


class Unwritable(ValueError):
    """The run folder cannot be written to, as where the disk is full."""


class Metrics:
    """The sink of one run. Use it as a context manager; on exit everything is flushed."""

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        *,
        first_step: int = 0,
        quiet: bool = False,
        watch: bool = False,
        config: Config | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        """`decode` gives the text of tokens: with it and a `config`, sampled trajectories are saved. `watch` shows the
        run as a view where there is a terminal, for which the folder has to hold its config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = config.metrics if config else MetricsConfig(sample_trajectories=0)
        self.folder = folder
        self.timeline = Timeline(folder / "timeline.jsonl" if settings.timeline else None, events.last_run_s(folder))
        self.events = events.Events(folder, self.timeline.now)
        last_s, self._damage = rows.cut(folder / "metrics.jsonl", first_step)
        self._file = (folder / "metrics.jsonl").open("ab", buffering=0)
        self._board = TensorBoard(folder, config, OVERVIEW, first_step)
        self._sinks: list[Sink] = [self._board]
        self._prometheus: Prometheus | None = None
        if settings.prometheus_port:
            meanings = METRICS | GAUGES
            self._prometheus = Prometheus(settings.prometheus_host, settings.prometheus_port, meanings)
            self._sinks.append(self._prometheus)
        if config and settings.wandb:
            self._sinks.append(WeightsAndBiases(folder, config))
        self._samples = Samples(folder, config, decode) if config and decode else None
        self._terminal = open_terminal(folder, num_steps, first_step, quiet=quiet, watch=watch)
        self._terminal.lost = lambda why: self.event("failure", why, subject="console")
        self.events.listen(self._show)
        self._began = time.monotonic() - last_s  # as if never stopped
        self._history: deque[dict[str, float]] = deque(maxlen=100)
        self._alarmed: set[str] = set()  # metrics, at the step before
        self._last_step_s: float | None = None
        self.last_accuracy: float | None = None

    def __enter__(self) -> Metrics:
        self._terminal.start()
        if self._damage.count:
            self.event("alarm", str(self._damage), subject="metrics.jsonl")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._terminal.stop()
        if error is not None:
            self.events.listeners.clear()  # who started the run hears it as it ends
            self.event("end", f"ended by {error!r}"[:_LONGEST], alarm=isinstance(error, Exception))
        flush = [self._samples.flush] if self._samples else []
        sinks = [sink.close for sink in self._sinks]
        failed = []
        for close in (*flush, self.timeline.close, self.sync, self.events.close, self._file.close, *sinks):
            try:  # one that fails keeps none of the others open
                with self._told():
                    close()
            except Unwritable as failure:
                failed.append(failure)
        if failed and error is None:
            raise failed[0]

    def event(
        self, kind: str, message: str, *, subject: str = "run", alarm: bool | None = None, **facts: Any
    ) -> events.Event:
        """Something happened that a person should hear of, in one line: see `Events.emit` and `events.KINDS`."""
        return self.events.emit(kind, message, subject=subject, alarm=alarm, **facts)

    def _show(self, event: events.Event) -> None:
        if event.kind != "save":
            self._terminal.say(event.line)

    def watch(self, gauges: Callable[[], Mapping[str, float | Mapping[str, float]]]) -> None:
        """The Prometheus endpoint asks for these at each scrape, from a thread of its own."""
        if self._prometheus is not None:
            self._prometheus.gauges = gauges

    def ended(self) -> None:
        """No step follows: what is said from here on goes below the progress bar or the view."""
        self._terminal.stop()

    def step(self, version: int, row: dict[str, float], max_lag: int) -> None:
        """One learner step."""
        row |= self._waits(row)
        window_s = max(row["wait/window_s"], 1e-9)  # of this one and of all that the row says of waits and idleness
        row["learner/idle"] = (row["wait/learner_for_groups_s"] + row["wait/outage_s"]) / window_s
        row["rollout/tokens_per_s"] = row["rollout/num_tokens"] / window_s
        row["rollout/effective_tokens_per_s"] = row["rollout/tokens_per_s"] * row["ess/token"]
        self._record(version, row)
        self._terminal.step(version, self._line(version, row, max_lag))
        found = alarms(row, list(self._history)) | _cut_off(row, "completion/truncated" in self._alarmed)
        for name, sentence in found.items():
            if name not in self._alarmed:  # said when it begins, not at each step
                self.event("alarm", sentence, subject=name, version=version, value=row.get(name))
        self._alarmed = set(found)
        self._history.append(row)

    async def sample(self, version: int, groups: Sequence[Group]) -> None:
        """Saves a few trajectories of the batch that made `version`."""
        if self._samples and (rows := await self._samples.draw(version, groups)):
            self._board.samples(version, rows)

    def evaluation(self, version: int, row: dict[str, float]) -> None:
        """A held-out evaluation of `version`; it may arrive after later steps."""
        self.last_accuracy = row["eval/accuracy"]
        self._record(version, row)
        passed = "".join(
            f" | {name.removeprefix('eval/')} {value:.3f}" for name, value in row.items() if "pass@" in name
        )
        accuracy, low, high = row["eval/accuracy"], row["eval/low"], row["eval/high"]
        told = f"eval {version} | held-out {accuracy:.3f} ({low:.3f} to {high:.3f}){passed}"
        self.event("evaluation", told, subject="evaluation", version=version, accuracy=accuracy)

    def _record(self, version: int, row: dict[str, float]) -> None:
        values = {name: None if math.isnan(value) else _short(value) for name, value in row.items()}
        times = {"time": round(time.monotonic() - self._began, 3), "timestamp": round(time.time(), 3)}
        line = (json.dumps({"version": version, **times, **values}) + "\n").encode()
        with self._told():
            if self._file.write(line) < len(line):  # a disk that fills up takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for sink in self._sinks:
                sink.write(version, row)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raises `Unwritable` where the disk does not take what a run writes."""
        try:
            yield
        except OSError as error:
            raise Unwritable(
                f"the run folder {self.folder} cannot be written to ({error.strerror or error}): free some space, or "
                f"mend the disk, and go on with {interpreter()} launch/run.py --resume {self.folder}"
            ) from error

    def sync(self) -> None:
        """What was written so far survives a power failure once this returns. May run in another thread."""
        os.fsync(self._file.fileno())
        self.events.sync()

    def _waits(self, row: dict[str, float]) -> dict[str, float]:
        now = self.timeline.now()
        begin = now - row["time/total_s"] if self._last_step_s is None else self._last_step_s
        self._last_step_s = now
        self.timeline.flush()
        return waits(self.timeline.since(begin), begin, now, int(row["rollout/num_actors"]))

    def _line(self, version: int, row: dict[str, float], max_lag: int) -> str:
        accuracy = "-" if self.last_accuracy is None else f"{self.last_accuracy:.2f}"
        return (
            f"step {version} | reward {row['reward/mean']:.2f} | eval {accuracy} | "
            f"lag {row['lag/mean']:.1f}/{max_lag} | "
            f"idle learner {row['learner/idle']:.0%} rollout {row['rollout/idle']:.0%} | "
            f"{_thousands(row['rollout/tokens_per_s'])} tok/s | sync {row['sync/total_s']:.3f} s | "
            f"waits {told(row)}"
        )


def _cut_off(row: Mapping[str, float], before: bool) -> dict[str, str]:
    """The alarm of a step most of whose replies ended at the limit; `before`: whether it holds already, which it then
    does until they are far fewer, so that shares of small batches do not tell it again and again."""
    share = row.get("completion/truncated", 0.0)
    if not share > (_MANY_CUT_OFF / 2 if before else _MANY_CUT_OFF):
        return {}
    told = f"{share:.0%} of the trajectories ran out of tokens: raise rollout.max_new_tokens"
    return {"completion/truncated": f"{told}, or ask for shorter replies"}


def _short(value: float) -> float:
    """Seven significant digits: a small learning rate must not become 0. Whole numbers stay as they are."""
    return value if float(value).is_integer() else float(f"{value:.7g}")


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def read(folder: Path) -> list[rows.Row]:
    """The rows of a run's metrics.jsonl, in the order written; the line being written to a run in progress is left.

    Warns of lines that cannot be read, which are left out.
    """
    damage = rows.Damage(folder / "metrics.jsonl")
    found = list(rows.read(damage.path, damage))
    if damage.count:
        warnings.warn(str(damage), stacklevel=2)
    return found


def verdict(folder: Path, *, after: int = 0, turns: bool = False) -> Blame | None:
    """Who waited for whom in the steps after this one, the newest 10,000 of them, once the run was warm; None while
    there are too few.

    `turns`: the two sides take turns by the configuration (`rollout.release_memory`).
    """
    stream = rows.read(folder / "metrics.jsonl")
    steps = deque((row for row in stream if "reward/mean" in row and row["version"] > after), _SENTENCE)
    return blame(warmed_up(list(steps)), turns=turns)
