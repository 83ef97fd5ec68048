"""What a weight update costs: seconds of exposed pause and bandwidth, idle and with requests in flight.

    python bench/weight_sync.py [--shapes 0.5b 7b] [--bucket-mb 256 1024] [--updates 6] [--out FILE.jsonl]

A learner actor with random float32 weights and an SGLang engine of the same shape, one GPU each, joined by NCCL. Every
update is whole: cast to bfloat16, digest, broadcast, load, digest compared. The pause is what the engine sees, from
`pause` to the end of `resume`. Beside it stands what the same bytes take with nothing around them, in the same run: as
broadcasts of such buckets, back to back on the same transport, and as a copy from one GPU to the other. On a machine
without GPUs it runs on the CPU over gloo, with `--shapes tiny`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from shapes import SHAPES, write_config

from asyncrl.types import Sampling
from asyncrl.weights.broadcast import BroadcastGroup, Rendezvous, open_rendezvous
from asyncrl.weights.buckets import Bucket, make_buckets
from asyncrl.weights.sender import Outgoing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "7b"])
    parser.add_argument("--bucket-mb", nargs="+", type=float, default=[1024.0])
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--requests", type=int, default=128, help="requests in flight")
    parser.add_argument("--seconds", type=float, default=8.0, help="of generation measured with and without updates")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for shape in options.shapes:
        copy_gb_per_s = plain_copy()
        results += asyncio.run(measure(shape, copy_gb_per_s, options))
        print(table(results), flush=True)
    if options.out:
        with options.out.open("a") as file:
            file.writelines(json.dumps(result) + "\n" for result in results)


def plain_copy(num_bytes: int = 1 << 30) -> float | None:
    """GB/s of a copy from one GPU to another; None without two GPUs."""
    if torch.cuda.device_count() < 2:
        return None
    source = torch.ones(num_bytes, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source, device="cuda:1")
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize(0), torch.cuda.synchronize(1)
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(0), torch.cuda.synchronize(1)
        seconds.append(time.perf_counter() - began)
    del source, target
    torch.cuda.empty_cache()
    return num_bytes / min(seconds) / 1e9


class LearnerActor:
    """Random weights of a shape, and the learner's side of an update."""

    def __init__(self, folder: str, device: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        self.named = {
            name: torch.randn(parameter.shape, device=device) * 0.02 for name, parameter in model.named_parameters()
        }
        self.device = device

    def open(self, bucket_mb: float, dtype: str) -> tuple[Rendezvous, list[Bucket]]:
        self.buckets = make_buckets(self.named.items(), dtype, int(bucket_mb * 2**20))
        backend = "nccl" if self.device == "cuda" else "gloo"
        self.where, self.store = open_rendezvous(ray.util.get_node_ip_address(), 2, 120, backend)
        return self.where, self.buckets

    def join(self) -> None:
        self.group = BroadcastGroup(self.where, 0, ray.util.get_node_ip_address(), self.store)

    def prepare(self) -> None:
        self.outgoing = Outgoing(self.buckets, self.named, self.group)

    def send(self) -> str:
        return self.outgoing.send()

    def plain(self) -> float:
        self.join()
        return plain_broadcast(self.group, self.buckets)


class PlainReceiver:
    """The other end of broadcasts with nothing around them."""

    def plain(self, where: Rendezvous, buckets: list[Bucket]) -> float:
        return plain_broadcast(BroadcastGroup(where, 1, ray.util.get_node_ip_address()), buckets)


def plain_broadcast(group: BroadcastGroup, buckets: list[Bucket]) -> float:
    """Seconds of one round of broadcasts, back to back from two buffers; the fastest of six rounds."""
    sizes = [bucket.num_bytes for bucket in buckets]
    buffers = [torch.zeros(max(sizes), dtype=torch.uint8, device=group.device) for _ in range(2)]
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        waits = [group.start(buffers[number % 2][:size]) for number, size in enumerate(sizes)]
        for wait in waits:
            wait()
        seconds.append(time.perf_counter() - began)
    group.leave()
    return min(seconds)


class EngineActor:
    """An SGLang engine kept busy, and its side of an update."""

    async def start(self, folder: str, options: dict[str, Any], dtype: str) -> None:
        from asyncrl.engines.sglang.engine import SGLangEngine

        torch.set_num_threads(1)
        self.vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
        self.engine = await SGLangEngine.start(folder, dtype=dtype, address=ray.util.get_node_ip_address(), **options)
        self.tasks: list[asyncio.Task[None]] = []

    async def join(self, where: Rendezvous) -> None:
        await self.engine.join(where, 1)

    async def load(self, num_requests: int, new_tokens: int) -> None:
        """Keeps this many requests in flight until `unload`."""

        async def client(number: int) -> None:
            rng = np.random.default_rng(number)
            while True:
                prompt = rng.integers(0, self.vocabulary, 32).tolist()
                await self.engine.generate(prompt, Sampling(new_tokens), int(rng.integers(2**60)))

        self.tasks = [asyncio.create_task(client(number)) for number in range(num_requests)]

    async def unload(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks = []

    async def num_tokens(self) -> int:
        return self.engine.num_tokens

    async def update(self, buckets: list[Bucket], version: int) -> dict[str, Any]:
        times = [time.perf_counter()]
        await self.engine.pause()
        times.append(time.perf_counter())
        await self.engine.receive(buckets)
        times.append(time.perf_counter())
        digest = await self.engine.resume(version)
        times.append(time.perf_counter())
        names = ("pause_s", "receive_s", "resume_s")
        parts = {name: times[i + 1] - times[i] for i, name in enumerate(names)}
        return {"digest": digest, "total_s": times[-1] - times[0], **parts}

    async def close(self) -> None:
        await self.engine.close()


async def measure(shape: str, copy_gb_per_s: float | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    cuda = torch.cuda.device_count() >= 2
    dtype, gpus = ("bfloat16", 1) if cuda else ("float32", 0)
    ray.init(include_dashboard=False, object_store_memory=256 * 2**20)
    environment = {"env_vars": {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}}
    with tempfile.TemporaryDirectory() as folder:
        write_config(shape, folder)
        learner_class: Any = ray.remote(num_cpus=0, num_gpus=gpus, runtime_env=environment)(LearnerActor)
        engine_class: Any = ray.remote(num_cpus=0, num_gpus=gpus, runtime_env=environment)(EngineActor)
        learner = learner_class.remote(folder, "cuda" if cuda else "cpu")
        arguments = {
            "device": "cuda" if cuda else "cpu",
            "max_running": options.requests,
            "max_length": 1024,
            "attention_backend": options.attention_backend,
            "engine_args": {"load_format": "dummy"},
        }
        receiver = ray.remote(num_cpus=0, num_gpus=gpus, runtime_env=environment)(PlainReceiver).remote()
        plain = {}
        for bucket_mb in options.bucket_mb:
            where, buckets = await learner.open.remote(bucket_mb, dtype)
            plain[bucket_mb], _ = await asyncio.gather(learner.plain.remote(), receiver.plain.remote(where, buckets))
        ray.kill(receiver)  # its GPU is the engine's now
        engine = engine_class.options(max_concurrency=1000).remote()
        await engine.start.remote(folder, arguments, dtype)
        results = []
        versions = itertools.count(1)
        for bucket_mb in options.bucket_mb:
            results.append(await rounds(learner, engine, versions, dtype, bucket_mb=bucket_mb, options=options))
            results[-1] |= {"shape": shape, "copy_gb_per_s": copy_gb_per_s, "plain_s": plain[bucket_mb]}
        await engine.close.remote()
    ray.shutdown()
    return results


async def rounds(
    learner: Any, engine: Any, versions: Iterator[int], dtype: str, *, bucket_mb: float, options: argparse.Namespace
) -> dict[str, Any]:
    where, buckets = await learner.open.remote(bucket_mb, dtype)
    await asyncio.gather(learner.join.remote(), engine.join.remote(where))

    async def update() -> dict[str, Any]:
        version = next(versions)
        await learner.prepare.remote()
        sent, report = await asyncio.gather(learner.send.remote(), engine.update.remote(buckets, version))
        if sent != report["digest"]:
            raise RuntimeError(f"version {version}: sent {sent}, the engine holds {report['digest']}")
        return report

    async def rate(every_s: float | None) -> tuple[float, list[dict[str, Any]]]:
        """Tokens a second over the window, with an update every so many seconds."""
        before, began, reports = await engine.num_tokens.remote(), time.perf_counter(), []
        while (left := began + options.seconds - time.perf_counter()) > 0:
            if every_s:
                reports.append(await update())
            await asyncio.sleep(min(left, every_s or left))
        return (await engine.num_tokens.remote() - before) / (time.perf_counter() - began), reports

    await update()  # allocations, and the proof that the loader puts every parameter in place
    idle = [await update() for _ in range(options.updates)]
    await engine.load.remote(options.requests, 256)
    await rate(None)
    alone, _ = await rate(None)
    with_updates, busy = await rate(1.0)
    await engine.unload.remote()
    num_bytes = sum(bucket.num_bytes for bucket in buckets)
    return {
        "bucket_mb": bucket_mb,
        "num_bytes": num_bytes,
        "num_buckets": len(buckets),
        "dtype": dtype,
        "idle": idle,
        "busy": busy,
        "tokens_per_s": alone,
        "tokens_per_s_with_updates": with_updates,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | MB | bucket MB | pause idle, ms | pause busy, ms (max) | plain broadcast, ms | share idle | "
        "share busy | plain copy, ms | tok/s alone | tok/s, update each s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        idle, busy = ([report["total_s"] * 1000 for report in result[key]] for key in ("idle", "busy"))
        plain, copy = 1000 * result["plain_s"], result["copy_gb_per_s"]
        copied = f"{result['num_bytes'] / copy / 1e6:.1f}" if copy else "-"
        lines.append(
            f"| {result['shape']} | {result['num_bytes'] / 1e6:.0f} | {result['bucket_mb']:.0f} | "
            f"{statistics.median(idle):.1f} | {statistics.median(busy):.1f} ({max(busy):.1f}) | {plain:.1f} | "
            f"{plain / statistics.median(idle):.2f} | {plain / statistics.median(busy):.2f} | {copied} | "
            f"{result['tokens_per_s']:.0f} | {result['tokens_per_s_with_updates']:.0f} |"
        )
        parts = {
            name: statistics.median(report[name] * 1000 for report in result["busy"])
            for name in ("pause_s", "receive_s", "resume_s")
        }
        lines.append("<!-- " + ", ".join(f"{name[:-2]} {value:.1f} ms" for name, value in parts.items()) + " -->")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
