"""Environments written for SkyRL-Gym, unchanged: a class with `init`, `step` and perhaps `close`, by import path.

    [env]
    path = "asyncrl.envs.gym:GymEnv"
    args = { env = "package.module:Class", data = "rows.jsonl", max_turns = 4 }

The class is built as `Class(env_config=..., extras=row)`. `init(prompt)` returns the messages to open with and a dict;
`step(reply)` a dict of `observations` (messages), `reward`, `done` and `metadata`. Rewards of the steps are summed.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from asyncrl.envs.base import Tokenizer, import_object
from asyncrl.envs.chat import Message
from asyncrl.envs.data import Row
from asyncrl.envs.multi_turn import Episode, MultiTurn, field
from asyncrl.threads import Threads


class GymEnv(MultiTurn):
    """Rows of `prompt` (messages) and whatever else the class reads from `extras`, such as `reward_spec`.

    Its calls run in threads, as they may block. `init` must return the same messages for a row each time: beside the
    attempts, every process that has the environment makes each row's once as it starts, for the prompt, and closes it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        env: str,
        data: str | Path,
        env_config: dict[str, Any] | None = None,
        max_turns: int = 4,
        max_context_tokens: int = 1024,
    ) -> None:
        self._class = import_object(env, "env.args.env")
        self._env_config = env_config or {}
        self._threads = Threads()
        super().__init__(tokenizer, data=data, max_turns=max_turns, max_context_tokens=max_context_tokens)

    def opening(self, row: Row) -> list[Message]:
        env = self._make(row)
        try:
            return _init(env, row)
        finally:
            _close(env)

    @asynccontextmanager
    async def episode(self, row: Row) -> AsyncIterator[Episode]:
        env = await self._threads.run(partial(self._make, row))
        try:
            await self._threads.run(partial(_init, env, row))
            yield _GymEpisode(env, self._threads)
        finally:
            await self._threads.run(partial(_close, env))

    def _make(self, row: Row) -> Any:
        return self._class(env_config=self._env_config, extras={"max_turns": self._max_turns, **row})


def _init(env: Any, row: Row) -> list[Message]:
    messages: list[Message] = env.init(list(field(row, "prompt")))[0]
    return messages


def _close(env: Any) -> None:
    if hasattr(env, "close"):
        env.close()


class _GymEpisode:
    def __init__(self, env: Any, threads: Threads) -> None:
        self.metrics: dict[str, float] = {}
        self._env, self._threads, self._reward = env, threads, 0.0

    async def respond(self, reply: str) -> list[Message] | None:
        result = await self._threads.run(partial(self._env.step, reply))
        reward = float(result["reward"])
        if not math.isfinite(reward):
            raise ValueError(f"{type(self._env).__name__}.step returned the reward {reward}; it must be finite")
        self._reward += reward
        messages: list[Message] = result["observations"]
        return None if result["done"] else messages

    async def score(self) -> float:
        return self._reward
