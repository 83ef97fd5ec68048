"""How much of the ideal the asynchronous system reaches: its throughput beside generation alone and training alone.

    python bench/overlap.py [CONFIG.toml] [--steps 30] [--skip 5] [section.key=value ...]

One set of actors does three things in turn. "Generation alone": groups are produced and thrown away, with no learner.
"Training alone": the learner steps on groups from there, with no generation. "System": the loop of a real run, without
evaluation. The learning rate is 0, so that all three see replies of the same lengths; an update still sends all the
weights. The ideal is the slower of the two alone: min(generation, training), in groups per second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from asyncrl import config as configuration
from asyncrl import job, metrics
from asyncrl.config import Config
from asyncrl.envs.base import load_env
from asyncrl.guard import StepGuard
from asyncrl.loop import System, run
from asyncrl.metrics import Metrics
from asyncrl.model import load_tokenizer
from asyncrl.pool import RolloutPool
from asyncrl.prompts import PromptQueue
from asyncrl.types import Group
from asyncrl.warmup import prepare

OFF = ["learner.learning_rate=0", "eval.every=0", "eval.num_prompts=1", "checkpoint.every=0"]


async def measure(config: Config, skip: int) -> dict[str, float]:
    """Groups per second of each; the first `skip` batches or steps of each do not count."""
    initial = str(prepare(config, quiet=True))
    env = load_env(config.env.path, load_tokenizer(initial), config.env.args)
    prompts = PromptQueue(env.prompts("train", config.seed))
    batch = config.learner.groups_per_step
    with tempfile.TemporaryDirectory() as folder:
        async with job.load_runtime(config.runtime).open_actors(config, initial, None) as (learner, actors):
            pool = RolloutPool(actors, config.rollout.max_attempts)
            await pool.update_weights(learner)
            groups, generation = await generate(pool, prompts, config, skip)
            training = await train(learner, [groups[i : i + batch] for i in range(0, len(groups), batch)], skip)
            del groups
            first = learner.version
            config = configuration.from_tree(configuration.to_tree(config) | {"num_steps": first + config.num_steps})
            with Metrics(Path(folder), config.num_steps, first_step=first, quiet=True) as sink:
                checkpoints = Path(folder) / "checkpoints"
                buffer = job.make_buffer(config)
                guard, last = StepGuard(Path(folder), 0), {config.num_steps}
                watchdog = job.make_watchdog(config, Path(folder), learner, pool, print)
                await run(
                    System(
                        config, prompts, [], pool, learner, buffer, sink, checkpoints, guard, watchdog, evaluated=last
                    )
                )
        rows = [row for row in metrics.read(Path(folder)) if "time/total_s" in row][skip:]
    system = len(rows) * batch / sum(row["time/total_s"] for row in rows)
    idle = {
        name: sum(row[name] for row in rows) / len(rows) for name in ("rollout/idle", "learner/idle", "sync/pause_s")
    }
    return {"generation": generation, "training": training, "system": system, **idle}


async def generate(pool: RolloutPool, prompts: PromptQueue, config: Config, skip: int) -> tuple[list[Group], float]:
    """As many prompts at once as the buffer would admit; groups, and groups per second."""
    batch = config.learner.groups_per_step
    wanted = (config.num_steps + skip) * batch
    groups: list[Group] = []
    times: list[float] = []

    async def produce() -> None:
        while len(groups) < wanted:
            groups.append(await pool.run(prompts.issue()[0]))
            times.append(time.perf_counter())

    await asyncio.gather(*(produce() for _ in range((config.buffer.max_staleness + 1) * batch)))
    # Those at the end run with ever fewer beside them.
    return groups[:wanted], (wanted - skip * batch) / (times[wanted - 1] - times[skip * batch - 1])


async def train(learner: Any, batches: list[list[Group]], skip: int) -> float:
    for batch in batches[:skip]:
        await learner.step(batch)
    began = time.perf_counter()
    for batch in batches[skip:]:
        await learner.step(batch)
    return sum(map(len, batches[skip:])) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(Path(__file__).parent.parent / "configs/largest_digit.toml"))
    parser.add_argument("words", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--skip", type=int, default=5, help="steps that warm up and do not count")
    options = parser.parse_intermixed_args()
    config = configuration.load(options.config, [*options.words, *OFF, f"num_steps={options.steps}"])
    result = asyncio.run(measure(config, options.skip))
    ideal = min(result["generation"], result["training"])
    print(
        "| groups/s | generation alone | training alone | ideal | system | system / ideal |\n|---|---|---|---|---|---|"
    )
    values = (result["generation"], result["training"], ideal, result["system"])
    print(f"| | {' | '.join(f'{value:.1f}' for value in values)} | {result['system'] / ideal:.3f} |")
    print(
        f"in the system: rollout actors idle {result['rollout/idle']:.1%}, learner idle {result['learner/idle']:.1%}, "
        f"generation paused {1000 * result['sync/pause_s']:.1f} ms an update"
    )
    print(
        json.dumps(
            {"config": Path(options.config).stem, "words": options.words, **result, "ratio": result["system"] / ideal}
        )
    )


if __name__ == "__main__":
    main()
