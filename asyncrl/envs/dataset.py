"""Any data set as an environment: a column of prompts, other columns for a reward function, one completion a prompt.

    [env]
    path = "asyncrl.envs.dataset:DatasetEnv"
    args = { source = "data/mine.jsonl", prompt = "question", target = "answer", reward = "my_rewards:score" }

The data are read where prompts are drawn, in the driver. A prompt carries its row's columns along, so rollout actors on
other machines need no copy of the files.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date, time
from functools import cache, partial
from typing import Any, Literal, get_args

from asyncrl.envs.base import Generate, Split, Tokenizer, single_turn, split_of
from asyncrl.envs.chat import ChatFormat, Style, check_messages, messages_of
from asyncrl.envs.data import Row, check_columns, read_rows
from asyncrl.envs.examples import Example, Examples
from asyncrl.envs.rewards import Reward, Rewards, Score
from asyncrl.types import UNSCORED, Prompt, Trajectory
from asyncrl.utils.quote import cut, quote

_SPLITS = get_args(Split)
_CALLS_AT_ONCE = 4
"""Of reward functions for the score without skill: fewer than `Threads` has room for, so that nobody waits there."""

_TRIES = 3
"""Calls of the reward functions for one prompt's score without skill."""


class DatasetEnv:
    """Single-turn prompts from a data set, scored by reward functions (`envs.rewards` has their signature)."""

    pass_reward: float | None = None

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str,
        reward: Reward | Sequence[Reward],
        *,
        weights: Sequence[float] | None = None,
        prompt: str = "prompt",
        target: str = "",
        reply: str = "",
        source_column: str = "",
        name: str | None = None,
        train: str = "train",
        heldout: str = "",
        style: Style = "auto",
        system_prompt: str = "",
        num_shots: int = 0,
        max_prompt_tokens: int = 512,
        bad_rows: Literal["error", "skip"] = "error",
        end_required: bool = False,
        score_by: Literal["attempt", "group"] = "attempt",
        timeout_s: float = 30.0,
        template_args: dict[str, Any] | None = None,
    ) -> None:
        """`source`, `name`: as in `envs.data.read_rows`. `prompt`, `target`, `reply`: columns; a prompt is a text or a
        list of messages, `target` also reaches the reward functions under that name, a number as text, since that is
        what completions are; `reply` is a right completion, which worked examples (`num_shots`, the first rows of
        `train`) and the supervised warm-up need. `source_column`: a column, such as a level, by whose values rewards
        are reported and a curriculum may choose. `train`, `heldout`: splits; without `heldout` a tenth of the rows is
        held out by hash, and a row's own `split` ("train" or "heldout") wins over that. A row whose prompt is longer
        than `max_prompt_tokens`, or that cannot be used for another reason, is an error, or skipped and counted in
        `skipped`: before the first prompt, or, of more than `examples.FEW` rows, when it is drawn. `end_required`: a
        completion that ran out of tokens has reward 0. `score_by`: "group" calls a reward function once for all
        attempts at a prompt, for functions that compare them.
        """
        self.max_prompt_tokens = max_prompt_tokens
        self.skipped: Counter[str] = Counter()
        self._refused = set[str]()
        self._score_by = score_by
        self._tokenizer, self._end_required, self._bad_rows = tokenizer, end_required, bad_rows
        self._source, self._name, self._train, self._heldout = source, name, train, heldout
        self._prompt, self._target, self._reply, self._source_column = prompt, target, reply, source_column
        self._rewards = Rewards(reward, weights, timeout_s)
        if self._rewards.pass_reward is not None:
            self.pass_reward = self._rewards.pass_reward
        self._num_shots = num_shots
        self._bare_format = ChatFormat(tokenizer, style, system_prompt, template_args=template_args or {})
        self._read, self._load = cache(self._read_split), cache(self._load_split)
        if num_shots and not reply:
            raise ValueError(f"env.args.num_shots is {num_shots}: worked examples need the column named by reply")
        if heldout and source.endswith((".jsonl", ".parquet")):
            raise ValueError(
                f"env.args.source {source!r} is one file, which has no split {heldout!r}: leave heldout out, or put "
                f"train and {heldout} files into a folder and name that"
            )

    def prompts(self, split: Split, seed: int, first_id: int = 0) -> Iterator[Prompt]:
        """Endless epochs of the training rows, each in an order of its own; held-out rows come once."""
        examples = self._load(split)
        count = first_id if examples.size else 0
        epoch, begun = divmod(first_id, examples.size) if examples.size else (0, 0)
        while split == "train" or epoch == 0:
            for one in examples.drawn(partial(_shuffled, f"{split} {seed} {epoch}"), begun):
                if count >= first_id:
                    yield Prompt(count, one.token_ids, one.scoring, one.source)
                count += 1
            epoch, begun = epoch + 1, 0

    async def play(self, prompt: Prompt, generate: Generate) -> Trajectory:
        played = single_turn(prompt, await generate(prompt.token_ids), UNSCORED)
        return played if self._score_by == "group" else (await self._scored(prompt, [played]))[0]

    async def score_group(self, prompt: Prompt, attempts: Sequence[Trajectory]) -> Sequence[Trajectory]:
        """The attempts with the rewards of one call of each function, where that was asked for."""
        return attempts if self._score_by == "attempt" else await self._scored(prompt, attempts)

    async def _scored(self, prompt: Prompt, attempts: Sequence[Trajectory]) -> list[Trajectory]:
        replies = [one.token_ids[one.mask].tolist() for one in attempts]
        texts = [self._bare_format.reply_in(self._bare_format.text_of(token_ids)) for token_ids in replies]
        step = max(int(one.versions.max()) for one in attempts)
        scores = await self._score(texts, replies, prompt, step)
        return [
            replace(one, reward=0.0 if self._end_required and one.finish != "stop" else reward, metrics=metrics)
            for one, (reward, metrics) in zip(attempts, scores, strict=True)
        ]

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """The score of one reply to every prompt: the most frequent target, or nothing where there are no targets.

        A prompt without a reward is left out. One whose scoring fails again and again is, too, with a warning. Raises
        `ValueError` once that happened to more prompts than others were scored.
        """
        targets = Counter(str(json.loads(prompt.target)["columns"].get("target", "")) for prompt in prompts)
        best = max(targets, key=lambda target: (targets[target], target))

        name = f"always {best[:20]!r}" if best else "empty reply"
        token_ids = self._ids_of(best)
        scores: list[float] = []  # nan of prompts for which every function said None
        failures: list[Exception] = []

        async def score(queue: Iterator[Prompt]) -> None:
            for prompt in queue:
                try:
                    reward = await self._score_again(best, token_ids, prompt)
                except (ValueError, TimeoutError) as error:
                    failures.append(error)
                    if len(failures) > len(scores) + _CALLS_AT_ONCE or len(failures) == len(prompts):
                        raise
                else:
                    scores.append(reward)

        async def score_all() -> None:
            queue = iter(prompts)
            await asyncio.gather(*(score(queue) for _ in range(_CALLS_AT_ONCE)))

        try:
            with ThreadPoolExecutor(1) as pool:  # the caller's thread may run an event loop already
                pool.submit(asyncio.run, score_all()).result()
        except (ValueError, TimeoutError) as error:
            raise ValueError(
                f"the score without skill ({name}): {error}; eval.baseline=false starts a run without it"
            ) from error
        if failures:
            told = f"{len(failures)} of {len(prompts)} prompts, which could not be scored: {failures[-1]}"
            warnings.warn(f"the score without skill ({name}) leaves out {told}", stacklevel=2)
        known = [score for score in scores if not math.isnan(score)]
        if not known:
            warnings.warn(
                f"the score without skill ({name}) is 0, as every reward function said None on every prompt",
                stacklevel=2,
            )
        return {name: sum(known) / max(len(known), 1)}

    async def _score_again(self, text: str, token_ids: Sequence[int], prompt: Prompt) -> float:
        for tries_left in reversed(range(_TRIES)):
            try:
                return (await self._score([text], [token_ids], prompt))[0][0]
            except (ValueError, TimeoutError):
                if not tries_left:
                    raise
        raise AssertionError

    def _ids_of(self, reply: str) -> list[int]:
        """Tokens of a reply; of a text that the model cannot say the end alone."""
        try:
            return self._bare_format.encode_reply(reply)
        except ValueError:
            return [self._tokenizer.eos_token_id]

    def demonstrations(self, seed: int) -> Iterator[tuple[list[int], list[int]]]:
        """Training prompts with the right replies of their column, in endless epochs."""
        if not self._reply:
            raise ValueError("a warm-up on a data set needs right replies: name their column in env.args.reply")
        examples, epoch = self._load("train"), 0
        while True:
            rng = random.Random(f"demonstrations {seed} {epoch}")
            for one in examples.drawn(lambda size, rng=rng: rng.sample(range(size), size)):  # type: ignore[misc]
                yield list(one.token_ids), self._bare_format.encode_reply(one.reply)
            epoch += 1

    @property
    def columns(self) -> list[str]:
        """Columns that the data must have."""
        return [one for one in (self._prompt, self._target, self._reply, self._source_column) if one]

    def clean(self, row: Row) -> Row:
        """The row as it is used. Raises `ValueError` for one that cannot be."""
        missing = [column for column in self.columns if row.get(column) is None]
        if missing:
            has = ", ".join(column for column, value in row.items() if value is not None)
            raise ValueError(f"nothing in column {missing[0]!r}{', only in ' if has else ''}{has}")
        if not isinstance(prompt := row[self._prompt], str):
            check_messages(prompt, f"column {self._prompt!r}")
            return row | {self._prompt: messages_of(prompt)}
        return row

    async def _score(
        self, texts: Sequence[str], token_ids: Sequence[Sequence[int]], prompt: Prompt, step: int = 0
    ) -> list[Score]:
        scoring = json.loads(prompt.target)
        return await self._rewards.score(scoring["prompt"], texts, token_ids, scoring["columns"], step)

    def _load_split(self, split: Split) -> Examples:
        rest = self._read(self._train)
        shots, rest = rest[: self._num_shots], rest[self._num_shots :]
        chat = ChatFormat(
            self._tokenizer,
            self._bare_format.style,
            self._bare_format.system_prompt,
            [(row[self._prompt], row[self._reply]) for _, row in shots],
            self._bare_format.template_args,
        )
        if self._heldout:
            rows = self._read(self._heldout) if split == "heldout" else rest
        else:
            rows = [row for row, belongs in zip(rest, self._splits_of(rest), strict=True) if belongs == split]
        named = self._heldout if self._heldout and split == "heldout" else self._train
        examples = Examples(rows, partial(self._example, chat, named), skips=self._bad_rows == "skip")
        if not examples.usable:
            why = self._why_none(split, missed=0 if rows or self._heldout else len(rest))
            raise ValueError(f"the data set {self._source!r} has no rows for {split!r}: {why}")
        return examples

    def _splits_of(self, rows: Sequence[tuple[int, Row]]) -> list[Split]:
        """Where each row belongs: as its column `split` says, if that is what the column is for, else by hash."""
        said = [row.get("split") for _, row in rows]
        own = [split if split in _SPLITS else None for split in said]
        if any(own) and (others := {split for split in said if split and split not in _SPLITS}):
            raise ValueError(
                f"{self._source}: rows have the split {quote(min(map(str, others)))}, others 'train' or "
                "'heldout': write one of these two, or nothing, or rename the column"
            )
        return [split or split_of(str(row[self._prompt])) for (_, row), split in zip(rows, own, strict=True)]

    def _why_none(self, split: Split, *, missed: int) -> str:
        """The reason and the remedy; `missed` rows are there that the hash gave to the other split."""
        if missed:
            taken = "none" if split == "heldout" else "all"
            return (
                f"a hash of the prompt holds out a tenth of the rows, unless a row has a 'split', and of {missed} it "
                f"took {taken}; add rows, or name a split in env.args.heldout"
            )
        if self.skipped:
            return (
                f"all were skipped, {dict(self.skipped)}; mend them, or raise env.args.max_prompt_tokens "
                f"({self.max_prompt_tokens})"
            )
        return f"all are worked examples; lower env.args.num_shots ({self._num_shots})"

    def _read_split(self, split: str) -> list[tuple[int, Row]]:
        """The rows that can be used, with their numbers in the data."""
        rows = read_rows(self._source, split, self._name)
        known = check_columns(rows, self.columns, self._source)
        cleaned = []
        for number, row in enumerate(rows):
            try:
                cleaned.append((number, self.clean(row if len(row) == len(known) else dict.fromkeys(known) | row)))
            except ValueError as error:
                self._refuse(split, number, "unusable row", str(error))
        return cleaned

    def _example(self, chat: ChatFormat, split: str, number: int, row: Row) -> Example | None:
        prompt = row[self._prompt]
        refuse, what = partial(self._refuse, split, number), f"the prompt {quote(prompt)}"
        try:
            token_ids = tuple(chat.encode(prompt))
        except Exception as error:  # templates are code of the model's, and may raise anything
            refuse("not taken by template or tokenizer", f"{what}: {type(error).__name__}: {cut(str(error))}")
            return None
        if not token_ids:
            refuse("prompt empty", "it has no tokens: write a question in it")
            return None
        if len(token_ids) > self.max_prompt_tokens:
            detail = f"it has {len(token_ids)} tokens: raise env.args.max_prompt_tokens"
            refuse(f"prompt longer than {self.max_prompt_tokens} tokens", detail)
            return None
        columns = row | ({"target": _as_text(row[self._target])} if self._target else {})
        scoring = _dumped({"prompt": prompt, "columns": columns}, self._source)
        reply, source = (str(row[name]) if name else "" for name in (self._reply, self._source_column))
        return Example(token_ids, scoring, reply, source)

    def _refuse(self, split: str, number: int, reason: str, detail: str) -> None:
        where = f"{self._source}, split {split!r}, row {number}"
        if self._bad_rows == "error":
            raise ValueError(f"{where}: {reason}: {detail}; or set env.args.bad_rows='skip', which counts such rows")
        if not self.skipped[reason]:
            warnings.warn(f"{where} is skipped, the first of its kind: {reason}: {detail}", stacklevel=2)
        if where not in self._refused:  # a row is tried again whenever it is drawn
            self._refused.add(where)
            self.skipped[reason] += 1


def _shuffled(seed: str, size: int) -> list[int]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order


def _dumped(scoring: dict[str, Any], source: str) -> str:
    """As JSON, times as texts. Raises `ValueError` that names the column for what has no such form."""
    try:
        return json.dumps(scoring, default=_time_as_text)
    except TypeError as error:
        name, value = next((name, value) for name, value in scoring["columns"].items() if not _has_json(value))
        raise ValueError(
            f"{source}: column {name!r} holds {type(value).__name__}, and rows travel as JSON: remove the column, or "
            "write text, numbers, lists or tables in it"
        ) from error


def _has_json(value: Any) -> bool:
    try:
        json.dumps(value, default=_time_as_text)
    except TypeError:
        return False
    return True


def _time_as_text(value: Any) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    raise TypeError(type(value).__name__)


def _as_text(target: Any) -> Any:
    """A number as it is written, 42 for 42.0, which integers become where a column has gaps; all else as it is."""
    is_number = isinstance(target, int | float) and not isinstance(target, bool)
    return str(target).removesuffix(".0") if is_number else target
