"""What staleness costs, preset by preset: the gradient probe, controlled lag (layer A) and the real system (layer B).

    python bench/staleness/ablation.py [--preset-list tis2,reinforce] [--staleness 0,4,16] [--seeds 5]
                                       [--layers probe,a,b]

Every cell leaves one JSON file, so a run that was stopped goes on where it was; give the same words again. Writes
`staleness.md`, `staleness.json` and the plots into --out. The defaults are the small selection of `make ablation`;
--full is the grid of docs/staleness.md, --gpu the table of a 135M language model on one GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import report
import torch
from cells import FULL, GPU, SMALL, Cell, common_words, lag_cells, probe_cells, system_cells

from asyncrl.algo.presets import PRESETS
from asyncrl.config import loading as configuration
from asyncrl.training.warmup import prepare

_LISTS: dict[str, Callable[[str], Any]] = {
    "preset_list": str,
    "system_presets": str,
    "layers": str,
    "system_orders": str,
    "learning_rates": float,
    "engine_noise": float,
    "staleness": int,
    "system_staleness": int,
    "probe_steps": int,
}


def main() -> None:
    options = parse()
    until = time.monotonic() + 60 * options.minutes
    folder = options.out
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    settings = check_settings(options)
    # The warm-up, once and not in every worker.
    start = prepare(configuration.load(options.config, common_words(options)), quiet=True)
    # A step of layer A uses one core; the real system has processes of its own and runs alone.
    single, system = [*probe_cells(options), *lag_cells(options)], system_cells(options, start)
    measure(single, folder, options.workers, until)
    measure(system, folder, 1, until)
    results = finished([*single, *system], folder)
    if not results:
        sys.exit("no seed is complete yet: give the same words again, which go on from here, or more --minutes")
    print(report.write(results, settings, folder))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full grid in place of the small selection")
    parser.add_argument("--gpu", action="store_true", help="a 135M model on one GPU that several cells share")
    parser.add_argument("--preset-list", help="names of presets, with commas")
    parser.add_argument("--staleness", help="lags of layer A and the probe, in learner steps")
    parser.add_argument("--learning-rates", help="each crossed with every preset and lag")
    parser.add_argument("--seeds", type=int, help="paired: the same prompts and samples for every preset")
    parser.add_argument("--engine-noise", default="0", help="standard deviations of the noise on the engine's logits")
    parser.add_argument("--layers", help="which of probe, a and b to measure")
    parser.add_argument("--system-staleness", help="bounds of layer B")
    parser.add_argument("--system-presets", default="async_default")
    parser.add_argument(
        "--system-orders",
        default="window",
        help="orders of the buffer for layer B: window, fifo (buffer.window=1)",
    )
    parser.add_argument("--system-seeds", type=int)
    parser.add_argument("--probe-batches", type=int)
    parser.add_argument("--probe-steps", default="16,40", help="learner steps whose weights are probed")
    parser.add_argument("--target", type=float, help="held-out accuracy of the time to target")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="for every run")
    parser.add_argument("--workers", type=int, help="cells at a time; default: one a core")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell that would end later than this")
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    options = parser.parse_args(words)
    defaults = {"workers": len(os.sched_getaffinity(0))} | (FULL if options.full else GPU if options.gpu else SMALL)
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, kind in _LISTS.items():
        setattr(options, name, [kind(part) for part in getattr(options, name).split(",")])
    for name in [*options.preset_list, *options.system_presets]:
        if name not in PRESETS:
            parser.error(f"unknown preset {name!r}; there are: {', '.join(sorted(PRESETS))}")
    if unknown := set(options.layers) - {"probe", "a", "b"}:
        parser.error(f"unknown layers {sorted(unknown)}; there are: probe, a, b")
    if any(options.engine_noise) and "a" not in options.layers:
        parser.error("--engine-noise adds to layer a: name it in --layers")
    return options


def check_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the report is told. Refuses a folder whose cells were measured under other settings."""
    words = common_words(options)
    config = configuration.load(options.config, words)
    settings = {
        "config": options.config.name,
        "words": words,
        "probe_batches": options.probe_batches,
        "samples_per_step": config.learner.groups_per_step * config.rollout.group_size,
    }
    path = options.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        sys.exit(f"{options.out} holds results of other settings ({path.read_text()}); choose another --out")
    path.write_text(json.dumps(settings))
    return settings | {"target": options.target}  # which no measurement depends on


def measure(cells: Sequence[Cell], folder: Path, workers: int, until: float = math.inf) -> None:
    """Measures the cells that have no file yet, `workers` at a time, and says how long the rest will take.

    A cell is not begun if it would end after `until`, on the monotonic clock, should it take as long as the longest of
    the latest ones, two for each worker: the first cells of a worker take longer, as they load everything.
    After a cell that fails none is begun either; RuntimeError once those under way are stored.
    """
    missing = deque(cell for cell in cells if not path_of(cell, folder).exists())
    if len(missing) < len(cells):
        print(f"{len(cells) - len(missing)} of {len(cells)} cells are there already")
    began, walls, count = time.monotonic(), list[float](), len(missing)
    running: dict[Future[Any], Cell] = {}
    failed: dict[str, Exception] = {}
    context = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
    with ProcessPoolExecutor(workers, mp_context=context, initializer=share_gpu, initargs=(workers,)) as pool:
        while missing or running:
            longest = max(walls[-2 * workers :], default=0.0)
            while missing and len(running) < workers and time.monotonic() + longest < until:
                cell = missing.popleft()
                running[pool.submit(timed, cell.call, *cell.arguments)] = cell
            if not running:
                print(f"out of time: {len(missing)} cells are not measured")
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    result, cpu_s, wall_s = future.result()
                except Exception as error:
                    failed[cell.name] = error
                    missing.clear()
                    continue
                walls.append(wall_s)
                store(path_of(cell, folder), cell.key | {"result": result, "cpu_s": cpu_s, "wall_s": wall_s})
                left = statistics.fmean(walls) * (len(missing) + len(running) / 2) / workers
                spent = time.monotonic() - began
                print(f"[{len(walls)}/{count}] {cell.name} | {spent:.0f} s, about {left:.0f} s left", flush=True)
    for name, error in failed.items():
        raise RuntimeError(f"cell {name} failed; the others are kept, and the same words go on from there") from error


def path_of(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def share_gpu(workers: int) -> None:
    """In a worker: its part of the GPU's memory, beyond which it gives its own cache back before it asks for more."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(0.9 / workers)


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """What `call` returns, and the CPU seconds that it took, those of the processes that it waited for included, and
    the seconds on the clock."""

    def spent() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    before, began = spent(), time.monotonic()
    result = call(*arguments)
    return result, spent() - before, time.monotonic() - began


def store(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all, so that a stopped run leaves no half of a file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def finished(cells: Sequence[Cell], folder: Path) -> list[dict[str, Any]]:
    """The results of the seeds that are complete, so that all numbers of a table are over the same seeds."""

    def place(cell: Cell) -> tuple[Any, ...]:
        return cell.key["layer"], cell.key.get("seed"), cell.key.get("step")

    incomplete = {place(cell) for cell in cells if not path_of(cell, folder).exists()}
    return [json.loads(path_of(cell, folder).read_text()) for cell in cells if place(cell) not in incomplete]


if __name__ == "__main__":
    main()
