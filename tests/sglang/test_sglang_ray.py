"""The engine in a Ray actor, with the learner in another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import ObjectRef

from asyncrl.types import Completion, Sampling, Version
from asyncrl.weights.broadcast import BroadcastGroup, Rendezvous, open_rendezvous
from asyncrl.weights.buckets import Bucket, make_buckets
from asyncrl.weights.sender import Outgoing


@ray.remote(num_cpus=0)
class LearnerActor:
    def __init__(self, folder: Path) -> None:
        from asyncrl.models.loading import load_model

        torch.set_num_threads(1)
        model = load_model(folder, torch.float32, "cpu")
        generator = torch.Generator().manual_seed(5)
        self.named = {
            name: parameter + torch.randn(parameter.shape, generator=generator) * 0.05
            for name, parameter in model.named_parameters()
        }
        self.buckets = make_buckets(self.named.items(), "float32", 200_000)

    def open(self) -> tuple[Rendezvous, list[Bucket]]:
        self.where, self.store = open_rendezvous("127.0.0.1", 2, 30)
        return self.where, self.buckets

    def join(self) -> None:
        self.group = BroadcastGroup(self.where, 0, "127.0.0.1", self.store)

    def send(self) -> str:
        return Outgoing(self.buckets, self.named, self.group).send()


@ray.remote(num_cpus=0)
class RolloutActor:
    """An async actor: its event loop is not in the process's main thread."""

    async def start(self, folder: Path) -> None:
        from sglang_world import start

        self.engine = await start(folder, max_length=128)

    async def join(self, where: Rendezvous) -> None:
        await self.engine.join(where, 1)

    async def update(self, buckets: list[Bucket], version: Version) -> str:
        await self.engine.pause()
        await self.engine.receive(buckets)
        return await self.engine.resume(version)

    async def generate(self, prompt: list[int]) -> Completion:
        return await self.engine.generate(prompt, Sampling(90), 0)

    async def close(self) -> list[int]:
        await self.engine.close()
        return [process.pid for process in self.engine._calls.processes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from asyncrl.models.tiny import build_tiny

    path = tmp_path_factory.mktemp("tiny")
    build_tiny(path, init_std=0.1, seed=3)
    return path


@pytest.fixture(scope="module", autouse=True)
def cluster():
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": here}})
    yield
    ray.shutdown()


def get(*futures: ObjectRef) -> list[Any]:
    return ray.get(list(futures), timeout=150)


@pytest.mark.timeout(240)
def test_weights_from_another_actor_arrive_bit_by_bit_with_a_request_in_flight(folder):
    learner, rollout = LearnerActor.remote(folder), RolloutActor.remote()
    get(rollout.start.remote(folder))
    [(where, buckets)] = get(learner.open.remote())
    get(rollout.join.remote(where), learner.join.remote())
    calls = [rollout.generate.remote([5, 6, 7 + index]) for index in range(4)]
    digest, sent = get(rollout.update.remote(buckets, 1), learner.send.remote())
    assert digest == sent
    get(*calls)
    [after] = get(rollout.generate.remote([5, 6, 7]))
    assert set(after.versions.tolist()) == {1}
    assert after.digests == {1: sent}
    [ended] = get(rollout.close.remote())
    assert ended
    for pid in ended:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
