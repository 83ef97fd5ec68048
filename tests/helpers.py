"""Small things that several test files need."""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from asyncrl.envs.digits import SortDigits
from asyncrl.types import Trajectory

Result = TypeVar("Result")


def run(coroutine: Coroutine[Any, Any, Result], seconds: float = 60) -> Result:
    """Runs it to its end, or fails after `seconds`."""

    async def bounded() -> Result:
        async with asyncio.timeout(seconds):
            return await coroutine

    return asyncio.run(bounded())


class Sevens(SortDigits):
    """A task on which random weights already score: the share of sevens in the reply."""

    async def play(self, prompt, generate):
        attempt = await super().play(prompt, generate)
        seven = self.encode("7")[0]
        return replace(attempt, reward=float((attempt.token_ids[attempt.mask] == seven).mean()))


def trajectory(num_prompt: int, num_new: int, *, seed: int, reward: float = 0.0, version: int = 0) -> Trajectory:
    """Random tokens of the tiny model's vocabulary, with made-up log-probs."""
    rng = np.random.default_rng(seed)
    length = num_prompt + num_new
    mask = np.arange(length) >= num_prompt
    return Trajectory(
        token_ids=rng.integers(2, 25, length).astype(np.int32),
        mask=mask,
        logprobs=np.where(mask, -rng.uniform(0.5, 4, length), 0).astype(np.float32),
        versions=np.where(mask, version, 0).astype(np.int32),
        reward=reward,
        finish="stop",
    )
