"""What engine tests share: an engine, its learner, two sets of weights, and an event loop for all of them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asyncrl.models.loading import load_model, load_tokenizer
from asyncrl.models.tiny import build_tiny
from asyncrl.types import Sampling
from asyncrl.weights.buckets import LORA_A, LORA_B

Run = Callable[..., Any]


@dataclass
class World:
    """The shared engine, its learner, and two sets of weights as Hugging Face models."""

    folder: Path
    engine: Any
    learner: Any
    old: Any
    new: Any

    async def reset(self, on_update: str = "keep") -> None:
        """Makes the old weights live as version 0, in a fresh group, whatever was left behind."""
        await self.learner.meet(self.engine)
        self.engine.on_update = on_update
        await self.learner.update(0, dict(self.old.named_parameters()), self.engine)

    async def publish_new(self, version: int) -> str:
        return await self.learner.update(version, dict(self.new.named_parameters()), self.engine)

    async def started(self) -> None:
        """Returns when requests sent before have made a few tokens."""
        await self.engine.generate([5, 6], Sampling(7), 99)


@dataclass
class AdapterWorld(World):
    """A world whose updates are adapters alone: `old` is the base, `new` the base with them merged."""

    adapters: dict[str, torch.Tensor]

    async def reset(self, on_update: str = "keep") -> None:
        await self.learner.meet(self.engine)
        self.engine.on_update = on_update
        idle = {name: tensor * (0.0 if name.endswith(LORA_B) else 1.0) for name, tensor in self.adapters.items()}
        await self.learner.update(0, idle, self.engine)

    async def publish_new(self, version: int) -> str:
        return await self.learner.update(version, self.adapters, self.engine)


def adapted(world: World, engine: Any, targets: tuple[str, ...]) -> AdapterWorld:
    """The same base on another engine, with random adapters of rank 4 on the layers of these names."""
    adapters, new = {}, copy.deepcopy(world.old)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in new.named_parameters():
        stem = name.removesuffix(".weight")
        if stem.endswith(targets):
            rows, columns = parameter.shape
            # Products of about 0.08, as far from the base as `two_models` goes: larger logits have larger rounding.
            a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in ((4, columns), (rows, 4)))
            adapters |= {stem + LORA_A: a, stem + LORA_B: b}
            parameter.data += b @ a
    return AdapterWorld(world.folder, engine, world.learner, world.old, new, adapters)


def runner_of(runner: asyncio.Runner) -> Run:
    """Runs coroutines with a time limit. An engine belongs to one event loop, so all tests share it."""

    def bounded(coroutine: Coroutine[Any, Any, Any], seconds: float = 60) -> Any:
        async def body() -> Any:
            try:
                async with asyncio.timeout(seconds):
                    return await coroutine
            finally:
                # A test that failed may have left requests, which would take places from the next one's.
                for task in asyncio.all_tasks():
                    if getattr(task.get_coro(), "__qualname__", "") == "SGLangEngine.generate":
                        task.cancel()

        return runner.run(body())

    return bounded


def two_models(folder: Path, dtype: torch.dtype = torch.float32, **shape: int) -> tuple[Any, Any]:
    """A tiny model written to `folder`, and the same after a made-up update; float32, with values that `dtype` has."""
    build_tiny(folder, init_std=0.1, seed=3, **shape)
    old = load_model(folder, torch.float32, "cpu")
    new = copy.deepcopy(old)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for parameter in [*old.parameters(), *new.parameters()]:
            parameter.copy_(parameter.to(dtype).float())
    return old, new


async def start(folder: Path, **options: Any) -> Any:
    """An engine on the model in `folder`."""
    from asyncrl.engines.sglang.engine import SGLangEngine

    settings = {"dtype": "float32", "device": "cpu", "max_running": 8} | options
    return await SGLangEngine.start(str(folder), decode=load_tokenizer(folder).decode, **settings)
