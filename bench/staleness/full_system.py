"""Layer B of the staleness ablation: the real asynchronous system, started as a user starts it.

The staleness is a bound here and the lag is measured. Results have wall-clock times and are never mixed with those of
layer A.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from asyncrl.monitor import metrics, timeline

ROOT = Path(__file__).parents[2]
_NUM_SHOWN = 4


def run_job(words: list[str], config_path: Path) -> dict[str, Any]:
    """One run of `launch/run.py`, and what it measured of itself."""
    command = [sys.executable, str(ROOT / "launch" / "run.py"), str(config_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    folder = Path(re.findall(r"run folder: (\S+)", done.stdout)[-1])
    return summary(metrics.read(folder)) | {"busy": busy(timeline.read(folder / "timeline.jsonl")[0])}


def busy(spans: list[timeline.Span]) -> list[tuple[str, str, float, float]]:
    """What learner and rollout actors did in the middle `_NUM_SHOWN` steps: lane, name, begin and end in seconds."""
    steps = [span for span in spans if (span.lane, span.name) == ("learner", "step")]
    middle = max(0, (len(steps) - _NUM_SHOWN) // 2)
    shown = steps[middle : middle + _NUM_SHOWN]
    begin, end = shown[0].begin_s, shown[-1].end_s
    return [
        (span.lane, span.name, max(span.begin_s, begin) - begin, min(span.end_s, end) - begin)
        for span in spans
        if span.lane.startswith(("learner", "rollout")) and span.begin_s < end and span.end_s > begin
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Curve (step, held-out accuracy, loop seconds), lags and utilisation of a run, from its metrics.jsonl."""
    steps = [row for row in rows if "reward/mean" in row]
    evaluations = sorted((row for row in rows if "eval/accuracy" in row), key=lambda row: row["version"])
    first = steps[0]["time"] - steps[0]["time/total_s"]  # starting the actors is no part of training
    curve = [(row["version"], row["eval/accuracy"], max(0.0, row["time"] - first)) for row in evaluations]
    accuracies = [accuracy for _, accuracy, _ in curve]

    def mean(name: str) -> float:
        return statistics.fmean(row[name] for row in steps if row[name] is not None)

    return {
        "curve": curve,
        "final": statistics.fmean(accuracies[-3:]),
        "auc": statistics.fmean(accuracies),
        "loop_s": sum(row["time/total_s"] for row in steps),
        "step_s": mean("time/step_s"),
        "wait_s": mean("time/wait_s"),
        "sync_s": mean("time/sync_s"),
        "lag_mean": mean("lag/mean"),
        "lag_p95": max(row["lag/p95"] for row in steps),
        "lag_max": max(row["lag/max"] for row in steps),
        "lag_shares": [mean(f"lag/share_{name}") for name in (0, 1, 2, 3, 4, "more")],
        "learner_idle": mean("learner/idle"),
        "rollout_idle": mean("rollout/idle"),
        "tokens_per_s": mean("rollout/tokens_per_s"),
        "ess": mean("ess/token"),
        "effective_tokens_per_s": mean("rollout/effective_tokens_per_s"),
    }
