"""Learning curves of the built-in tasks over seeds: does the main job learn, every time, and how fast.

    python bench/learning.py [--seeds 6] [--out FOLDER] [CONFIG.toml ...] [--set section.key=value ...]

Runs `launch/run.py` once a seed and task, one after the other, as a user would. Prints a table, writes `learning.jsonl`
(one run a line) and `learning.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from asyncrl.monitor import metrics

ROOT = Path(__file__).parent.parent
TASKS = ["configs/largest_digit.toml", "configs/sort_digits.toml"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=TASKS)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="for every run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for path in options.configs:
        for seed in range(options.seeds):
            result = measure(ROOT / path, seed, options.out, options.set)
            results.append(result)
            with (options.out / "learning.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(line(result), flush=True)
    print("\n" + "\n".join(table(results)))
    plot(results, options.out / "learning.png")


def measure(config: Path, seed: int, out: Path, words: list[str]) -> dict[str, Any]:
    """One run of the main job in a process of its own; wall and CPU seconds are of the whole process tree."""
    command = [sys.executable, str(ROOT / "launch" / "run.py"), str(config), f"seed={seed}", f"run_dir={out}", *words]
    before, began = os.times(), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall_s, after = time.monotonic() - began, os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    folder = Path(re.findall(r"run folder: (\S+)", done.stdout)[-1])
    rows = metrics.read(folder)
    curve = [(row["version"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
    steps = [row for row in rows if "reward/mean" in row]
    return {
        "task": config.stem,
        "seed": seed,
        "no_skill": max(json.loads((folder / "run.json").read_text())["no_skill"].values()),
        "curve": curve,
        "final": curve[-1][1],
        "step_to_0.9": next((step for step, accuracy in curve if accuracy >= 0.9), None),
        "mean_lag": sum(row["lag/mean"] for row in steps) / len(steps),
        "max_lag": max(row["lag/max"] for row in steps),
        "loop_s": sum(row["time/total_s"] for row in steps),
        "wall_s": wall_s,
        "children_cpu_s": after.children_user + after.children_system - before.children_user - before.children_system,
    }


def line(result: dict[str, Any]) -> str:
    return (
        f"| {result['task']} | {result['seed']} | {result['curve'][0][1]:.2f} | {result['step_to_0.9']} | "
        f"{result['final']:.3f} | {result['no_skill']:.2f} | {result['mean_lag']:.2f} / {result['max_lag']:.0f} | "
        f"{result['loop_s']:.0f} | {result['wall_s']:.0f} |"
    )


def table(results: list[dict[str, Any]]) -> list[str]:
    head = [
        "| task | seed | first held-out | step to 0.9 | final held-out | no skill | lag mean / max | loop s | wall s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return head + [line(result) for result in results]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(result["task"] for result in results))
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(5.5 * len(tasks), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        runs = [result for result in results if result["task"] == task]
        for result in runs:
            axes.plot(*zip(*result["curve"], strict=True), "o-", markersize=3, label=f"seed {result['seed']}")
        axes.axhline(runs[0]["no_skill"], color="grey", linestyle=":", label="no skill")
        axes.set(title=task, xlabel="learner step", ylabel="held-out accuracy, greedy", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
