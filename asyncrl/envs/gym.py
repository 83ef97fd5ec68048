"""Environments written for SkyRL-Gym, unchanged: a class with `init`, `step` and perhaps `close`, by import path.

    [env]
    path = "asyncrl.envs.gym:GymEnv"
    args = { env = "package.module:Class", data = "rows.jsonl", max_turns = 4 }

`env` may also be an id that SkyRL-Gym registers, such as "gsm8k" or "text2sql". The class is built as
`Class(env_config=..., extras=row)`. `init(prompt)` returns the messages to open with and a dict; `step(reply)`, also
called for a reply that was cut off, a dict of `observations` (messages), `reward`, `done` and `metadata`. Rewards
of the steps are summed. A `postprocessed_action` may be a beginning of the reply: the rest is left out. The numbers in
`get_metrics()` are metrics.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from asyncrl.envs.base import Tokenizer, import_object
from asyncrl.envs.chat import Message
from asyncrl.envs.data import Row
from asyncrl.envs.multi_turn import Episode, MultiTurn, field
from asyncrl.utils.threads import Threads, notice_signals


class GymEnv(MultiTurn):
    """Rows of `prompt` (messages) and whatever else the class reads from `extras`, such as `reward_spec`.

    Its calls run in threads, as they may block. `init` must return the same messages for a row each time: beside the
    attempts, every process that has the environment makes each row's once as it starts, for the prompt, and closes it.
    """

    takes_cut_replies = True

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
        self._build = import_object(env, "env.args.env") if ":" in env else _registered(env)
        self._env_config = _Config(env_config or {})
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
        env = await self._run(partial(self._make, row))
        try:
            await self._run(partial(_init, env, row))
            yield _GymEpisode(env, self._run)
        finally:
            await self._run(partial(_close, env))

    def _make(self, row: Row) -> Any:
        return self._build(env_config=self._env_config, extras={"max_turns": self._max_turns, **row})

    async def _run(self, call: Callable[[], Any]) -> Any:
        """In a thread. Warns of calls that need the main one."""
        refused: list[int] = []
        try:
            return await self._threads.run(partial(notice_signals, call, refused))
        finally:
            if refused:
                warnings.warn(
                    "the class in env.args.env sets a signal handler, as time limits by alarm do, which fails in a "
                    "thread: give it a limit without one (math_verify: parsing_timeout=None, timeout_seconds=None)",
                    stacklevel=2,
                )


class _Config(dict[str, Any]):
    """A table whose entries are attributes, too, as SkyRL-Gym's classes read them."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            if name.startswith("__"):  # of copying and pickling
                raise AttributeError(name)
            raise AttributeError(f"env.args.env_config has no {name!r}, which the environment reads: write it there")
        return _Config(self[name]) if isinstance(self[name], dict) else self[name]


def _registered(name: str) -> Callable[..., Any]:
    """What makes the environment that SkyRL-Gym has under this id. Raises `ValueError` if it has none."""
    try:
        import skyrl_gym
        from skyrl_gym.envs.registration import registry
    except ImportError as error:
        raise ValueError(
            f"env.args.env {name!r} is no 'package.module:Class', and as an id of SkyRL-Gym it needs that package: "
            f"pip install skyrl-gym ({error})"
        ) from error
    if name not in registry:
        raise ValueError(
            f"env.args.env {name!r} is no 'package.module:Class' and no id of SkyRL-Gym, which has "
            f"{', '.join(sorted(registry))}"
        )
    return partial(skyrl_gym.make, name)


def _init(env: Any, row: Row) -> list[Message]:
    messages: list[Message] = env.init(list(field(row, "prompt")))[0]
    return messages


def _close(env: Any) -> None:
    if hasattr(env, "close"):
        env.close()


class _GymEpisode:
    def __init__(self, env: Any, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self.metrics: dict[str, float] = {}
        self.said: str | None = None
        self._env, self._in_thread, self._reward = env, in_thread, 0.0

    async def respond(self, reply: str) -> list[Message] | None:
        result = await self._in_thread(partial(self._env.step, reply))
        self.said = result.get("postprocessed_action")
        reward = float(result["reward"])
        if not math.isfinite(reward):
            raise ValueError(f"{type(self._env).__name__}.step returned the reward {reward}; it must be finite")
        self._reward += reward
        messages: list[Message] = result["observations"]
        return None if result["done"] else messages

    async def score(self) -> float:
        counted = await self._in_thread(self._env.get_metrics) if hasattr(self._env, "get_metrics") else {}
        self.metrics |= {name: float(value) for name, value in counted.items() if isinstance(value, int | float)}
        return self._reward
