"""What a group costs the driver: CPU time of loop, buffer and Ray hand-over, with simulated rollout actors.

    python bench/driver.py [--actors 1 8 64] [--in-flight 2048] [--groups 4096] [--batch 64] [--latency 8]
                           [--profile FILE]

The driver is the one of a real run: `loop.run` on uvloop with the run's buffer, pool, metrics and timeline, and every
call goes through Ray. Simulated are the ends: a rollout waits (log-normal, mean `--latency` seconds) and hands over a
ready-made group, the learner fetches its batch and does nothing with it. As one Ray process hosts several simulated
rollout actors, the number of actors can exceed what the cores could run.

CPU is of the driver's process, divided by the groups trained after one filling of the buffer, and told apart by thread:
the event loop's; those that Ray's core worker starts, named as Ray names them in the JSON line; and Python's other
threads, which write (TensorBoard's, the journal's fsync). Calls are the exchanges of prompts and groups, by the group;
every step adds one weight update of each actor. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import itertools
import json
import pstats
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import uvloop

from asyncrl.algo.diagnostics import METRICS as DIAGNOSTICS
from asyncrl.config import loading as configuration
from asyncrl.config.schema import Config
from asyncrl.driver import build as assembly
from asyncrl.driver.loop import run
from asyncrl.monitor.metrics import Metrics
from asyncrl.recovery import checkpoint
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.recovery.journal import Journal
from asyncrl.recovery.prompt_queue import PromptQueue
from asyncrl.runtime.batched_calls import Answer, Numbered, Outbox, Tokens, separate
from asyncrl.runtime.ray_handles import RemoteLearner, RemoteRollout
from asyncrl.runtime.rollout_worker import UpdateReport, make_group
from asyncrl.types import Group, Prompt, Trajectory, Version
from asyncrl.weights.broadcast import Audience, Rendezvous

DIGEST = "simulated"


class SimulatedRollouts:
    """A process that stands for several rollout actors: they answer after a while, at no other cost."""

    def __init__(self, group_size: int, num_tokens: int, latency_s: float, seed: int) -> None:
        self._shape = group_size, num_tokens
        self._latency_s = latency_s
        self._rng = np.random.default_rng(seed)
        self._version = 0
        self._began = time.monotonic()
        self._outboxes = defaultdict[int, Outbox](lambda: Outbox(self._play))

    @ray.method(num_returns=2)
    async def exchange(self, actor: int, prompts: Sequence[Numbered]) -> tuple[list[Answer], list[Tokens]]:
        return await self._outboxes[actor].exchange(prompts)

    async def _play(self, prompt: Prompt) -> Group:
        version = self._version
        spread = 0.5
        await asyncio.sleep(self._latency_s * self._rng.lognormal(-(spread**2) / 2, spread))
        trajectories = [trajectory(self._shape[1], version, sample % 2) for sample in range(self._shape[0])]
        return make_group(prompt, trajectories)

    async def join(self, where: Rendezvous, first_rank: int) -> None:
        pass

    async def update_weights(self, _buckets: Sequence[Any], version: Version) -> UpdateReport:
        self._version = version
        now_s = time.monotonic() - self._began
        return UpdateReport(
            digest=DIGEST,
            settle_s=0.0,
            receive_s=0.0,
            pause_s=0.0,
            now_s=now_s,
            busy_s=now_s,
            held_s=0.0,
            num_tokens=0,
        )


CALLS: Counter[str] = Counter()
"""Exchanges of prompts and groups so far."""


class Member:
    """The handle of one simulated rollout actor."""

    def __init__(self, host: Any, number: int) -> None:
        self.join, self.update_weights = host.join, host.update_weights
        self._host, self._number = host, number
        self.exchange = self

    def remote(self, prompts: list[Numbered]) -> Any:
        CALLS["exchange"] += 1
        return self._host.exchange.remote(self._number, prompts)


class SimulatedLearner:
    """Receives every batch, as the learner does, and is done with it."""

    def __init__(self) -> None:
        self._version = 0

    def gradient(self, places: Sequence[tuple[int, int]], *batches: Sequence[Any]) -> None:
        self._num_tokens = sum(int(one.mask.sum()) for group in separate(places, batches) for one in group)

    def apply(self) -> tuple[Version, dict[str, float]]:
        self._version += 1
        # As many metrics as a real step has, and none that raises an alarm.
        return self._version, dict.fromkeys(DIAGNOSTICS, 0.0) | {
            "ess/token": 1.0,
            "policy/advantage_std": 1.0,
            "learner/num_tokens": self._num_tokens,
        }

    def rendezvous(self, world_size: int, _audience: Audience) -> Rendezvous:
        return Rendezvous("nowhere", 0, world_size, "simulated")

    def join(self, _audience: Audience) -> None:
        pass

    def prepare(self, _audience: Audience) -> None:
        pass

    def broadcast(self, _audience: Audience) -> str:
        return DIGEST

    def save(self, root: Path, cursor: Cursor) -> None:
        checkpoint.folder_of(root, cursor.version).mkdir(parents=True)  # the driver looks for it


class CpuClock(Metrics):
    """The run's metrics, which also read the CPU clocks of all threads after every step."""

    def __init__(self, folder: Path, config: Config) -> None:
        super().__init__(folder, config.num_steps, quiet=True, config=config)
        self.readings: list[tuple[float, Counter[str], int]] = []

    def step(self, version: int, row: dict[str, float], max_lag: int) -> None:
        super().step(version, row, max_lag)
        self.readings.append((time.perf_counter(), cpu_by_thread(), CALLS["exchange"]))


