"""The environment protocol: where prompts come from and what an attempt is worth.

An environment is named by import path, `env.path = "asyncrl.envs.digits:LargestDigit"`, and built with the
tokenizer and the table `[env.args]`. There is no registry.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from numbers import Real
from types import SimpleNamespace
from typing import Any, Literal, Protocol, TypeAlias, get_type_hints

import numpy as np

from asyncrl.types import Completion, Prompt, Trajectory
from asyncrl.utils.importing import load_module, told
from asyncrl.utils.quote import quote
from asyncrl.utils.settings_text import check_value, is_plain

Split: TypeAlias = Literal["train", "heldout"]
Generate: TypeAlias = Callable[[Sequence[int]], Awaitable[Completion]]
"""Token ids of the context -> completion, with the sampling settings and seed of the attempt already bound."""


RESERVED = frozenset({"reward", "truncated", "mean_length", "max_length", "mixed_versions"})
"""What the run counts of every attempt; an environment's metrics have other names."""
RESERVED_SOURCES = frozenset(
    {"mean", "std", "zero_variance", "generated", "generated_zero_variance", "accuracy", "low", "high", "pass@1"}
    | {"mean_length", "truncated", "failures", "unscored", "mixed_versions"}
)
"""What the run reports as `reward/NAME` and `eval/NAME`, beside the rewards of each source of prompts."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that environments use."""

    @property
    def eos_token_id(self) -> int:
        """The end token."""

    @property
    def chat_template(self) -> Any:
        """The template that `apply_chat_template` renders; None where the model knows no conversation."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> Any:
        """Token ids of `text`."""

    def apply_chat_template(
        self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool, **options: Any
    ) -> Any:
        """The text of a conversation, ready for the model's turn."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> Any:
        """Text of `token_ids`."""


class Env(Protocol):
    """Prompts and rewards. One instance lives in every rollout actor and one in the driver.

    An environment that leaves rows of its data out counts them in `skipped`, reason -> count, for the run to report.
    """

    max_prompt_tokens: int
    """No prompt is longer, nor a context of a later turn: it sizes the engine's cache and the learner's rows."""

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        """Deterministic: the n-th prompt of a seed has id n and is always the same.

        "train" is endless; "heldout" may end, and then has each of its prompts once.

        It may take a third parameter, `first_id`: the iterator then begins with the prompt of that id, which a resumed
        run asks for. Without it the prompts before are drawn again.
        """

    async def play(self, prompt: Prompt, generate: Generate) -> Trajectory:
        """One scored attempt. An exception is a failed rollout: retried, counted, never a silent zero. The reward
        `asyncrl.types.UNSCORED` leaves the attempt out: its advantage is 0, and the others' go without it.

        What scoring needs is in the prompt's `target`. Its `id` and `source` are the run's, and a mixture gives the
        prompts of its environments new ones: they name no row of the data.
        """

    # An environment may also have
    #     async def score_group(self, prompt: Prompt, attempts: Sequence[Trajectory]) -> Sequence[Trajectory]
    # which gets the attempts of a prompt once all are played, and returns them with rewards that compare them; and
    #     pass_reward: float | None
    # the reward from which on an attempt counts as passed. Without one there are no pass rates.

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """What policies without skill score on these prompts, by name, one at least; printed beside every curve."""


class Teacher(Protocol):
    """An environment that can also show: needed by the supervised warm-up."""

    def demonstrations(self, seed: int) -> Iterator[tuple[list[int], list[int]]]:
        """Endless pairs of prompt and reply token ids, the end token included."""


