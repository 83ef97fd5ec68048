"""Synchronous beside asynchronous training on the same devices and the same work: time, device-seconds, reward, tokens.

    python bench/throughput.py [CONFIG.toml] [--num-rollout-actors 1 2] [--steps 60] [--repeats 1] [words ...]

For every number of rollout actors, `launch/run.py` runs with `buffer.max_staleness=0` and then as configured. Each side
is judged by its own best number of actors. Seconds are the loop's, without start-up; the first `--skip` steps do not
count for rates. Effective tokens/s are tokens/s times the effective sample size of the tokens (`ess/token`). Reward is
the mean over the last ten steps that ended by the time at which the first of all runs was done.

The bound on the gain is (g_tail + t + s) / (g_eff + t) where both kinds of work can use all devices, with, in seconds a
step of the synchronous run, t training, s weight update, g_tail waiting for generation, g_eff the engines' busy time.
Where learner and actors have devices of their own, the two overlap: (g_tail + t + s) / max(g_eff, t).

Prints tables and a JSON line; writes `throughput.jsonl` and `throughput.png`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from asyncrl.config import cores
from asyncrl.config import loading as configuration
from asyncrl.monitor import metrics

ROOT = Path(__file__).parent.parent
SYNC = "buffer.max_staleness=0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml | section.key=value")
    parser.add_argument("--num-rollout-actors", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skip", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1, help="seeds of every setting")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"))
    options = parser.parse_intermixed_args()
    files = [word for word in options.words if "=" not in word]
    options.config = files[0] if files else str(ROOT / "configs" / "largest_digit.toml")
    options.words = [word for word in options.words if "=" in word]
    options.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(options.repeats):
        for actors in options.num_rollout_actors:
            for mode in ("sync", "async"):
                runs.append(measure(options, mode, actors, seed))
                with (options.out / "throughput.jsonl").open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    end_s = min(run["times_s"][-1] for run in runs)
    for run in runs:
        run["reward"] = reward_at(run, end_s)
    print(*table(runs, end_s), *verdicts(runs), sep="\n")
    plot(runs, options.out / "throughput.png")
    print(json.dumps([{key: value for key, value in run.items() if not isinstance(value, list)} for run in runs]))


def measure(options: argparse.Namespace, mode: str, actors: int, seed: int) -> dict[str, Any]:
    """One run of the main job in processes of its own."""
    words = [f"rollout.num_actors={actors}", f"num_steps={options.steps}", f"seed={seed}", f"run_dir={options.out}"]
    words = [*options.words, *words, "eval.every=0", "checkpoint.every=0", *([SYNC] if mode == "sync" else [])]
    config = configuration.load(options.config, words)
    if mode == "async" and config.buffer.max_staleness == 0:
        raise ValueError(f"{options.config} is synchronous itself: give buffer.max_staleness=1 or more to compare")
    command = [sys.executable, str(ROOT / "launch" / "run.py"), options.config, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    folder = Path(re.findall(r"run folder: (\S+)", done.stdout)[-1])
    rows = [row for row in metrics.read(folder) if "time/total_s" in row]
    steady = rows[options.skip :]
    found = metrics.verdict(folder)
    elapsed = [sum(row["time/total_s"] for row in rows[: n + 1]) for n in range(len(rows))]

    def mean(name: str) -> float:
        return statistics.fmean(row[name] for row in steady)

    step_s = mean("time/total_s")
    tokens_per_s = mean("learner/num_tokens") / step_s
    return {
        "mode": mode,
        "actors": actors,
        "seed": seed,
        "devices": num_devices(config),
        "step_s": step_s,
        "device_s": num_devices(config) * step_s,
        "tokens_per_s": tokens_per_s,
        "effective_tokens_per_s": tokens_per_s * mean("ess/token"),
        "wait_s": mean("time/wait_s"),
        "train_s": mean("time/step_s"),
        "sync_s": mean("time/sync_s"),
        "busy_s": step_s * (1 - mean("rollout/idle")),
        "rollout_idle": mean("rollout/idle"),
        "learner_idle": mean("learner/idle"),
        "advice": found.sentence if found else "",
        "times_s": elapsed,
        "rewards": [row["reward/mean"] for row in rows],
    }


def num_devices(config: configuration.Config) -> int:
    """GPUs of the run; on a CPU the cores that its threads can fill."""
    rollout, learner = config.rollout, config.learner
    if uses_gpu(config):
        shared = config.placement == "colocated"
        return 1 if shared else rollout.num_actors * rollout.tensor_parallel_size + learner.num_gpus
    threads = cores.here(config)
    return min(cores.count(), rollout.num_actors * threads.engine + threads.learner)


def uses_gpu(config: configuration.Config) -> bool:
    if config.device == "auto":
        import torch

        return torch.cuda.is_available()
    return config.device == "cuda"


def reward_at(run: dict[str, Any], end_s: float) -> float:
    """Mean reward of the last ten steps that were done after `end_s` seconds of the loop."""
    rewards = [reward for reward, at_s in zip(run["rewards"], run["times_s"], strict=True) if at_s <= end_s]
    return statistics.fmean(rewards[-10:]) if rewards else float("nan")


def table(runs: list[dict[str, Any]], end_s: float) -> list[str]:
    lines = [
        f"| | rollout actors | seed | devices | s a step | device-s a step | tokens/s | effective tokens/s | "
        f"reward after {end_s:.0f} s | wait / train / sync s | rollout idle | learner idle |",
        "|" + "---|" * 12,
    ]
    return lines + [
        f"| {run['mode']} | {run['actors']} | {run['seed']} | {run['devices']} | {run['step_s']:.3f} | "
        f"{run['device_s']:.3f} | {run['tokens_per_s']:.0f} | {run['effective_tokens_per_s']:.0f} | "
        f"{run['reward']:.2f} | {run['wait_s']:.3f} / {run['train_s']:.3f} / {run['sync_s']:.3f} | "
        f"{run['rollout_idle']:.0%} | {run['learner_idle']:.0%} |"
        for run in runs
    ]


def verdicts(runs: list[dict[str, Any]]) -> list[str]:
    """The gain at each side's best number of actors beside its bound, and what the waits of the best run advise."""
    sync, asynchronous = best(runs, "sync"), best(runs, "async")
    before = sync["wait_s"] + sync["train_s"] + sync["sync_s"]
    shared, apart = before / (sync["busy_s"] + sync["train_s"]), before / max(sync["busy_s"], sync["train_s"])
    gain = sync["step_s"] / asynchronous["step_s"]
    doubt = (
        " (above both bounds: the runs did not have the same machine, repeat them)" if gain > max(shared, apart) else ""
    )
    return [
        "",
        f"gain in time a step: {gain:.2f}{doubt}, in device-seconds "
        f"{sync['device_s'] / asynchronous['device_s']:.2f} (rollout actors: sync {sync['actors']}, async "
        f"{asynchronous['actors']})",
        f"bound: {shared:.2f} where all devices do both kinds of work, {apart:.2f} with devices of their own",
        f"split: {asynchronous['advice']}",
    ]


