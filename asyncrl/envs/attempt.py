"""What an environment can do wrong in one attempt, each under a name of its own: too slow, raising, garbage, starved.

A fault fails the attempt: it is counted by kind and made again. It never becomes a silent reward of 0.
"""

from __future__ import annotations

import asyncio
import math
import operator
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from asyncrl.envs.base import RESERVED, Env, Generate
from asyncrl.envs.sandbox import Starved, waiting
from asyncrl.types import UNSCORED, Completion, Failure, Prompt, Trajectory
from asyncrl.utils.importing import line_of
from asyncrl.utils.quote import quote


class EnvFault(RuntimeError):
    """An attempt that the environment spoilt. `kind` is the name that it is counted under."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)  # both, so that it survives pickling
        self.kind = kind
        self._text = text
        self.failures: tuple[Failure, ...] = ()
        """Where a group came to nothing: those of all its attempts, this one among them."""

    def __str__(self) -> str:
        return self._text


_HELD_S = 0.01
"""From here on a step of an environment holds its thread; shorter ones are its work, or other threads' turns in it."""


@dataclass(slots=True)
class Held:
    """Seconds for which environments held the thread, and with it all other attempts and an embedded engine.

    Seen is what `play` itself does, not the tasks that it starts.
    """

    seconds: float = 0.0


class Patience:
    """A time limit that stands still while the model generates: a long queue is no fault of the environment."""

    def __init__(self, timeout_s: float, held: Held | None = None) -> None:
        """`held`: what the time is added to for which this attempt holds the thread."""
        self.timeout_s = timeout_s
        self.held = held or Held()
        self._left_s = timeout_s
        self._pauses = 0
        self._limit: asyncio.Timeout | None = None
        self.engine_error: BaseException | None = None

    def start(self, limit: asyncio.Timeout) -> None:
        """The attempt begins, within `limit`."""
        self._limit = limit
        self._go_on()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model generates; an error in here is the engine's own."""
        with self.paused():
            try:
                yield
            except Exception as error:
                self.engine_error = error
                raise

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The attempt waits for others: for the model, or for other attempts' programs."""
        self._pauses += 1
        if self._pauses == 1 and self._limit is not None:
            self._left_s = max(0.0, (self._limit.when() or 0.0) - asyncio.get_running_loop().time())
            self._limit.reschedule(None)
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses and self._limit is not None and not self._limit.expired():
                self._go_on()

    def _go_on(self) -> None:
        assert self._limit is not None
        self._limit.reschedule(asyncio.get_running_loop().time() + self._left_s)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a run takes of an environment; None where it is not known."""

    vocabulary: int | None = None
    """Token ids are below it."""
    length: int | None = None
    """Tokens of a trajectory that the learner has room for."""


UNBOUNDED = Bounds()
_MAX_REWARD = 1e16
"""In magnitude. Advantages are computed in float32, where the squares of larger ones overflow."""


async def attempt(
    env: Env, prompt: Prompt, generate: Generate, patience: Patience, bounds: Bounds = UNBOUNDED
) -> Trajectory:
    """One attempt, its reward a finite float or `UNSCORED`. Raises `EnvFault`, or what the engine raised."""
    num_sampled = 0
    versions = set[int]()

    async def counted(token_ids: Sequence[int]) -> Completion:
        nonlocal num_sampled
        _check_context(token_ids, env.max_prompt_tokens, bounds.vocabulary)
        completion = await generate(token_ids)
        num_sampled += len(completion.token_ids)
        versions.update(completion.versions.tolist())
        return completion

    before = waiting.set(patience.paused)
    try:
        async with asyncio.timeout(None) as limit:
            patience.start(limit)
            trajectory = await _watched(_played(env, prompt, counted), patience.held)
    except TimeoutError as error:
        if not limit.expired():
            raise _fault("exception", env, prompt, f"raised {quote(error, 400)}{line_of(error)},") from error
        text = f"took more than {patience.timeout_s:g} s beside generation (env.timeout_s)"
        raise _fault("timeout", env, prompt, text) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Of a task of the environment's own. Let through, it would end whoever waits for this attempt without a word.
        raise _fault("exception", env, prompt, f"raised {quote(error, 400)}{line_of(error)},") from error
    except (Exception, SystemExit) as error:  # graders are scripts, too
        if error is patience.engine_error:
            raise
        kind = "starved" if isinstance(error, Starved) else "exception"
        raise _fault(kind, env, prompt, f"raised {quote(error, 400)}{line_of(error)},") from error
    finally:
        waiting.reset(before)
    checked = _checked(trajectory, env, prompt)
    if (num_trained := int(trajectory.mask.sum())) > num_sampled:
        text = f"trains {num_trained} tokens and {num_sampled} were sampled (the mask is True for sampled tokens alone)"
        raise _fault("garbage", env, prompt, text)
    if (problem := next(_wrong_columns(checked, bounds, versions), None)) is not None:
        raise _fault("garbage", env, prompt, problem)
    return checked


async def score_together(
    env: Env, prompt: Prompt, attempts: Sequence[Trajectory], timeout_s: float
) -> list[Trajectory]:
    """The attempts at a prompt as the environment scores them together, where it does (`Env.score_group`); as they are
    elsewhere. Raises `EnvFault`."""
    score: Callable[..., Awaitable[Sequence[Trajectory]]] | None = getattr(env, "score_group", None)
    if score is None:
        return list(attempts)
    try:
        async with asyncio.timeout(timeout_s) as limit:
            scored = list(await score(prompt, attempts))
    except (Exception, SystemExit) as error:
        if isinstance(error, TimeoutError) and limit.expired():
            text = f"took more than {timeout_s:g} s to score attempts together (env.timeout_s)"
            raise _fault("timeout", env, prompt, text) from error
        text = f"raised {quote(error, 400)}{line_of(error)} when it scored attempts together,"
        raise _fault("exception", env, prompt, text) from error
    if len(scored) != len(attempts):
        text = f"scored {len(scored)} attempts together, of {len(attempts)}"
        raise _fault("garbage", env, prompt, text)
    return [_checked(one, env, prompt) for one in scored]


def _checked(trajectory: Any, env: Env, prompt: Prompt) -> Trajectory:
    """Raises `EnvFault` unless it is a trajectory whose reward and metrics can be used."""
    if not isinstance(trajectory, Trajectory):
        raise _fault("garbage", env, prompt, f"gave a {type(trajectory).__name__}, not a Trajectory")
    if (problem := next(_wrong_numbers(trajectory), None)) is not None:
        raise _fault("garbage", env, prompt, problem)
    return trajectory if trajectory.reward is UNSCORED else replace(trajectory, reward=float(trajectory.reward))


def _wrong_columns(trajectory: Trajectory, bounds: Bounds, versions: Set[int]) -> Iterator[str]:
    """What the learner could not train on; `versions` are those that the attempt's tokens were sampled by."""
    length, low, high = len(trajectory.token_ids), trajectory.token_ids.min(), trajectory.token_ids.max()
    if bounds.length is not None and length > bounds.length:
        yield (
            f"gave a trajectory of {length} tokens and a row of the learner has {bounds.length}: raise "
            "learner.row_tokens, or max_prompt_tokens of the environment (env.args.max_context_tokens in a MultiTurn)"
        )
    if low < 0 or (bounds.vocabulary is not None and high >= bounds.vocabulary):
        wrong = low if low < 0 else high
        most = "" if bounds.vocabulary is None else f" (the model's are 0 to {bounds.vocabulary - 1})"
        yield f"gave the token id {wrong}, which the model does not have{most}"
    logprobs = trajectory.logprobs[trajectory.mask]
    if not (finite := np.isfinite(logprobs)).all():
        yield f"gave the log-probability {logprobs[~finite][0]} for a sampled token: keep those of the completion"
    if unknown := set(trajectory.versions[trajectory.mask].tolist()) - versions:
        yield f"gave the version {min(unknown)} for a sampled token: keep those of the completion"


