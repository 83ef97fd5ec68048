"""Real SGLang on a CPU, one engine for all tests here. `requirements.txt` says what has to be installed for it."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator

import pytest
from sglang_world import Run, World, runner_of, start, two_models

# This folder has the name of the package: only a submodule tells whether that is installed.
INSTALLED = importlib.util.find_spec("sglang.srt") is not None
collect_ignore = [] if INSTALLED else [f"test_sglang_{name}.py" for name in ("contract", "engine", "ray")]


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def run(runner: asyncio.Runner) -> Run:
    return runner_of(runner)


@pytest.fixture(scope="session")
def world(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from sglang_learner import Learner

    folder = tmp_path_factory.mktemp("tiny")
    old, new = two_models(folder)
    learner = Learner()
    engine = run(start(folder, max_length=512), 120)
    yield World(folder, engine, learner, old, new)
    run(engine.close())
    learner.close()
