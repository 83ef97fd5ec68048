"""SGLang on real GPUs, one engine for all tests here; skipped, with the reason, where something is missing."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")  # as SGLang sets it: members of a group must agree
os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "false")  # engines share GPUs here
sys.path.insert(0, str(Path(__file__).parent.parent / "sglang"))

from sglang_learner import Learner
from sglang_world import Run, World, runner_of, start, two_models

collect_ignore = (
    [] if importlib.util.find_spec("sglang.srt") or not torch.cuda.is_available() else ["test_gpu_engine.py"]
)

# Head size 64, for which SGLang's kernels are made.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 2}


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner_of(runner)


@pytest.fixture(scope="session")
def learner() -> Iterator[Callable[[str], Learner]]:
    """The learner for a transport: on the engine's GPU for IPC, on the next one for NCCL."""
    made: dict[str, Learner] = {}

    def get(backend: str) -> Learner:
        if backend not in made:
            device = {"ipc": "cuda:0", "nccl": "cuda:1", "gloo": "cpu"}[backend]
            made[backend] = Learner(backend, device, "bfloat16")
        return made[backend]

    yield get
    for one in made.values():
        one.close()


@pytest.fixture(scope="session")
def world(run: Run, learner: Callable[[str], Learner], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("tiny")
    old, new = two_models(folder, torch.bfloat16, **SHAPE)
    options = {"max_running": 64, "max_length": 512, "gpu_memory_utilization": 0.3}
    engine = run(start(folder, dtype="bfloat16", device="cuda", release_memory=True, **options), 400)
    made = World(folder, engine, learner("ipc"), old, new)
    run(made.started(), 400)  # compiles kernels
    yield made
    run(engine.close())
