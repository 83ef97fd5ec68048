"""Reward functions, named by import path, in the signature that TRL has: `f(prompts, completions, **columns)`.

Every argument is a list with one entry an attempt, and so is what the function returns. Prompts and completions are
texts, or lists of messages where the data set has conversations; `target` is text where the data have a number, and
other columns are as the data have them. An attempt is scored by itself, so lists have length 1. A function
without `**columns` gets what its signature names. One without `async` runs in a thread: generation goes on beside it.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from asyncrl.envs.base import RESERVED, import_object
from asyncrl.imports import line_of
from asyncrl.threads import Threads

Reward: TypeAlias = str | Callable[..., Any]
"""`module:function`, or the function."""

_REST, _REST_BY_NAME = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


class Rewards:
    """One or more reward functions, added up with weights."""

    def __init__(self, given: Reward | Sequence[Reward], weights: Sequence[float] | None, timeout_s: float) -> None:
        """`given`: functions, or where to import them from. A call that takes longer than `timeout_s` is an error; its
        thread goes on, as Python cannot end one."""
        each = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        self._functions = [import_object(one, "env.args.reward") if isinstance(one, str) else one for one in each]
        for name, function in zip(each, self._functions, strict=True):
            if not callable(function):
                raise ValueError(f"env.args.reward {name!r} is {function!r}: name a function")
        self._names = _names(self._functions)
        self._parameters = [inspect.signature(function).parameters for function in self._functions]
        self._weights = [1.0] * len(self._functions) if weights is None else list(weights)
        if len(self._weights) != len(self._functions) or not self._functions:
            raise ValueError(
                f"env.args.weights has {len(self._weights)} entries for {len(self._functions)} reward functions: give "
                "each function of env.args.reward one weight"
            )
        self._timeout_s = timeout_s
        self._threads = Threads()

    async def score(
        self, prompt: Any, completion: str, token_ids: Sequence[int], columns: Mapping[str, Any]
    ) -> tuple[float, dict[str, float]]:
        """The weighted sum, and each function's own reward by its name if there are several.

        As in TRL, a function that returns None for an attempt takes no part in it. Raises `ValueError` for a reward
        that is no finite number, a column that is not there or a function that raises, and `TimeoutError` for a call
        that takes too long.
        """
        reply: Any = completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
        arguments = {name: [value] for name, value in columns.items()} | {
            "prompts": [prompt],
            "completions": [reply],
            "completion_ids": [list(token_ids)],
        }
        each: dict[str, float] = {}
        weighted = []
        for name, weight, function, parameters in zip(
            self._names, self._weights, self._functions, self._parameters, strict=True
        ):
            taken = _taken(name, parameters, arguments)
            value = _single(name, await self._call(name, function, taken))
            if value is not None:
                each[name] = value
                weighted.append(weight * value)
        if not each:
            raise ValueError(f"every reward function ({', '.join(self._names)}) said None: one must give a number")
        total = math.fsum(weighted)  # 0.7 + 0.2 + 0.1 is below 1 otherwise, and what is all right would not pass
        return total, each if len(self._functions) > 1 else {}

    async def _call(self, name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        def call() -> Any:
            with _told(name):
                return function(**arguments)

        try:
            if not inspect.iscoroutinefunction(function):
                return await self._threads.run(call, self._timeout_s)
            async with asyncio.timeout(self._timeout_s):
                with _told(name):
                    return await function(**arguments)
        except TimeoutError as error:
            raise TimeoutError(
                f"reward function {name!r} took longer than {self._timeout_s:g} s; env.args.timeout_s bounds it"
            ) from error


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


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the user's code raises, a `TimeoutError` of its own too, becomes a `ValueError` that says where."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"reward function {name!r} raised {error!r}{line_of(error)}") from error


def exact_match(prompts: list[Any], completions: list[Any], target: list[Any], **_columns: Any) -> list[float]:
    """1 for a completion that is the target, apart from space around it."""
    del prompts
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(text.strip() == str(wanted).strip()) for text, wanted in zip(texts, target, strict=True)]


def _taken(name: str, parameters: Mapping[str, inspect.Parameter], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function with these parameters is called with."""
    named = {key: one for key, one in parameters.items() if one.kind not in (_REST, _REST_BY_NAME)}
    missing = [key for key, one in named.items() if one.default is one.empty and key not in arguments]
    if missing:
        raise ValueError(
            f"reward function {name!r} takes {missing[0]!r}, which is no column of the data (there are "
            f"{', '.join(sorted(arguments))}); for 'target' name the column of right answers in env.args.target"
        )
    if any(one.kind is _REST_BY_NAME for one in parameters.values()):
        return arguments
    return {key: arguments[key] for key in named if key in arguments}


def _single(name: str, returned: Any) -> float | None:
    """The one reward in what a function returned."""
    rule = f"reward function {name!r} must return a list with one finite number for each completion"
    try:
        (value,) = returned
    except (TypeError, ValueError) as error:
        raise ValueError(f"{rule}, got {returned!r} for one completion") from error
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{rule}, got {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{rule}, got {value!r}")
    return number
