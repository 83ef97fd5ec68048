"""Tokens per second of a rollout actor beside a bare SGLang `Engine` with the same arguments on the same prompts.

    python bench/rollout_actor.py [--shape 0.5b] [--groups 96] [--group-size 16] [--new-tokens 256] [--repeats 4]

The actor's side is the whole path: Ray call, environment, per-token versions and log-probs, group, object store. The
bare side sends the same requests, log-probs included, to an `Engine` of its own in an actor, tokens thrown away. Random
weights, one GPU each or both on one, pairs of runs one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from shapes import PROMPT_TOKENS, SHAPES, RandomPrompts, prompts_of, write_config

from asyncrl.config import loading as configuration
from asyncrl.models.tiny import build_tiny
from asyncrl.runtime.placement import Placement
from asyncrl.runtime.ray_actors import RolloutActor
from asyncrl.runtime.ray_handles import RemoteRollout


class BareActor:
    """SGLang as it comes, with the arguments that the project starts it with."""

    async def start(self, arguments: dict[str, Any]) -> None:
        import sglang

        self.engine = sglang.Engine(**arguments)

    async def run(self, prompts: list[list[int]], new_tokens: int) -> int:
        async def one(prompt: list[int]) -> int:
            reply = await self.engine.async_generate(
                input_ids=prompt, sampling_params={"max_new_tokens": new_tokens}, return_logprob=True
            )
            return len(reply["output_ids"])

        return sum(await asyncio.gather(*(one(prompt) for prompt in prompts)))


async def compare(options: argparse.Namespace) -> dict[str, Any]:
    share = min(torch.cuda.device_count() / 2, 1)  # of a GPU, for each engine
    cuda = share > 0
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(folder, seed=0)  # its tokenizer; the shape's configuration goes over the tiny model's
        (Path(folder) / "model.safetensors").unlink()
        write_config(options.shape, folder)
        vocabulary = SHAPES[options.shape]["vocab_size"]
        words = [
            "rollout.engine=sglang",
            *prompts_of(options.shape),
            f"rollout.group_size={options.group_size}",
            f"rollout.max_new_tokens={options.new_tokens}",
            f"rollout.max_running={options.running}",
            f"rollout.dtype={'bfloat16' if cuda else 'float32'}",
            f"rollout.attention_backend={options.attention_backend}",
            f"rollout.gpu_memory_utilization={0.8 if share == 1 else 0.35}",
            'rollout.engine_args={load_format="dummy"}',
        ]
        config = configuration.load(None, words)
        placement = Placement("cuda" if cuda else "cpu", 0, share, "gloo")
        common: dict[str, Any] = {"num_cpus": 0, "num_gpus": share, "max_concurrency": 1000}
        ours = ray.remote(RolloutActor).options(**common).remote(config, folder, placement, None)
        actor = RemoteRollout("rollout", ours, await ours.start.remote())
        bare = ray.remote(BareActor).options(**common).remote()
        await bare.start.remote(bare_arguments(config, folder, placement))
        return await measure(actor, bare, vocabulary, options)


async def measure(actor: RemoteRollout, bare: Any, vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, list[float]] = {"actor": [], "bare": [], "ratio": []}
    for repeat in range(options.repeats + 1):
        env = RandomPrompts(None, vocabulary)
        prompts = list(itertools.islice(env.prompts("train", repeat), options.groups))
        began = time.perf_counter()
        groups = await asyncio.gather(*(actor.run(prompt) for prompt in prompts))
        ours = sum(sum(group.lengths) for group in groups) / (time.perf_counter() - began)
        requests = [list(prompt.token_ids) for prompt in prompts for _ in range(options.group_size)]
        began = time.perf_counter()
        theirs = await bare.run.remote(requests, options.new_tokens) / (time.perf_counter() - began)
        if repeat:  # the first pair compiles and captures
            for name, value in (("actor", ours), ("bare", theirs), ("ratio", ours / theirs)):
                results[name].append(value)
    return results


def bare_arguments(config: configuration.Config, folder: str, placement: Placement) -> dict[str, Any]:
    from asyncrl.engines.sglang import launch as sglang_launch

    settings = config.rollout
    capability = (9, 0) if placement.device == "cuda" else None
    available = {"flashinfer", "triton", "torch_native"}
    backend = sglang_launch.choose_attention_backend(settings.attention_backend, capability, available)
    return sglang_launch.server_arguments(
        model_path=folder,
        dtype=settings.dtype,
        device=placement.device,
        tensor_parallel_size=1,
        attention_backend=backend,
        max_running=settings.max_running,
        max_length=PROMPT_TOKENS + settings.max_new_tokens,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        seed=config.seed,
        extra=settings.engine_args,
        known=sglang_launch.known_arguments(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--groups", type=int, default=96, help="several times as many replies as run at once")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--running", type=int, default=256, help="requests that run at once")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--attention-backend", default="auto")
    options = parser.parse_args()
    ray.init(include_dashboard=False, object_store_memory=512 * 2**20)
    results = asyncio.run(compare(options))
    ray.shutdown()
    print("| tokens/s | median | min | max |\n|---|---|---|---|")
    for name, values in results.items():
        digits = 3 if name == "ratio" else 0
        print(f"| {name} | " + " | ".join(f"{f(values):.{digits}f}" for f in (statistics.median, min, max)) + " |")
    print(json.dumps(vars(options) | results))


if __name__ == "__main__":
    main()