def _wrong_numbers(trajectory: Trajectory) -> Iterator[str]:
    """The reward or a metric that is none. Stop at the first: each check takes for granted that those before passed."""
    if not isinstance(trajectory.metrics, Mapping):
        yield f"gave metrics of {type(trajectory.metrics).__name__}, not a dict of numbers by name"
        return
    for name in trajectory.metrics:
        if not isinstance(name, str):
            yield f"gave a metric {quote(name)}, whose name is no text: write {quote(str(name))};"
        elif name in RESERVED:
            yield f"gave a metric {quote(name)}, which the run itself counts: give it another name;"
    for name, value in [("reward", trajectory.reward), *trajectory.metrics.items()]:
        if value is UNSCORED and name == "reward":
            continue
        if not isinstance(value, Real) or not _is_finite(value):
            yield f"gave {name} {_said(value)}, not a finite number"
    if trajectory.reward is not UNSCORED and abs(trajectory.reward) > _MAX_REWARD:
        yield f"gave the reward {trajectory.reward:g}, above {_MAX_REWARD:g} in magnitude: scale it"


def _said(value: object) -> str:
    """A value in few characters; Python refuses to write long integers."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"of {value.bit_length()} bits"
    return quote(value)


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _check_context(token_ids: Sequence[int], most: int, vocabulary: int | None) -> None:
    """Raises, in the environment's own call, for a context that no engine could take; its first token tells the kind of
    all. `vocabulary`: token ids are below it."""
    try:
        operator.index(token_ids[0])
    except (TypeError, IndexError, KeyError) as error:
        raise TypeError(
            f"generate takes the token ids of the context, a list of at least one integer, got {quote(token_ids)} "
            f"({type(token_ids).__name__}): tokenizer.encode(text, add_special_tokens=False) makes a list of a text"
        ) from error
    if len(token_ids) > most:
        raise ValueError(
            f"generate got a context of {len(token_ids)} tokens and max_prompt_tokens of the environment is {most}, "
            "which bounds the context of every turn: raise it (env.args.max_context_tokens in a MultiTurn), or end the "
            "attempt before, with finish 'length'"
        )
    if vocabulary is not None and not 0 <= min(token_ids) <= max(token_ids) < vocabulary:
        wrong = next(token for token in token_ids if not 0 <= token < vocabulary)
        raise ValueError(f"generate got the token id {wrong} and those of the model are 0 to {vocabulary - 1}")


async def _played(env: Env, prompt: Prompt, generate: Generate) -> Trajectory:
    return await env.play(prompt, generate)


@types.coroutine
def _watched(play: Coroutine[Any, Any, Trajectory], held: Held) -> Generator[Any, Any, Trajectory]:
    """Awaits `play`, and counts those of its steps, from one wait to the next, that hold the thread."""
    step: Callable[[Any], Any] = play.send
    given: Any = None
    while True:
        begin = time.perf_counter()
        try:
            waited_for = step(given)
        except StopIteration as end:
            trajectory: Trajectory = end.value
            return trajectory
        finally:
            del given  # of an error, a reference to itself through this frame
            seconds = time.perf_counter() - begin
            held.seconds += seconds if seconds >= _HELD_S else 0.0
        try:
            given = yield waited_for
            step = play.send
        except BaseException as error:
            given, step = error, play.throw


def _fault(kind: str, env: Env, prompt: Prompt, text: str) -> EnvFault:
    return EnvFault(f"env {kind}", f"{type(env).__name__} {text} on prompt {prompt.id}")