def load_env(path: str, tokenizer: Tokenizer, args: dict[str, Any], knob: str = "env") -> Env:
    """The environment at `module:Class`. Raises `ValueError` saying which half of the path is wrong, which argument
    the class does not take or has another type for, where it failed, or what the environment lacks. `knob` is the table
    that has `path` and `args`."""
    made: Callable[..., Env] = import_object(path, f"{knob}.path")
    if not callable(made):
        raise ValueError(f"{knob}.path {path!r} is {quote(made)}, which cannot be called: name a class")
    try:
        inspect.signature(made).bind(tokenizer, **args)
    except TypeError as error:
        known = ", ".join(list(inspect.signature(made).parameters)[1:]) or "no arguments"
        raise ValueError(f"{knob}.args does not fit {path}: {error}; it takes {known}") from error
    check_arguments(made, args, f"{knob}.args")
    with told(f"{path}(...)"):
        env = made(tokenizer, **args)
    missing = [name for name in ("max_prompt_tokens", "prompts", "play", "baselines") if not hasattr(env, name)]
    if missing:
        raise ValueError(
            f"{knob}.path {path!r} is no environment: it lacks {', '.join(missing)}, which asyncrl/envs/base.py "
            "explains"
        )
    return env


def check_arguments(function: Callable[..., Any], args: dict[str, Any], knob: str) -> None:
    """Raises `ValueError` for a value that is none of the type that the parameter of its name is annotated with, where
    that is one of values as they are written in a configuration: "False" is a text, and true as such. Callables that
    are neither a function nor a class that is called as classes are go unchecked."""
    called: Any = function
    if isinstance(function, type):
        called = function.__init__ if type(function).__call__ is type.__call__ else None  # type: ignore[misc]
    for name, kind in _annotations(called).items() if inspect.isfunction(called) else ():
        if name in args and is_plain(kind):
            with suppress(TypeError):  # of a union or a literal that msgspec cannot tell apart
                check_value(args[name], kind, f"{knob}.{name}")


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of the parameters; without those whose names are there for type checkers alone."""
    found: dict[str, Any] = {}
    function = inspect.unwrap(function)
    for name, written in getattr(function, "__annotations__", {}).items():
        with suppress(NameError, AttributeError, TypeError, SyntaxError):
            alone = SimpleNamespace(__annotations__={name: written})
            found |= get_type_hints(alone, getattr(function, "__globals__", {}))
    return found


def can_skip(env: Env) -> bool:
    """Whether its prompts can be drawn from a later one on."""
    return "first_id" in inspect.signature(env.prompts).parameters


def prompts_from(env: Env, split: Split, seed: int, first_id: int) -> Iterator[Prompt]:
    """The prompts of the environment from that id on."""
    if not first_id:
        return env.prompts(split, seed)
    if can_skip(env):
        draw: Callable[..., Iterator[Prompt]] = env.prompts
        return draw(split, seed, first_id=first_id)
    return islice(env.prompts(split, seed), first_id, None)


def checked_prompts(
    env: Env, split: Split, seed: int, heldout: Sequence[Prompt] = (), first_id: int = 0
) -> Iterator[Prompt]:
    """The prompts of the environment from that id on, each looked at as it is drawn.

    Raises `ValueError` for one that breaks the protocol, naming it and the rule: what the journal, seeds and resumed
    runs know of a prompt is its id. The first one that is also among the `heldout` is told of in a warning: small tasks
    may want that.
    """
    unseen = {tuple(prompt.token_ids) for prompt in heldout}
    for number, prompt in enumerate(_drawn(env, split, seed, first_id), first_id):
        named = f"prompt {number} of {type(env).__name__}.prompts({split!r})"
        if broken := _broken_rule(prompt, number, env.max_prompt_tokens):
            raise ValueError(f"{named} {broken}")
        if unseen and tuple(prompt.token_ids) in unseen:
            warnings.warn(
                f"{named} is a held-out prompt, too: held-out scores then tell what was learnt by heart; draw the two "
                "splits from different data, for example with asyncrl.envs.base.split_of",
                stacklevel=2,
            )
            unseen = set()
        yield prompt


def _drawn(env: Env, split: Split, seed: int, first_id: int) -> Iterator[Prompt]:
    with told(f"{type(env).__name__}.prompts({split!r})"):
        yield from prompts_from(env, split, seed, first_id)


def _broken_rule(prompt: Prompt, number: int, max_tokens: int) -> str | None:
    if not isinstance(prompt, Prompt):
        return f"is a {type(prompt).__name__}: yield asyncrl.types.Prompt"
    if prompt.id != number:
        return f"has the id {quote(prompt.id)}: ids count the draws from 0, so give it {number}"
    if not 0 < len(prompt.token_ids) <= max_tokens:
        return (
            f"has {len(prompt.token_ids)} tokens, and the environment's max_prompt_tokens is {max_tokens}: raise it, "
            "or leave such prompts out"
        )
    if prompt.source in RESERVED_SOURCES:
        return f"has the source {quote(prompt.source)}, under which the run reports something else: rename it"
    if not isinstance(prompt.target, str):
        return f"has the target {quote(prompt.target)}: a target is text, so write str() or json.dumps() around it"
    return None


def heldout_prompts(env: Env, most: int) -> list[Prompt]:
    """The first `most` held-out prompts, or all if there are fewer. Raises `ValueError` if there is none; warns if most
    of them are repetitions, which intervals would take for independent ones."""
    prompts = list(islice(checked_prompts(env, "heldout", 0), most))
    num_different = len({(tuple(prompt.token_ids), prompt.target) for prompt in prompts})
    if 2 * num_different < len(prompts):
        warnings.warn(
            f"{type(env).__name__}.prompts('heldout') has {num_different} different prompts in {len(prompts)}: "
            "intervals of held-out scores take the repetitions for new evidence; end it after each came once, or set "
            f"eval.num_prompts={num_different}",
            stacklevel=2,
        )
    if not prompts:
        raise ValueError(
            f"{type(env).__name__}.prompts('heldout') gives no prompt, and without one nothing can be evaluated"
        )
    return prompts


def no_skill(env: Env, prompts: Sequence[Prompt]) -> dict[str, float]:
    """What policies without skill score on these prompts. Raises `ValueError` unless it is a finite number or more."""
    with told(f"{type(env).__name__}.baselines()"):
        scores = env.baselines(prompts)
    numbers = scores.values() if isinstance(scores, dict) else ()
    if not numbers or not all(isinstance(score, Real) and math.isfinite(score) for score in numbers):
        raise ValueError(
            f"{type(env).__name__}.baselines() gave {quote(scores)}: it must name what at least one policy without "
            "skill scores, a finite number, for example {'empty reply': 0.0}; eval.baseline=false leaves it out"
        )
    return scores


def pass_mark(env: Env, asked: float | None) -> float | None:
    """The reward from which on an attempt passes: `asked`, or the environment's own; None where there is neither.
    Raises `ValueError` unless the environment's is a finite number."""
    own = getattr(env, "pass_reward", None)
    if own is not None and not (isinstance(own, Real) and math.isfinite(own)):
        raise ValueError(
            f"{type(env).__name__}.pass_reward is {own!r}: it is the reward from which on an attempt passes, a finite "
            "number, or None for no mark"
        )
    return asked if asked is not None or own is None else float(own)


