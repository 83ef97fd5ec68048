"""One training job from its configuration: prepares the weights, starts the actors, runs the loop, leaves a folder."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.config import loading as configuration
from asyncrl.config import origin
from asyncrl.config.schema import Config
from asyncrl.driver.buffer import Buffer
from asyncrl.driver.build import load_runtime, make_buffer, make_prompts, make_system
from asyncrl.driver.loop import run
from asyncrl.driver.loop_watch import watched_loop
from asyncrl.driver.preconditions import Look, require
from asyncrl.driver.system import System
from asyncrl.envs.base import Env
from asyncrl.models.loading import added_stop
from asyncrl.monitor import rows
from asyncrl.monitor.metrics import Metrics, verdict
from asyncrl.recovery import checkpoint, run_folder
from asyncrl.recovery.journal import Journal
from asyncrl.recovery.prompt_states import Resumed, Started
from asyncrl.training.warmup import prepare
from asyncrl.types import Prompt, Version
from asyncrl.utils.importing import interpreter
from asyncrl.utils.threads import heard_here, kept_handlers


@dataclass(frozen=True, slots=True)
class Result:
    """What a job left behind."""

    folder: Path
    version: int
    accuracy: float | None
    """Held-out, greedy, of the last version that was evaluated."""
    baselines: dict[str, float]


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained, on what: loaded and checked before the run has a folder or actors."""

    initial: str
    """The folder of the weights that training starts from."""
    tokenizer: Any
    env: Env
    heldout: list[Prompt]
    baselines: dict[str, float]
    """What policies without skill score on the held-out prompts; empty without eval.baseline."""


def load_task(
    config: Config, known: dict[str, float] | None = None, resume: Path | None = None, *, quiet: bool = False
) -> Task:
    """`known`: what policies without skill scored when the run began, which is not asked for again.

    Raises `ValueError` for what the run could not start with, or would not end with.
    """
    with tempfile.TemporaryDirectory() as scratch:
        look = Look(config, resume or Path(config.run_dir), scratch, known=known)
        require(look)  # before the warm-up, which may take long
    initial = str(prepare(config, quiet=quiet))
    return Task(initial, look.tokenizer, look.env, look.heldout, look.baselines)


async def train(config: Config, resume: Path | None = None, *, quiet: bool = False, watch: bool = False) -> Result:
    """Runs the job to its last step, or to Ctrl-C, which it hears of in the main thread alone; `resume` is the run
    folder of an earlier job to go on with, `watch` shows a view of the run where there is a terminal.

    Raises `ValueError` for a configuration that breaks a rule, and for what the run could not start with.
    """
    config = origin.fixed(configuration.checked(config), resume)
    runtime = load_runtime(config)
    changes = run_folder.differences(resume, config) if resume else []  # before a warm-up is made for nothing
    known = run_folder.known_baselines(resume, changes) if resume else None
    with _ctrl_c_at_once():
        task = load_task(config, known, resume, quiet=quiet)
    folder = (resume or run_folder.create(config, task.baselines)).absolute()
    if resume and task.baselines and task.baselines != known:
        run_folder.keep_baselines(folder, task.baselines)
    buffer = make_buffer(config)

    def decode(token_ids: list[int]) -> str:
        return str(task.tokenizer.decode(token_ids))

    journal, saved = open_journal(folder, buffer, resumed=resume is not None)
    with closing(journal), run_folder.error_kept(folder):
        first_step = journal.accounts.version
        if resume and first_step >= config.num_steps and score_of(folder, first_step) is not None:
            print(
                f"{folder} is at step {first_step} of {config.num_steps}: nothing is left to do; num_steps=N goes on "
                "to N"
            )
            return Result(folder, first_step, None, task.baselines)
        with Metrics(
            folder, config.num_steps, first_step=first_step, quiet=quiet, watch=watch, config=config, decode=decode
        ) as metrics:
            if resume:
                metrics.event(
                    "start",
                    f"going on from step {first_step}, {'the newest checkpoint' if saved else 'as none was saved'}",
                )
                _clear_checkpoints(metrics, folder / "checkpoints")
            for line in changes:
                metrics.event("start", f"changed at step {first_step}: {line}")
            _say_how_it_begins(metrics, config, journal, task)
            prompts = make_prompts(config, task.env, task.heldout, journal, folder)
            async with runtime.open_actors(config, task.initial, saved, folder / "groups") as (learner, actors):
                system = make_system(
                    config,
                    folder,
                    initial=task.initial,
                    prompts=prompts,
                    heldout=task.heldout,
                    learner=learner,
                    actors=actors,
                    buffer=buffer,
                    metrics=metrics,
                )
                system.rollouts.published.update(journal.accounts.published)
                if resume:
                    keep_evaluation(system, changes)
                if changes:  # they are accepted by everything there is
                    run_folder.keep(folder, config, first_step)
                with _stop_on_ctrl_c(buffer, metrics), watched_loop(system.watchdog.loop_held):
                    await run(system)
                result = Result(folder, learner.version, metrics.last_accuracy, task.baselines)
            metrics.ended()
            _say_what_became_of_it(system, first_step)
            for line in report(result, config.num_steps).splitlines():
                metrics.event("end", line, step=result.version)
    return result


def score_of(folder: Path, version: Version) -> float | None:
    """The held-out score that the run's metrics have of `version`, None without one. Raises `ValueError` if they cannot
    be read."""
    scores = (row["eval/accuracy"] for row in rows.read(folder / "metrics.jsonl") if _evaluates(row, version))
    return next(scores, None)


def _evaluates(row: rows.Row, version: Version) -> bool:
    return row["version"] == version and row.get("eval/accuracy") is not None