def best(runs: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    """The number of actors with the least mean time a step, and the means of its seeds."""
    settings = [
        [run for run in runs if run["mode"] == mode and run["actors"] == n] for n in {r["actors"] for r in runs}
    ]
    chosen = min(settings, key=lambda seeds: statistics.fmean(run["step_s"] for run in seeds))
    numbers = [name for name, value in chosen[0].items() if isinstance(value, float)]
    return chosen[0] | {name: statistics.fmean(run[name] for run in chosen) for name in numbers}


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rewards, rates) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for run in runs:
        label = f"{run['mode']}, {run['actors']} rollout actors" if run["seed"] == 0 else None
        style, color = ("--" if run["mode"] == "sync" else "-"), f"C{run['actors'] % 10}"
        rewards.plot(run["times_s"], run["rewards"], style, color=color, label=label, alpha=0.8)
    rewards.set(xlabel="seconds of the loop", ylabel="reward of the batch", title="reward at time")
    rewards.legend(fontsize=8)
    for mode, style in (("sync", "o--"), ("async", "o-")):
        counts = sorted({run["actors"] for run in runs})
        chosen = [
            [run["effective_tokens_per_s"] for run in runs if (run["mode"], run["actors"]) == (mode, n)] for n in counts
        ]
        rates.plot(counts, [statistics.fmean(values) for values in chosen], style, label=mode)
    rates.set(
        xlabel="rollout actors", ylabel="effective tokens/s", title="tokens/s x effective sample size", ylim=(0, None)
    )
    rates.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