def import_object(path: str, knob: str) -> Any:
    """What `module:name` names. Raises `ValueError` saying which half of the path, the value of `knob`, is wrong."""
    named, form = f"{knob} {quote(path)}", "package.module:Name"
    module, name = load_module(path, named, form)
    if not hasattr(module, name):
        raise ValueError(f"{named}: module {module.__name__!r} has no {name!r}; write {form!r}")
    return getattr(module, name)


def single_turn(prompt: Prompt, completion: Completion, /, reward: float, **metrics: float) -> Trajectory:
    """The trajectory of an attempt that is one prompt and one completion. Metrics may not have the names that the run
    itself counts under (`RESERVED`)."""
    num_prompt, num_new = len(prompt.token_ids), len(completion.token_ids)
    return Trajectory(
        token_ids=np.concatenate([np.array(prompt.token_ids, np.int32), completion.token_ids]),
        mask=np.repeat([False, True], [num_prompt, num_new]),
        logprobs=np.concatenate([np.zeros(num_prompt, np.float32), completion.logprobs]),
        versions=np.concatenate([np.zeros(num_prompt, np.int32), completion.versions]),
        reward=reward,
        finish=completion.finish,
        digests=completion.digests,
        metrics=metrics,
    )


def split_of(text: str) -> Split:
    """Ten per cent of all texts are held out, by hash: the same ones in every run and every process."""
    return "heldout" if hashlib.blake2b(text.encode(), digest_size=2).digest()[0] < 26 else "train"