def keep_evaluation(system: System, changes: Sequence[str]) -> None:
    """The version that a run goes on from is not evaluated again, unless the `changes` of the configuration may give it
    another score."""
    version = system.learner.version
    score = score_of(system.metrics.folder, version)
    if score is not None and not any(line.startswith(("env.", "eval.", "model.", "rollout.")) for line in changes):
        system.evaluated.add(version)
        system.metrics.last_accuracy = score


def open_journal(folder: Path, buffer: Buffer, *, resumed: bool) -> tuple[Journal, Path | None]:
    """The run's journal, and the newest whole checkpoint, which the accounts are now those of.

    Raises `ValueError` if there is nothing to go on from, or if the journal is damaged or shorter than the checkpoint
    knew it.
    """
    path = folder / "journal.bin"
    (folder / "groups").mkdir(mode=0o700, exist_ok=True)
    saved = checkpoint.newest(folder / "checkpoints") if resumed else None
    if resumed and saved is None and not path.exists():
        raise ValueError(f"{folder} has neither a checkpoint nor a journal to go on from; start a new run")
    cursor = checkpoint.load_cursor(saved) if saved else checkpoint.Cursor(0, 0, [])
    existed = path.exists()
    journal = Journal(path, reuse=buffer.reuse, max_lag=buffer.max_lag, resume_at=cursor.version)
    if not existed:
        open_ids = tuple(cursor.open_prompts)
        journal.append(Started(version=cursor.version, next_id=cursor.next_prompt, open_ids=open_ids))
    elif journal.num_bytes < cursor.journal_bytes:
        journal.close()
        raise ValueError(
            f"{path} has {journal.num_bytes} whole bytes and had {cursor.journal_bytes} when the checkpoint of version "
            f"{cursor.version} was made: delete it to go on from the checkpoint's own list of open prompts"
        )
    else:
        journal.append(Resumed(version=cursor.version))
    journal.sync()
    return journal, saved


def _clear_checkpoints(metrics: Metrics, root: Path) -> None:
    """Not before the journal is held: another process might be writing one of them."""
    count, num_bytes = checkpoint.clear(root)
    if count:
        size = f"{num_bytes / 1e6:,.1f} MB"
        metrics.event("start", f"unfinished folders in checkpoints/, left by a kill, are deleted: {count}, {size}")


def _say_how_it_begins(metrics: Metrics, config: Config, journal: Journal, task: Task) -> None:
    for name, score in task.baselines.items():
        metrics.event("start", f"no skill: {name!r} scores {score:.2f} on the held-out prompts")
    for reason, count in getattr(task.env, "skipped", {}).items():
        metrics.event("start", f"skipped rows of the data: {count}, {reason}")
    if added := added_stop(task.initial, task.tokenizer):
        told = f"replies stop at {added!r}, the chat template's end of turn, which the model's settings lack"
        metrics.event("start", told)
    if journal.torn_bytes:
        metrics.event("start", f"the journal ended in {journal.torn_bytes} bytes of an incomplete record, now cut off")
    metrics.event("start", f"starting {config.rollout.num_actors} rollout actors and the learner")


def _say_what_became_of_it(system: System, first_step: int) -> None:
    metrics = system.metrics
    counted = {
        "prompts": system.prompts.journal.accounts.totals(),
        "dropped groups": system.buffer.dropped,
        "failures": system.rollouts.failures,
    }
    for what, counts in counted.items():
        if counts.total():
            told = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
            metrics.event("end", f"{what}: {told}", subject=what, counts=dict(counts))
    if found := verdict(metrics.folder, after=first_step, turns=system.config.rollout.release_memory):
        metrics.event("end", found.sentence, subject="waits", shares=found.shares)
        metrics.event("end", found.bound, subject="waits")


def report(result: Result, num_steps: int) -> str:
    """The last lines of a run."""
    lines = [f"done: step {result.version} of {num_steps}"]
    if result.accuracy is not None:
        lines[0] += f" | held-out {result.accuracy:.3f}"
        if result.baselines:
            best = max(result.baselines, key=result.baselines.__getitem__)
            lines[0] += f", no skill {result.baselines[best]:.2f} ({best})"
    lines.append(f"run folder: {result.folder}")
    lines.append(f"as a page: {interpreter()} launch/report.py {result.folder}")
    if result.version < num_steps:
        lines.append(f"go on with: {interpreter()} launch/run.py --resume {result.folder}")
    return "\n".join(lines)


@contextmanager
def _ctrl_c_at_once() -> Iterator[None]:
    """Ctrl-C interrupts what never waits, such as a warm-up; asyncio would end the task where it waits next."""
    with kept_handlers(signal.SIGINT) as before:
        if before:  # in the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield


@contextmanager
def _stop_on_ctrl_c(buffer: Buffer, metrics: Metrics) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP closes the buffer: the step under way ends, then the run is saved. The second
    Ctrl-C or SIGTERM interrupts, also where the event loop is held up."""
    loop = asyncio.get_running_loop()
    # SIGTERM is how schedulers of clusters and containers say it, SIGHUP a terminal that is closed.
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

    def stop(name: str) -> None:
        told = f"stopping after this step, with a checkpoint ({name}); once more to interrupt at once"
        metrics.event("stop", told, signal=name)
        buffer.close()

    def heard(number: int, _frame: object) -> None:  # not the loop's own way: a play() that blocks would hold that up
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        if before[signal.SIGHUP] != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that goes sends it twice
        loop.call_soon_threadsafe(stop, signal.Signals(number).name)

    with kept_handlers(*signals) as before:
        # None outside the main thread; SIGHUP stays ignored where nohup has it so.
        ours = [number for number in before if number != signal.SIGHUP or before[number] != signal.SIG_IGN]
        for number in ours:
            signal.signal(number, heard)
        with heard_here(*ours):
            yield
