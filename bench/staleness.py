"""What staleness costs, preset by preset: the gradient probe, controlled lag (layer A) and the real system (layer B).

    python bench/staleness.py [--preset-list tis2,reinforce] [--staleness 0,4,16] [--seeds 5] [--layers probe,a,b]

Every cell leaves one JSON file, so a run that was stopped goes on where it was; give the same words again. Writes
`staleness.md`, `staleness.json` and the plots into --out. The defaults are the small selection of `make ablation`;
--full is the grid of docs/staleness.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import staleness_report
from staleness_lag import run_cell
from staleness_probe import run_probe
from staleness_system import run_job

from asyncrl import config as configuration
from asyncrl.algo.presets import PRESETS
from asyncrl.training.warmup import prepare

ROOT = Path(__file__).parent.parent
SMALL = {
    "preset_list": "async_default,tis2,grpo,reinforce",
    "staleness": "0,4,16",
    "learning_rates": "2e-4,5e-4",
    "seeds": 5,
    "system_staleness": "0,1,4",
    "system_seeds": 1,
    "probe_batches": 24,
}
FULL = {
    "preset_list": "async_default,tis2,reinforce,grpo,cispo,prime,decoupled_ppo,topr",
    "staleness": "0,1,4,16,64",
    "learning_rates": "1e-4,2e-4,5e-4",
    "seeds": 8,
    "system_staleness": "0,1,2,4,8",
    "system_seeds": 3,
    "probe_batches": 64,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: what names it, and the call that makes it."""

    key: dict[str, Any]
    call: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return " ".join(f"{value}" for value in self.key.values()).replace("/", "_").replace(" ", "-")


