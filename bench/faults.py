"""Fault injection: short real runs that are struck at seeded random moments and resumed until they finish.

    python bench/faults.py [--trials 100] [--seed 0] [--runtime local|cluster|both] [--kind KIND]

Needs no GPU. Each trial makes a run folder, lives through its faults (the process may die of them), is resumed until
its last step, and is judged by an account that was kept apart from the run's own journal: every prompt ever drawn is
trained exactly once on the way to the final weights, or dropped with a reason, or still in the last life's hands; and
every token was made by the weights that the learner sent under its version. Prints a table and a JSON line; exits with
1 if anything was lost, trained twice, made by wrong weights, or not recovered.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")

from faults_life import Fault, damage_checkpoint, damage_journal, live, session_of  # noqa: E402

from asyncrl.config import loading as configuration  # noqa: E402
from asyncrl.recovery.journal import Journal  # noqa: E402
from asyncrl.training.warmup import prepare  # noqa: E402

NUM_STEPS = 13
LATEST = 44
"""Journal records, about seven a step: what is open after the last fault is settled by the last step."""
WORDS = [
    f"num_steps={NUM_STEPS}",
    "env.path=faults_life:Sevens",
    "rollout.max_new_tokens=6",
    "rollout.group_size=2",
    "learner.groups_per_step=2",
    "eval.every=0",
    "eval.num_prompts=2",
    "checkpoint.every=1",
    "checkpoint.keep=3",
    "watchdog.timeout_s=5",
    "watchdog.action=stop",
    "metrics.sample_trajectories=0",
]
LOCAL = [
    "kill all",
    "kill all, checkpoint damaged",
    "kill all, journal damaged",
    "sync reply dropped",
    "sync reply delayed",
    "slow rollouts",
    "disk full: journal",
    "disk full: checkpoint",
    "disk full: groups",
    "hostile",
]
CLUSTER = ["kill driver", "kill learner", "kill rollout actor", "kill all", "sync reply dropped", "pause"]
SPECIAL = {
    "slow rollouts": ["env.args={slow_share=0.3}"],
    "hostile": ["env.path=hostile_env:Hostile", "metrics.sample_trajectories=2"],
    # The watchdog, which ends a run, would come first.
    "pause": ["weights.timeout_s=10", "watchdog.timeout_s=60"],
}
"""Settings of the trials of a kind."""
LIFE_TIMEOUT_S = 180.0
MAX_LIVES = 6


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: its settings and the faults of its first lives."""

    number: int
    runtime: str
    staleness: int
    faults: tuple[Fault, ...]

    @property
    def kind(self) -> str:
        return f"{self.runtime}: {self.faults[0].kind}"


@dataclass(slots=True)
class Verdict:
    """What became of a run."""

    lost: list[int] = field(default_factory=list)
    twice: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    lives: int = 0
    failure: str = ""

    @property
    def good(self) -> bool:
        return not (self.lost or self.twice or self.wrong or self.failure)


def draw(number: int, seed: int, runtime: str, only_kind: str | None = None) -> Trial:
    """The trial of a number; kinds take turns unless one is named, everything else is random."""
    rng = random.Random(f"{seed} {number}")
    if runtime == "both":
        runtime = "cluster" if number % 6 == 5 else "local"
        turn = number // 6 if runtime == "cluster" else number - number // 6
    else:
        turn = number
    kinds = CLUSTER if runtime == "cluster" else LOCAL
    kind = only_kind or kinds[turn % len(kinds)]
    earliest = 34 if "damaged" in kind else 3  # two checkpoints to choose from
    faults = [Fault(kind, rng.randrange(earliest, LATEST), rng.random())]
    if "kill" in kind and runtime == "local" and rng.random() < 0.5:
        faults.append(Fault("kill all", rng.randrange(2, 16), rng.random()))
    return Trial(number, runtime, rng.randrange(3), tuple(faults))


