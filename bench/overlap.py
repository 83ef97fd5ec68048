"""How much of the ideal the asynchronous system reaches: its throughput beside generation alone and training alone.

    python bench/overlap.py [CONFIG.toml] [--steps 30] [--skip 5] [--shape 0.5b] [section.key=value ...]

One set of actors does three things in turn. "Generation alone": the run's buffer is filled, and emptied as soon as a
batch is there, as if the learner took no time. "Training alone": the learner steps on groups from there, with no
generation. "System": the loop of a real run, without evaluation. The learning rate is 0, so that all three see replies
of the same lengths; an update still sends all the weights. The ideal is the slower of the two alone: min(generation,
training), in groups per second. Generation alone is measured before and after the system and the faster one counts.

With `--shape` the model is one of that shape with random weights, and prompts are without meaning: every reply then has
`rollout.max_new_tokens` tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import SHAPES, build, prompts_of

from asyncrl.config import loading as configuration
from asyncrl.config.schema import Config
from asyncrl.driver import build as assembly
from asyncrl.driver.buffer import Buffer
from asyncrl.driver.loop import run
from asyncrl.driver.nonfinite_guard import StepGuard
from asyncrl.driver.rollout_pool import RolloutPool
from asyncrl.driver.system import System
from asyncrl.envs.base import load_env
from asyncrl.models.loading import load_tokenizer
from asyncrl.monitor import metrics
from asyncrl.monitor.metrics import Metrics
from asyncrl.recovery.prompt_queue import PromptQueue
from asyncrl.training.warmup import prepare
from asyncrl.types import Group, Version
from asyncrl.utils import settings_text as tables

ROOT = Path(__file__).parent.parent
PAUSE = ("sync/pause_s", "sync/settle_s", "sync/receive_s")
LAPS = ("wait", "step", "sync")
OFF = ["learner.learning_rate=0", "eval.every=0", "eval.num_prompts=1", "checkpoint.every=0"]


async def measure(config: Config, skip: int) -> dict[str, float]:
    """Groups per second of each; the first `skip` batches or steps of each do not count."""
    initial = str(prepare(config, quiet=True))
    env = load_env(config.env.path, load_tokenizer(initial, config.model), config.env.args)
    prompts = PromptQueue(env.prompts("train", config.seed))
    batch, num_batches = config.learner.groups_per_step, config.num_steps + skip
    with tempfile.TemporaryDirectory() as folder:
        async with assembly.load_runtime(config).open_actors(config, initial, None) as (learner, actors):
            pool = RolloutPool(actors, config.rollout.max_attempts)
            await pool.update_weights(learner)
            batches, first_generation = await generate(
                pool, prompts, learner.version, assembly.make_buffer(config), num_batches=num_batches, skip=skip
            )
            training = await train(learner, batches, skip)
            del batches
            first = learner.version
            config = configuration.from_tree(configuration.to_tree(config) | {"num_steps": first + config.num_steps})
            with Metrics(Path(folder), config.num_steps, first_step=first, quiet=True) as sink:
                checkpoints = Path(folder) / "checkpoints"
                buffer = assembly.make_buffer(config)
                guard, last = StepGuard(Path(folder), 0), {config.num_steps}
                watchdog = assembly.make_watchdog(config, Path(folder), learner, pool, print)
                await run(
                    System(
                        config, prompts, [], pool, learner, buffer, sink, checkpoints, guard, watchdog, evaluated=last
                    )
                )
            _, second_generation = await generate(
                pool, prompts, learner.version, assembly.make_buffer(config), num_batches=num_batches, skip=skip
            )
        rows = [row for row in metrics.read(Path(folder)) if "time/total_s" in row][skip:]
    steps_s = [row["time/total_s"] for row in rows]
    system = len(rows) * batch / sum(steps_s)
    idle = {name: sum(row[name] for row in rows) / len(rows) for name in ("rollout/idle", "learner/idle", *PAUSE)}
    generation = max(first_generation, second_generation)
    longest = max(rows, key=lambda row: row["time/total_s"])
    steps = {"median_s": statistics.median(steps_s), "longest_s": longest["time/total_s"]}
    steps |= {f"longest_{name}_s": longest[f"time/{name}_s"] for name in LAPS}
    ratio = system / min(generation, training)
    return {"generation": generation, "training": training, "system": system, "ratio": ratio, **idle, **steps}


async def generate(
    pool: RolloutPool, prompts: PromptQueue, version: Version, buffer: Buffer, *, num_batches: int, skip: int
) -> tuple[list[list[Group]], float]:
    """Batches as the run's buffer hands them out to a learner that takes no time; and groups per second.

    Prompts are admitted a batch at a time, as in a run: SGLang then prefills many at once instead of one after nearly
    every decoding step.
    """

    async def produce() -> None:
        while (ticket := await buffer.admit()) is not None:
            buffer.put(ticket, await pool.run(prompts.issue()[0]))

    batches, times = [], []
    async with asyncio.TaskGroup() as tasks:
        for _ in range(buffer.capacity):
            tasks.create_task(produce())
        for _ in range(num_batches):
            batches.append(await buffer.take(version))
            times.append(time.perf_counter())
            buffer.release()
        buffer.close()
    return batches, (num_batches - skip) * buffer.groups_per_step / (times[-1] - times[skip - 1])


async def train(learner: Any, batches: list[list[Group]], skip: int) -> float:
    for batch in batches[:skip]:
        await step(learner, batch)
    began = time.perf_counter()
    for batch in batches[skip:]:
        await step(learner, batch)
    return sum(map(len, batches[skip:])) / (time.perf_counter() - began)


async def step(learner: Any, batch: list[Group]) -> None:
    await learner.gradient(batch)
    await learner.apply()


def tell(result: dict[str, float]) -> None:
    """Prints the table and where the system's time went."""
    print(
        "| groups/s | generation alone | training alone | ideal | system | system / ideal |\n|---|---|---|---|---|---|"
    )
    ideal = min(result["generation"], result["training"])
    values = (result["generation"], result["training"], ideal, result["system"])
    print(f"| | {' | '.join(f'{value:.1f}' for value in values)} | {result['ratio']:.3f} |")
    pause, settling, receiving = (1000 * result[name] for name in PAUSE)
    print(
        f"in the system: rollout actors idle {result['rollout/idle']:.1%}, learner idle {result['learner/idle']:.1%}, "
        f"generation paused {pause:.1f} ms an update, of which {settling:.1f} until nothing of the old weights ran and "
        f"{receiving:.1f} for the new ones; a step took {result['median_s']:.3f} s, median, and at most "
        f"{result['longest_s']:.3f} s, of which {result['longest_wait_s']:.3f} waiting for groups, "
        f"{result['longest_step_s']:.3f} in the learner and {result['longest_sync_s']:.3f} for weights"
    )


def random_model(shape: str, folder: str) -> list[str]:
    """The words of a run with a model of this shape, which is written to the folder."""
    build(shape, folder)
    return [f"model.path={folder}", *prompts_of(shape), "warmup.num_steps=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml | section.key=value")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--skip", type=int, default=5, help="steps that warm up and do not count")
    parser.add_argument("--shape", choices=SHAPES, help="random weights and prompts in place of the configuration's")
    options = parser.parse_intermixed_args()
    file, words = tables.split(options.words)
    file = file or str(ROOT / "configs" / "largest_digit.toml")
    with tempfile.TemporaryDirectory() as folder:
        made = random_model(options.shape, folder) if options.shape else []
        config = configuration.load(file, [*made, *words, *OFF, f"num_steps={options.steps}"])
        result = asyncio.run(measure(config, options.skip))
    tell(result)
    print(json.dumps({"config": Path(file).stem, "shape": options.shape, "words": words, **result}))


if __name__ == "__main__":
    main()
