"""Reward functions, named by import path, in the signature that TRL has: `f(prompts, completions, **columns)`.

Every argument is a list with one entry an attempt, and so is what the function returns; None in it leaves that attempt
to the other functions. Prompts and completions are texts, or lists of messages where the data set has conversations;
`target` is text where the data have a number, and other columns are as the data have them. Beside the columns there
are `completion_ids`, `trainer_state` (its `global_step`), `log_metric` and `log_extra`. A function without `**columns`
gets what its signature names. An attribute `pass_reward` of a function is the reward from which on an attempt passes.

A function that is not asynchronous runs in a thread: generation goes on beside it. One that sets a signal handler, as
time limits by alarm do, cannot do so there: it is moved to processes of its own, for good, and called again.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from asyncrl.envs.base import RESERVED, import_object
from asyncrl.envs.reward_worker import (
    MetricLog,
    RewardFailed,
    RewardProcesses,
    TrainerState,
    call_here,
    import_path,
    log_extra,
)
from asyncrl.types import UNSCORED
from asyncrl.utils.importing import line_of
from asyncrl.utils.quote import quote
from asyncrl.utils.threads import Threads, notice_signals

Reward: TypeAlias = str | Callable[..., Any]
"""`module:function`, or the function."""

Score: TypeAlias = tuple[float, dict[str, float]]
"""Of one attempt: the weighted sum, and metrics."""

_REST, _REST_BY_NAME = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


class _Function:
    """A reward function, and where it runs."""

    def __init__(self, name: str, function: Callable[..., Any], path: str, weight: float, timeout_s: float) -> None:
        self.name, self.weight = name, weight
        self._function, self._path, self._timeout_s = function, path, timeout_s
        called = function if inspect.isroutine(function) else type(function).__call__
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
        self._parameters = inspect.signature(function).parameters
        self._threads, self._in_processes = Threads(), Threads(os.cpu_count())
        self._processes: RewardProcesses | None = None

    async def score(self, arguments: dict[str, Any]) -> tuple[list[float | None], dict[str, float]]:
        """The reward of each attempt, and the metrics that it logged. Raises `ValueError` and `TimeoutError`."""
        num_attempts = len(arguments["completions"])
        arguments = _taken(self.name, self._parameters, arguments | {"log_metric": MetricLog()})
        try:
            returned, log = await self._call(arguments)
        except RewardFailed as error:
            raise ValueError(f"reward function {self.name!r} {error}") from error
        except TimeoutError as error:
            raise TimeoutError(
                f"reward function {self.name!r} took longer than {self._timeout_s:g} s; env.args.timeout_s bounds it"
            ) from error
        logged = log.values if log is not None else {}
        means = {name: sum(values) / len(values) for name, values in logged.items()}
        return _numbers(self.name, returned, num_attempts), means

    async def _call(self, arguments: dict[str, Any]) -> tuple[Any, MetricLog | None]:
        if self._is_async:
            async with asyncio.timeout(self._timeout_s):
                return await _awaited(self._function, arguments)
        if self._processes is None:
            refused: list[int] = []
            call = partial(notice_signals, partial(call_here, self._function, arguments), refused)
            try:
                answer = await self._threads.run(call, self._timeout_s)
            except RewardFailed:
                if not refused:
                    raise
            if not refused:
                return answer
            self._move()
            return await self._call(arguments | {"log_metric": MetricLog()} if "log_metric" in arguments else arguments)
        return await self._in_processes.run(partial(self._processes.call, arguments, self._timeout_s))

    def _move(self) -> None:
        """To processes. Raises `RewardFailed` if the function is nothing that another process can import."""
        path = self._path or import_path(self._function)
        if not path:
            raise RewardFailed(
                "sets a signal handler, as time limits by alarm do, which works in the main thread of a process alone, "
                "and no other process can import it: name it by import path (module:name) in env.args.reward, or "
                "switch its limit off (math_verify: parsing_timeout=None, timeout_seconds=None)"
            )
        self._processes = self._processes or RewardProcesses(path)


class Rewards:
    """One or more reward functions, added up with weights."""

    def __init__(self, given: Reward | Sequence[Reward], weights: Sequence[float] | None, timeout_s: float) -> None:
        """`given`: functions, or where to import them from. A call that takes longer than `timeout_s` is an error; its
        thread goes on, as Python cannot end one."""
        each = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        functions = [import_object(one, "env.args.reward") if isinstance(one, str) else one for one in each]
        for name, function in zip(each, functions, strict=True):
            if not callable(function):
                raise ValueError(f"env.args.reward {name!r} is {quote(function)}: name a function")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions) or not functions:
            raise ValueError(
                f"env.args.weights has {len(weights)} entries for {len(functions)} reward functions: give "
                "each function of env.args.reward one weight"
            )
        paths = [one if isinstance(one, str) else "" for one in each]
        self._functions = [
            _Function(name, function, path, weight, timeout_s)
            for name, function, path, weight in zip(_names(functions), functions, paths, weights, strict=True)
        ]
        mark = getattr(functions[0], "pass_reward", None) if len(functions) == 1 else None
        self.pass_reward = None if mark is None else weights[0] * mark
        """The function's own `pass_reward`, weighted; of several, and by default, None."""

    async def score(
        self,
        prompt: Any,
        completions: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Any],
        step: int = 0,
    ) -> list[Score]:
        """The score of each attempt at a prompt; with several functions each one's reward is a metric by its name.

        As in TRL, a function that returns None for an attempt takes no part in it, and an attempt with None from every
        function has the reward `UNSCORED`. `step` is that of the newest weights. Raises `ValueError` for a reward that
        is no finite number, a column that is not there or a function that raises, and `TimeoutError` for a call that
        takes too long.
        """
        size = len(completions)
        as_text = isinstance(prompt, str)
        replies = completions if as_text else [[{"role": "assistant", "content": one}] for one in completions]
        arguments = {name: [value] * size for name, value in columns.items()} | {
            "prompts": [prompt] * size,
            "completions": list(replies),
            "completion_ids": [list(ids) for ids in token_ids],
            "trainer_state": TrainerState(step),
            "log_extra": log_extra,
        }
        rewards: list[dict[str, float]] = [{} for _ in completions]
        weighted: list[list[float]] = [[] for _ in completions]
        logged: dict[str, float] = {}
        for function in self._functions:
            values, metrics = await function.score(arguments)
            logged |= metrics
            for number, value in enumerate(values):
                if value is not None:
                    rewards[number][function.name] = value
                    weighted[number].append(function.weight * value)
        several = len(self._functions) > 1
        return [
            # fsum, as 0.7 + 0.2 + 0.1 is below 1 otherwise, and what is all right would not pass
            (math.fsum(parts) if parts else UNSCORED, logged | (each if several else {}))
            for parts, each in zip(weighted, rewards, strict=True)
        ]