def perform(trial: Trial, seed: int, root: Path) -> Verdict:
    """Lives and is resumed until the run is through; then it is judged."""
    folder = root / f"trial-{trial.number:03d}"
    folder.mkdir()
    (folder / "cache").symlink_to(root / "cache")
    words = [
        *WORDS,
        f"runtime={trial.runtime}",
        f"run_dir={folder}",
        f"buffer.max_staleness={trial.staleness}",
        *SPECIAL.get(trial.faults[0].kind, []),
    ]
    audit, log = folder / "audit.jsonl", folder / "log.txt"
    rng = random.Random(f"{seed} {trial.number} damage")
    verdict, leaders = Verdict(), []
    try:
        while verdict.lives < MAX_LIVES:
            found = [path for path in folder.iterdir() if (path / "config.json").exists()]
            resume = found[0] if found else None
            fault = trial.faults[verdict.lives] if verdict.lives < len(trial.faults) else None
            verdict.lives += 1
            child = os.fork()
            if child == 0:
                live(words, resume, fault, audit, log)
            leaders.append(child)
            code = wait(child)
            if code == 0:
                judge(audit, next(p for p in folder.iterdir() if (p / "config.json").exists()), trial, verdict)
                return verdict
            remedy(fault, code, folder, log, rng)
    except Exception as error:
        verdict.failure = f"{type(error).__name__}: {error}"
        return verdict
    finally:
        for leader in leaders:
            for process in session_of(leader):
                os.kill(process, signal.SIGKILL)
    verdict.failure = f"not finished after {MAX_LIVES} lives: {log.read_text()[-300:]}"
    return verdict


def wait(child: int) -> int:
    """The exit code of a life; one that hangs is a failure of the run."""
    end = time.monotonic() + LIFE_TIMEOUT_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise RuntimeError(f"a life did not end within {LIFE_TIMEOUT_S:g} s")


def remedy(fault: Fault | None, code: int, folder: Path, log: Path, rng: random.Random) -> None:
    """What happens between two lives: the damage that is part of the fault, and what the run told its user to do."""
    run = next((path for path in folder.iterdir() if (path / "config.json").exists()), None)
    if fault and run and "checkpoint damaged" in fault.kind:
        damage_checkpoint(run, rng)
    if fault and run and "journal damaged" in fault.kind:
        damage_journal(run, rng)
    last = log.read_text().rstrip().rpartition("\n")[2]
    if code == 2:
        if run is None or "elete" not in last or "journal.bin" not in last:
            raise RuntimeError(f"the run was refused: {last}")
        (run / "journal.bin").unlink()  # as the message says


def judge(audit: Path, run: Path, trial: Trial, verdict: Verdict) -> None:
    """Replays the account and holds the run against it."""
    trained: dict[int, list[int]] = {}
    dropped: dict[int, int] = {}
    sent: dict[int, str] = {}
    drawn: set[int] = set()
    issued: set[int] = set()
    """In the last life."""
    struck: list[float] = []
    starting = False
    for deed in map(json.loads, audit.read_text().splitlines()):
        match deed["what"]:
            case "life":
                starting, issued = True, set()
            case "fault":
                struck.append(deed["at_s"])
            case "issued":
                drawn.add(deed["id"])
                issued.add(deed["id"])
            case "dropped":
                dropped.update(dict.fromkeys(deed["ids"], deed["version"]))
            case "sent":
                version = deed["version"]
                if starting:
                    starting = False
                    trained = {step: ids for step, ids in trained.items() if step <= version}
                    dropped = {number: at for number, at in dropped.items() if at <= version}
                    sent = {known: digest for known, digest in sent.items() if known <= version}
                if sent.setdefault(version, deed["digest"]) != deed["digest"]:
                    verdict.wrong.append(f"version {version} came back as other weights")
            case "trained":
                trained[deed["step"]] = [group["id"] for group in deed["groups"]]
                check_versions(deed, sent, trial.staleness, verdict)
                verdict.recovery_s += [deed["at_s"] - at for at in struck]
                struck.clear()
    if sorted(trained) != list(range(1, NUM_STEPS + 1)):
        verdict.failure = f"steps on the way to the final weights: {sorted(trained)}"
    uses = Counter(number for ids in trained.values() for number in ids)
    verdict.twice = sorted(number for number, times in uses.items() if times > 1)
    settled = set(uses) | set(dropped)
    journal = Journal(run / "journal.bin")
    still_open = set(journal.accounts.open_ids)
    journal.close()
    # Open prompts are issued again in order: those that the last life did not come to are the youngest ones.
    waiting = {number for number in still_open if number in issued or number > max(issued)}
    verdict.lost = sorted(set(range(max(drawn) + 1)) - settled - waiting)


