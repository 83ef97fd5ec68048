"""Tokens per second of the embedded engine beside `generate` of the same model on the same requests.

`generate` runs batches of `--batch` requests in the order they came, each to the longest of its batch; the engine keeps
at most as many running and fills a place when it is free. Only tokens that were asked for count, nothing stops early.
Three workloads tell where a difference comes from: with uniform lengths both run the same number of full batches, so
the ratio is what a leaner step gains; with mixed and with heavy-tailed lengths it also has what continuous batching
gains. The engine returns log-probs as well, `generate` only tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncrl.engines.embedded.engine import EmbeddedEngine
from asyncrl.models.loading import load_model
from asyncrl.models.tiny import build_tiny
from asyncrl.types import Sampling

MAX_LENGTH = 160
Request = tuple[list[int], int]
"""A prompt and the number of new tokens wanted."""


def mixed(num_requests: int, seed: int) -> list[Request]:
    """Prompts of 4 to 16 tokens, 8 to 128 new tokens."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(2, 25, rng.integers(4, 17)).tolist(), int(rng.integers(8, 129))) for _ in range(num_requests)]


def heavy_tailed(num_requests: int, seed: int) -> list[Request]:
    """Prompts of 4 to 16 tokens; log-normal lengths, median 24 and sigma 0.8, cut at 128: what replies look like."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(np.log(24), 0.8, num_requests)), 1, 128)
    return [(rng.integers(2, 25, rng.integers(4, 17)).tolist(), int(length)) for length in lengths]


def uniform(num_requests: int, seed: int) -> list[Request]:
    """Prompts of 10 tokens, 68 new tokens: the means of `mixed`."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(2, 25, 10).tolist(), 68) for _ in range(num_requests)]


def run_generate(model: Any, requests: list[Request], batch: int) -> None:
    """Static batches, padded on the left."""
    for start in range(0, len(requests), batch):
        part = requests[start : start + batch]
        longest = max(len(prompt) for prompt, _ in part)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in part])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in part])
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=max(wanted for _, wanted in part),
        )


def run_engine(model: Any, requests: list[Request], batch: int) -> None:
    """All requests at once; the engine queues what it cannot run."""

    async def main() -> None:
        engine = EmbeddedEngine(model, max_running=batch, max_length=MAX_LENGTH)
        calls = [engine.generate(prompt, Sampling(wanted), seed) for seed, (prompt, wanted) in enumerate(requests)]
        await asyncio.gather(*calls)
        await engine.close()

    asyncio.run(main())


def measure(run: Callable[[Any, list[Request], int], None], model: Any, requests: list[Request], batch: int) -> float:
    """Wanted tokens per second."""
    start = time.perf_counter()
    run(model, requests, batch)
    return sum(wanted for _, wanted in requests) / (time.perf_counter() - start)


def compare(model: Any, make: Callable[[int, int], list[Request]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Pairs of runs on the same requests, `generate` and engine one after the other."""
    generate, engine = [], []
    for repeat in range(arguments.repeats):
        requests = make(arguments.requests, repeat)
        generate.append(measure(run_generate, model, requests, arguments.batch))
        engine.append(measure(run_engine, model, requests, arguments.batch))
    ratios = [ours / theirs for ours, theirs in zip(engine, generate, strict=True)]
    return {"workload": make.__name__, "generate": generate, "engine": engine, "ratio": ratios}


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'lengths':<14}{'tokens/s':<12}{'median':>10}{'min':>10}{'max':>10}"]
    for result in results:
        for name, digits in (("generate", 0), ("engine", 0), ("ratio", 2)):
            values = result[name]
            cells = "".join(f"{f(values):>10.{digits}f}" for f in (statistics.median, min, max))
            lines.append(f"{result['workload']:<14}{name:<12}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs for each workload")
    parser.add_argument("--batch", type=int, default=32, help="requests that run at once")
    parser.add_argument("--requests", type=int, default=256, help="requests in one run")
    parser.add_argument("--out", type=Path, help="file to append one JSON line for each workload to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(folder, seed=0)
        model = load_model(folder, torch.float32, "cpu")
    for run in (run_generate, run_engine):
        measure(run, model, mixed(arguments.batch, 0), arguments.batch)  # Warm up.
    results = [compare(model, make, arguments) for make in (heavy_tailed, mixed, uniform)]
    print(table(results))
    if arguments.out:
        settings = {name: getattr(arguments, name) for name in ("threads", "batch", "requests")}
        with arguments.out.open("a") as file:
            file.writelines(json.dumps(settings | result) + "\n" for result in results)


if __name__ == "__main__":
    main()