async def _awaited(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, MetricLog | None]:
    try:
        return await function(**arguments), arguments.get("log_metric")
    except Exception as error:
        raise RewardFailed(f"raised {quote(error, 400)}{line_of(error)}") from error


def _names(functions: Sequence[Callable[..., Any]]) -> list[str]:
    """A name for each, with its module where the run or another one has the short name."""
    short = [getattr(one, "__name__", type(one).__name__) for one in functions]
    names = [
        f"{function.__module__}.{name}" if name in RESERVED or short.count(name) > 1 else name
        for name, function in zip(short, functions, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"env.args.reward names {name!r} more than once: name it once, and raise its weight")
    return names


def exact_match(prompts: list[Any], completions: list[Any], target: list[Any], **_columns: Any) -> list[float]:
    """1 for a completion that is the target, apart from space around it."""
    del prompts
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(text.strip() == str(wanted).strip()) for text, wanted in zip(texts, target, strict=True)]


exact_match.pass_reward = 1.0  # type: ignore[attr-defined]


def _taken(name: str, parameters: Mapping[str, inspect.Parameter], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function with these parameters is called with."""
    named = {key: one for key, one in parameters.items() if one.kind not in (_REST, _REST_BY_NAME)}
    missing = [key for key, one in named.items() if one.default is one.empty and key not in arguments]
    if missing[:1] == ["environments"]:
        raise ValueError(
            f"reward function {name!r} takes 'environments', those of TRL's environment_factory, which has no "
            "counterpart here: write an environment of several turns (asyncrl.envs.multi_turn), which scores itself"
        )
    if missing:
        raise ValueError(
            f"reward function {name!r} takes {missing[0]!r}, which is no column of the data (there are "
            f"{', '.join(sorted(arguments))}); for 'target' name the column of right answers in env.args.target"
        )
    if any(one.kind is _REST_BY_NAME for one in parameters.values()):
        return arguments
    return {key: arguments[key] for key in named if key in arguments}


def _numbers(name: str, returned: Any, size: int) -> list[float | None]:
    """The rewards in what a function returned for `size` attempts."""
    rule = f"reward function {name!r} must return a list with one finite number for each completion"
    try:
        values = list(returned)
    except TypeError as error:
        raise ValueError(f"{rule}, got {quote(returned)}") from error
    if len(values) != size:
        raise ValueError(f"{rule}, got {quote(returned)} for {size} completion{'s' if size > 1 else ''}")
    numbers: list[float | None] = []
    for value in values:
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{rule}, got {quote(value)}") from error
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{rule}, got {quote(value)}")
        numbers.append(number)
    return numbers