def check_versions(deed: dict[str, Any], sent: dict[int, str], staleness: int, verdict: Verdict) -> None:
    """Of a trained batch: every version was sent under that digest, and none is older than the bound."""
    step = deed["step"]
    max_lag = ((staleness + 1) * 2 + 2 - 2) // 2  # of the buffer's proof, with P = window = 2
    for group in deed["groups"]:
        versions = {int(version): digest for version, digest in group["digests"].items()}
        if {group["oldest"], group["newest"]} - set(versions):
            verdict.wrong.append(f"step {step}: group {group['id']} has tokens without a digest")
        if any(sent.get(version) != digest for version, digest in versions.items()):
            verdict.wrong.append(f"step {step}: group {group['id']} was made by weights that were not sent")
        if step - 1 - group["oldest"] > max_lag:
            verdict.wrong.append(f"step {step}: group {group['id']} has lag {step - 1 - group['oldest']} > {max_lag}")


def table(results: list[tuple[Trial, Verdict]]) -> list[str]:
    lines = [
        "| fault | trials | lives | prompts lost | twice | versions wrong | not recovered | recovery s, median | max |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    kinds = sorted({trial.kind for trial, _ in results})
    for kind in [*kinds, "all"]:
        of_kind = [verdict for trial, verdict in results if kind in (trial.kind, "all")]
        seconds = [second for verdict in of_kind for second in verdict.recovery_s]
        lines.append(
            f"| {kind} | {len(of_kind)} | {sum(v.lives for v in of_kind)} | {sum(len(v.lost) for v in of_kind)} | "
            f"{sum(len(v.twice) for v in of_kind)} | {sum(len(v.wrong) for v in of_kind)} | "
            f"{sum(bool(v.failure) for v in of_kind)} | "
            + (f"{statistics.median(seconds):.1f} | {max(seconds):.1f} |" if seconds else "- | - |")
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runtime", choices=["local", "cluster", "both"], default="both", help="both: every sixth on Ray"
    )
    parser.add_argument("--kind", choices=sorted({*LOCAL, *CLUSTER}), help="this fault alone")
    parser.add_argument("--only", type=int, nargs="*", help="trials of these numbers alone")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    options = parser.parse_args()
    runtime = options.runtime
    if options.kind and options.kind not in LOCAL:
        runtime = "cluster"
    elif options.kind and options.kind not in CLUSTER:
        runtime = "local"
    root = options.out or Path(tempfile.mkdtemp(prefix="asyncrl-faults-"))
    root.mkdir(parents=True, exist_ok=True)
    if os.fork() == 0:  # the process that forks all lives must not have run torch itself
        for words in ([], *SPECIAL.values()):
            prepare(configuration.load(None, [*WORDS, f"run_dir={root}", *words]), quiet=True)
        os._exit(0)
    os.wait()
    results = []
    for number in options.only or range(options.trials):
        trial = draw(number, options.seed, runtime, options.kind)
        began = time.monotonic()
        verdict = perform(trial, options.seed, root)
        results.append((trial, verdict))
        told = "good" if verdict.good else f"BAD {verdict}"
        at = ", ".join(f"{fault.kind} at {fault.at}" for fault in trial.faults)
        print(f"{number:3d} {trial.runtime} S={trial.staleness} {at}: {told}, "
              f"{verdict.lives} lives, {time.monotonic() - began:.1f} s", flush=True)  # fmt: skip
    print("\n" + "\n".join(table(results)))
    bad = [trial.number for trial, verdict in results if not verdict.good]
    print(json.dumps({"trials": len(results), "seed": options.seed, "bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
