"""Real SGLang on a CPU, one engine for all tests here. `requirements.txt` says what has to be installed for it."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncrl.model import build_tiny, load_model
from asyncrl.types import Sampling

# This folder has the name of the package: only a submodule tells whether that is installed.
INSTALLED = importlib.util.find_spec("sglang.srt") is not None
collect_ignore = [] if INSTALLED else [f"test_sglang_{name}.py" for name in ("contract", "engine", "ray")]

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


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def run(runner: asyncio.Runner) -> Run:
    """An engine belongs to one event loop, so all tests share it."""

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


@pytest.fixture(scope="session")
def world(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from sglang_learner import Learner

    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, init_std=0.1, seed=3)
    old = load_model(folder, torch.float32, "cpu")
    new = copy.deepcopy(old)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    learner = Learner()
    engine = run(start(folder, max_length=512), 120)
    yield World(folder, engine, learner, old, new)
    run(engine.close())
    learner.close()


async def start(folder: Path, **options: Any) -> Any:
    """An engine on the model in `folder`."""
    from asyncrl.engine.sglang import SGLangEngine

    settings = {"dtype": "float32", "device": "cpu", "max_running": 8} | options
    return await SGLangEngine.start(str(folder), **settings)
