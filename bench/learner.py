"""The learner alone, on made-up groups: tokens a second, MFU and memory, by model shape and setting.

    python bench/learner.py [--shape tiny|135m|0.5b ...] [--steps 3] [--groups 16] [--group-size 8] [--prompt 128]
                            [--new 896] [--ranks 1 2 ...] [--profile ROWS] [section.key=value ...]
                            [-- section.key=value ... -- ...]

Each run of words after `--` is one more row of the table, on the same groups and initial weights; with none, the
defaults of the device are compared: on a GPU attention, precision of the head, compiled layers, chunks of the head. The
first steps warm up (and compile) and do not count; the median of the others does. Completions are between half of
`--new` and all of it.
`--ranks` gives numbers of learner ranks to compare, each rank a process with a GPU of its own, or with
`learner.num_threads` threads; memory is the first rank's. `--profile` prints where one more step spent its time, so
many operations or kernels; of several ranks, the first one's.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
from shapes import SHAPES, build

from asyncrl.config import cores
from asyncrl.config import loading as configuration
from asyncrl.config.schema import Config
from asyncrl.models.loading import empty_model, load_model
from asyncrl.training.learner import Learner
from asyncrl.training.sharding import Ranks, join_ranks
from asyncrl.types import Trajectory
from asyncrl.weights.broadcast import Rendezvous, open_rendezvous

WARMUP = 2
CPU_ROWS: list[list[str]] = [[]]
GPU_ROWS = [
    ["learner.attention=sdpa"],
    [],
    ["learner.head_dtype=float32"],
    ["learner.compile=true"],
    ["learner.compile=true", "learner.head_chunk=8192"],
]

Groups: TypeAlias = list[list[Trajectory]]


def make_groups(options: argparse.Namespace, vocabulary: int) -> Groups:
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(options.groups):
        prompt = rng.integers(2, vocabulary, options.prompt)
        group = []
        for number in range(options.group_size):
            num_new = int(rng.integers(max(1, options.new // 2), options.new + 1))
            ids = np.concatenate([prompt, rng.integers(2, vocabulary, num_new)]).astype(np.int32)
            mask = np.arange(len(ids)) >= options.prompt
            # Near the log-prob of a random model, so that no mask of the loss removes everything.
            logprobs = np.where(mask, -np.log(vocabulary), 0).astype(np.float32)
            versions = np.zeros(len(ids), np.int32)
            group.append(Trajectory(ids, mask, logprobs, versions, float(number % 2), "stop"))
        groups.append(group)
    return groups


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(config: Config, folder: str, groups: Groups, options: argparse.Namespace, ranks: Ranks) -> dict[str, float]:
    """The figures of a row, at the first rank; nothing elsewhere."""
    torch.set_num_threads(cores.here(config).learner)
    device = device_here()
    longest = max(len(item.token_ids) for group in groups for item in group)
    where = device if ranks.num_ranks == 1 else "cpu"  # a model that is split comes from host memory
    model = load_model(folder, torch.float32, where) if ranks.is_first else empty_model(folder)
    learner = Learner(config, model, max(config.learner.row_tokens, longest), ranks=ranks)
    times, rows = [], []
    for _ in range(WARMUP + options.steps):
        began = time.perf_counter()
        rows.append(learner.step(groups))
        times.append(time.perf_counter() - began)
    if options.profile:
        told = profiled(lambda: learner.step(groups), device, options.profile)
        print(told if ranks.is_first else "", file=sys.stderr, flush=True)
    if not ranks.is_first:
        return {}
    seconds = statistics.median(times[WARMUP:])
    counted = rows[WARMUP:]
    return {
        "step_s": seconds,
        "first_s": times[0],
        "tokens_per_s": sum(len(item.token_ids) for group in groups for item in group) / seconds,
        "mfu": statistics.median(row["learner/mfu"] for row in counted),
        "row_fill": counted[-1]["learner/row_fill"],
        "memory_gib": max(row["learner/memory_gib"] for row in rows),
        "gradient_norm": rows[0]["gradient/norm"],
    }


def measure_on_ranks(num_ranks: int, *arguments: Any) -> dict[str, float]:
    """The same of several ranks, each in a process of its own."""
    where, store = open_rendezvous("127.0.0.1", num_ranks, 600)
    answers = []
    with ExitStack() as stack:
        for rank in range(num_ranks):
            with only_gpu(rank):
                pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
                answers.append(stack.enter_context(pool).submit(at_rank, where, rank, arguments))
        first, *_ = [answer.result() for answer in answers]
    del store  # the ranks met at it
    return first


@contextmanager
def only_gpu(rank: int) -> Iterator[None]:
    """Processes that are started meanwhile see one GPU. They could not see to it themselves: imports count the GPUs."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = before.split(",")[rank] if before else str(rank)
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def at_rank(where: Rendezvous, rank: int, arguments: tuple[Any, ...]) -> dict[str, float]:
    ranks = join_ranks(where, rank, device_here())
    try:
        return measure(*arguments, ranks)
    finally:
        torch.distributed.destroy_process_group()


def profiled(work: Callable[[], Any], device: str, rows: int) -> str:
    """The operations (on a GPU: the kernels) that took the most time of their own."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds[-1:] if device == "cuda" else kinds[:1]) as profile:
        work()
    averages = profile.key_averages()
    return str(averages.table(sort_by=f"self_{device}_time_total", row_limit=rows, max_name_column_width=90))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="section.key=value", help="of every row")
    parser.add_argument("--shape", nargs="+", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=896)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS")
    own, *others = _split(sys.argv[1:])
    options = parser.parse_intermixed_args(own)
    device = device_here()
    shapes = options.shape or (["135m", "0.5b"] if device == "cuda" else ["tiny"])
    common = ["learner.row_tokens=2048", "learner.micro_batch_tokens=16384", *options.words]
    print(
        "| shape | ranks | setting | step, s | first step, s | tokens/s | MFU | row fill | memory, GiB "
        "| first gradient norm |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        groups = make_groups(options, SHAPES[shape]["vocab_size"])
        with tempfile.TemporaryDirectory() as folder:
            build(shape, folder)
            for words, num_ranks in product(others or (GPU_ROWS if device == "cuda" else CPU_ROWS), options.ranks):
                config = configuration.load(None, [*common, *words])
                what = config, folder, groups, options
                result = measure_on_ranks(num_ranks, *what) if num_ranks > 1 else measure(*what, Ranks())
                numbers = " | ".join(f"{value:.4g}" for value in result.values())
                print(f"| {shape} | {num_ranks} | {' '.join(words)} | {numbers} |", flush=True)
                record = {"shape": shape, "ranks": num_ranks, "words": words, **result}
                print(json.dumps(record), file=sys.stderr, flush=True)
                gc.collect()
                torch.cuda.empty_cache()


def _split(words: list[str]) -> list[list[str]]:
    runs: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            runs.append([])
        else:
            runs[-1].append(word)
    return runs


if __name__ == "__main__":
    main()