def main() -> None:
    options = parse()
    folder = options.out
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    settings = check_settings(options)
    # A step of layer A uses one core; the real system has processes of its own and runs alone.
    single = [*probe_cells(options), *lag_cells(options)]
    if single:  # the warm-up, once and not in every worker
        prepare(configuration.load(options.config, common_words(options)), quiet=True)
    measure(single, folder, options.workers)
    measure(system_cells(options), folder, 1)
    results = [
        json.loads((folder / "cells" / f"{cell.name}.json").read_text()) for cell in [*single, *system_cells(options)]
    ]
    print(staleness_report.write(results, settings, folder))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full grid in place of the small selection")
    parser.add_argument("--preset-list", help="names of presets, with commas")
    parser.add_argument("--staleness", help="lags of layer A and the probe, in learner steps")
    parser.add_argument("--learning-rates", help="each crossed with every preset and lag")
    parser.add_argument("--seeds", type=int, help="paired: the same prompts and samples for every preset")
    parser.add_argument("--layers", default="probe,a,b", help="which of probe, a and b to measure")
    parser.add_argument("--system-staleness", help="bounds of layer B")
    parser.add_argument("--system-presets", default="async_default")
    parser.add_argument("--system-orders", default="window", help="orders of the buffer for layer B")
    parser.add_argument("--system-seeds", type=int)
    parser.add_argument("--probe-batches", type=int)
    parser.add_argument("--probe-steps", default="16,40", help="learner steps whose weights are probed")
    parser.add_argument("--target", type=float, default=0.8, help="held-out accuracy of the time to target")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "sort_digits.toml")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="for every run")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    options = parser.parse_args()
    for name, value in (FULL if options.full else SMALL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, kind in {
        "preset_list": str,
        "system_presets": str,
        "layers": str,
        "system_orders": str,
        "learning_rates": float,
        "staleness": int,
        "system_staleness": int,
        "probe_steps": int,
    }.items():
        setattr(options, name, [kind(part) for part in getattr(options, name).split(",")])
    for name in [*options.preset_list, *options.system_presets]:
        if name not in PRESETS:
            parser.error(f"unknown preset {name!r}; there are: {', '.join(sorted(PRESETS))}")
    if unknown := set(options.layers) - {"probe", "a", "b"}:
        parser.error(f"unknown layers {sorted(unknown)}; there are: probe, a, b")
    return options


def common_words(options: argparse.Namespace) -> list[str]:
    words = [
        "learner.groups_per_step=8",
        "num_steps=60",
        "eval.every=10",
        "eval.num_prompts=100",
        "algorithm.allow_uncorrected=true",
        f"run_dir={options.out / 'runs'}",
        *options.set,
    ]
    return list({word.partition("=")[0]: word for word in words}.values())


def check_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What cells share. Refuses a folder whose cells were measured under other settings."""
    settings = {
        "config": options.config.name,
        "words": common_words(options),
        "target": options.target,
        "probe_batches": options.probe_batches,
    }
    path = options.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        sys.exit(f"{options.out} holds results of other settings ({path.read_text()}); choose another --out")
    path.write_text(json.dumps(settings))
    return settings


def probe_cells(options: argparse.Namespace) -> list[Cell]:
    if "probe" not in options.layers:
        return []
    rate = min(options.learning_rates)
    words = [*common_words(options), "algorithm.preset=reinforce", f"learner.learning_rate={rate}"]
    lags = "+".join(map(str, options.staleness))
    return [
        Cell(
            {"layer": "probe", "step": step, "presets": "+".join(options.preset_list), "lags": lags},
            run_probe,
            (words, options.config, options.preset_list, options.staleness, step, options.probe_batches),
        )
        for step in options.probe_steps
    ]


def lag_cells(options: argparse.Namespace) -> list[Cell]:
    if "a" not in options.layers:
        return []
    return [
        Cell(
            {"layer": "a", "preset": preset, "lag": lag, "learning_rate": rate, "seed": seed},
            run_cell,
            (
                [*common_words(options), f"algorithm.preset={preset}", f"learner.learning_rate={rate}", f"seed={seed}"],
                options.config,
                lag,
            ),
        )
        for seed in range(options.seeds)  # outermost: what is done when a run is stopped is a whole comparison
        for lag in options.staleness
        for rate in options.learning_rates
        for preset in options.preset_list
    ]


def system_cells(options: argparse.Namespace) -> list[Cell]:
    if "b" not in options.layers:
        return []
    rate = min(options.learning_rates)
    return [
        Cell(
            {"layer": "b", "preset": preset, "lag": bound, "learning_rate": rate, "seed": seed, "order": order},
            run_job,
            (
                [
                    *common_words(options),
                    f"algorithm.preset={preset}",
                    f"learner.learning_rate={rate}",
                    f"seed={seed}",
                    f"buffer.max_staleness={bound}",
                    f"buffer.order={order}",
                ],
                options.config,
                options.target,
            ),
        )
        for seed in range(options.system_seeds)
        for bound in options.system_staleness
        for order in options.system_orders
        for preset in options.system_presets
    ]


def measure(cells: Sequence[Cell], folder: Path, workers: int) -> None:
    """Measures the cells that have no file yet, `workers` at a time, and says how long the rest will take."""
    missing = [cell for cell in cells if not (folder / "cells" / f"{cell.name}.json").exists()]
    if len(missing) < len(cells):
        print(f"{len(cells) - len(missing)} of {len(cells)} cells are there already")
    if not missing:
        return
    began = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: dict[Future[Any], Cell] = {pool.submit(timed, cell.call, *cell.arguments): cell for cell in missing}
        for count, future in enumerate(as_completed(futures), 1):
            cell = futures[future]
            try:
                result, cpu_s = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            store(folder / "cells" / f"{cell.name}.json", cell.key | {"result": result, "cpu_s": cpu_s})
            spent = time.monotonic() - began
            left = spent / count * (len(missing) - count)
            print(f"[{count}/{len(missing)}] {cell.name} | {spent:.0f} s, about {left:.0f} s left", flush=True)


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `call` returns, and the CPU seconds that it took, those of the processes that it waited for included."""

    def spent() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    before = spent()
    result = call(*arguments)
    return result, spent() - before


def store(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all, so that a stopped run leaves no half of a file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


if __name__ == "__main__":
    main()