def cpu_by_thread() -> Counter[str]:
    """CPU seconds of this process by kind of thread; those of Ray under the names that Ray gave them."""
    python = {thread.native_id: thread.name for thread in threading.enumerate()}
    seconds: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        try:
            name, used = (task / "comm").read_text().strip(), int((task / "schedstat").read_text().split()[0])
        except OSError:  # the thread has ended
            continue
        thread = python.get(int(task.name))
        if thread == threading.main_thread().name:
            kind = "event loop"
        elif thread is None or thread.startswith("ray"):
            kind = f"Ray {name.rstrip('0123456789')}"
        else:
            kind = "writers"
        seconds[kind] += used / 1e9
    return seconds


def trajectory(num_tokens: int, version: Version, reward: float) -> Trajectory:
    """An attempt of which one quarter is prompt."""
    mask = np.arange(num_tokens) >= num_tokens // 4
    return Trajectory(
        token_ids=np.zeros(num_tokens, np.int32),
        mask=mask,
        logprobs=np.zeros(num_tokens, np.float32),
        versions=np.full(num_tokens, version, np.int32),
        reward=reward,
        finish="stop",
        digests={version: DIGEST},
    )


def prompts(num_tokens: int) -> Iterator[Prompt]:
    return (Prompt(number, (1,) * num_tokens, "") for number in itertools.count())


async def measure(num_actors: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of driver CPU a group with so many actors. Ray is running."""
    batch = options.batch
    filling, steps = options.in_flight // batch, options.groups // batch
    words = [f"learner.groups_per_step={batch}", f"buffer.max_staleness={filling - 1}", f"num_steps={filling + steps}"]
    words += [f"rollout.num_actors={num_actors}", "rollout.max_replacements=0", "runtime=cluster"]
    config = configuration.load(None, [*words, "eval.every=0", "checkpoint.every=0"])
    simulated: Any = ray.remote(SimulatedRollouts).options(num_cpus=0, max_concurrency=100_000)
    arguments = (options.group_size, options.tokens, options.latency)
    hosts = [simulated.remote(*arguments, seed) for seed in range(min(options.processes, num_actors))]
    learner: Any = ray.remote(SimulatedLearner).options(num_cpus=0).remote()
    actors = [
        RemoteRollout(f"rollout {n}", Member(hosts[n % len(hosts)], n), {"num_ranks": 1}) for n in range(num_actors)
    ]
    with tempfile.TemporaryDirectory() as name, CpuClock(Path(name), config) as clock:
        folder, buffer = Path(name), assembly.make_buffer(config)
        journal = Journal(folder / "journal.bin", reuse=buffer.reuse, max_lag=buffer.max_lag)
        system = assembly.make_system(
            config,
            folder,
            initial="",
            prompts=PromptQueue(prompts(options.tokens // 4), journal),
            heldout=[],
            learner=RemoteLearner([learner], 0, [], []),
            actors=actors,
            buffer=buffer,
            metrics=clock,
        )
        system.evaluated.add(config.num_steps)  # simulated actors answer no questions
        await run(system)
        journal.close()
    for actor in [*hosts, learner]:
        ray.kill(actor)
    (begin_s, before, calls), (end_s, after, all_calls) = clock.readings[filling - 1], clock.readings[-1]
    groups = steps * batch
    used = {name: 1000 * (total - before[name]) / groups for name, total in after.items()}
    return {
        "actors": num_actors,
        "ms": sum(used.values()),
        "loop_ms": used["event loop"],
        "ray_ms": sum(value for name, value in used.items() if name.startswith("Ray")),
        "writers_ms": used["writers"],
        "groups_per_s": groups / (end_s - begin_s),
        "calls": (all_calls - calls) / groups,
        "threads_ms": {name: round(value, 3) for name, value in sorted(used.items())},
    }


def profiled(work: Any, path: Path) -> Any:
    """Runs `work`, with the event loop's thread under cProfile; the profiler's own cost is in the figures then."""
    profiler = cProfile.Profile(time.thread_time)
    result = profiler.runcall(work)
    profiler.dump_stats(path)
    pstats.Stats(str(path)).sort_stats("tottime").print_stats(25)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 8, 64], help="simulated rollout actors")
    parser.add_argument("--processes", type=int, default=2, help="Ray processes that host them")
    parser.add_argument("--in-flight", type=int, default=2048, help="slots of the buffer, a multiple of --batch")
    parser.add_argument("--groups", type=int, default=4096, help="groups that count, a multiple of --batch")
    parser.add_argument("--batch", type=int, default=64, help="groups of a learner step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a trajectory, prompt included")
    parser.add_argument("--latency", type=float, default=8.0, help="mean seconds of a rollout")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the event loop and print its head")
    options = parser.parse_args()
    if options.in_flight % options.batch or options.groups % options.batch:
        parser.error(f"--in-flight and --groups are multiples of --batch, {options.batch}")
    ray.init(address="local", include_dashboard=False, logging_level="WARNING")

    async def series() -> list[dict[str, Any]]:
        return [await measure(number, options) for number in options.actors]

    def work() -> list[dict[str, Any]]:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(series())

    results = profiled(work, options.profile) if options.profile else work()
    ray.shutdown()
    print("| rollout actors | in flight | driver CPU, ms a group | event loop | Ray | writers | calls | groups/s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in results:
        shares = " | ".join(f"{row[name]:.2f}" for name in ("ms", "loop_ms", "ray_ms", "writers_ms", "calls"))
        print(f"| {row['actors']} | {options.in_flight} | {shares} | {row['groups_per_s']:.0f} |")
    print(json.dumps({"in_flight": options.in_flight, "latency_s": options.latency, "results": results}))


if __name__ == "__main__":
    main()
