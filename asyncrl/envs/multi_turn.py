"""Attempts of several turns: the model replies, the environment answers, until one of them or a budget ends it.

    prompt --> generate --> reply --> episode.respond --> answer, mask False --> generate --> ... --> episode.score
               |                                          |
               '-- one engine, and each context extends the one before token by token: its prefix cache holds

What was sampled is never tokenised again: answers are appended as tokens, in the words of the chat template.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from asyncrl.envs.base import Generate, Split, Tokenizer, split_of
from asyncrl.envs.chat import ChatFormat, Message
from asyncrl.envs.data import Row, read_rows
from asyncrl.types import Completion, Finish, Prompt, Trajectory, Version
from asyncrl.utils.quote import cut, quote

SHIPPED = Path(__file__).with_name("rows")
"""A few rows for each example, so that it runs offline."""


class Episode(Protocol):
    """One attempt at one row, from its first reply to its score."""

    metrics: dict[str, float]
    """What it counted; the same names in every episode of an environment."""
    # It may also have `said`, the beginning of the last reply that counts, or None: the rest is left out.

    async def respond(self, reply: str) -> str | list[Message] | None:
        """The answer to a reply, None if that was the last. An exception is a failed rollout, so garbage that the model
        wrote gets an answer that says so, and is counted."""

    async def score(self) -> float:
        """The reward, asked for once, however the attempt ended."""


class MultiTurn:
    """Base of the environments that play in turns: a subclass says what a row asks and how an episode goes.

    `data` is a .jsonl or .parquet file, or the "train" split of a folder or a hub id (`asyncrl.envs.data`); a row's own
    `split` ("train" or "heldout") wins over the split by hash.
    Budgets: `max_turns` replies, and no context longer than `max_context_tokens` is handed to the model; a reply has
    `rollout.max_new_tokens`. A reply that was cut off ends the attempt and is not acted upon; with `takes_cut_replies`
    the episode answers it like any other. Raises `ValueError` for data that cannot be used.
    """

    takes_cut_replies = False

    def __init__(self, tokenizer: Tokenizer, *, data: str | Path, max_turns: int, max_context_tokens: int) -> None:
        if max_turns < 1:
            raise ValueError(f"env.args.max_turns must be at least 1, got {max_turns}")
        self.max_prompt_tokens = max_context_tokens
        self._max_turns = max_turns
        self._tokenizer, self._chat = tokenizer, ChatFormat(tokenizer, "chat")
        self._rows = {str(number): row for number, row in enumerate(read_rows(str(data), "train"))}
        self._prompts: dict[str, tuple[int, ...]] = {}
        for name, row in self._rows.items():
            try:
                self._prompts[name] = token_ids = tuple(self._chat.encode(self.opening(row)))
            except ValueError as error:
                raise ValueError(f"row {name} of {data}: {error}") from error
            if len(token_ids) > max_context_tokens:
                raise ValueError(
                    f"row {name} of {data} has a prompt of {len(token_ids)} tokens, env.args.max_context_tokens is "
                    f"{max_context_tokens}: raise it, or remove the row"
                )
        names: dict[Split, list[str]] = {"train": [], "heldout": []}
        for name, row in self._rows.items():
            split = row.get("split") or split_of(json.dumps(row, sort_keys=True))
            if split not in names:
                raise ValueError(
                    f"row {name} of {data} has the split {quote(split)}: write 'train' or 'heldout', or nothing"
                )
            names[split].append(name)
        self._names = names

    def opening(self, row: Row) -> list[Message]:
        """What the model is told before its first reply."""
        raise NotImplementedError

    def episode(self, row: Row) -> AbstractAsyncContextManager[Episode]:
        """A new attempt at `row`; what it holds is freed on exit."""
        raise NotImplementedError

    def prompts(self, split: Split, seed: int, first_id: int = 0) -> Iterator[Prompt]:
        """Pass after pass over the training rows, each in an order of its own; held-out rows come once. `target` names
        the row."""
        names = self._names[split]
        if not names:
            raise ValueError(f"the data of {type(self).__name__} has no {split} rows: add some, or give rows a 'split'")
        rng = random.Random(f"{split} {seed}")
        count = 0
        while split == "train" or count == 0:
            for name in rng.sample(names, len(names)):
                if count >= first_id:
                    yield Prompt(count, self._prompts[name], name)
                count += 1

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, float]:  # noqa: ARG002
        """Saying nothing of use scores nothing."""
        return {"no answer": 0.0}

    async def play(self, prompt: Prompt, generate: Generate) -> Trajectory:
        transcript = Transcript(prompt.token_ids)
        turns, out_of_turns = 0, False
        async with self.episode(self._rows[prompt.target]) as episode:
            while True:
                completion = await generate(transcript.token_ids)
                turns += 1
                finish: Finish = completion.finish
                answer = None
                if finish == "stop" or self.takes_cut_replies:
                    answer = await episode.respond(self._text(completion))
                self._take(completion, getattr(episode, "said", None), transcript)
                if answer is None:
                    break
                out_of_turns = turns == self._max_turns
                if out_of_turns:
                    break
                given = self._chat.encode_answer(answer, transcript.token_ids[-1])
                if len(transcript.token_ids) + len(given) > self.max_prompt_tokens:
                    finish = "length"
                    break
                transcript.given(given)
            reward = await episode.score()
            metrics = {"turns": float(turns), "out_of_turns": float(out_of_turns), **episode.metrics}
        return transcript.trajectory(reward, finish, metrics)

    def _take(self, completion: Completion, said: str | None, transcript: Transcript) -> None:
        """Adds a reply, or its beginning `said`: what of that ends within a token is given, not sampled."""
        if said is None:
            transcript.sampled(completion)
            return
        token_ids = completion.token_ids.tolist()
        if not self._text(completion).startswith(said):
            raise ValueError(
                f"a reply is to be taken for {quote(said)}, which is no beginning of it: only sampled tokens can be "
                "trained, so a reply can be cut and not rewritten"
            )
        num_kept = bisect_right(
            range(1, len(token_ids) + 1), len(said), key=lambda count: len(self._decoded(token_ids[:count]))
        )
        while num_kept and not said.startswith(self._decoded(token_ids[:num_kept])):
            num_kept -= 1  # within a character of several tokens
        if not num_kept:
            raise ValueError("a reply is to be taken for nothing at all: an attempt needs a sampled token")
        transcript.sampled(completion, num_kept)
        if rest := said[len(self._decoded(token_ids[:num_kept])) :]:
            transcript.given(self._tokenizer.encode(rest, add_special_tokens=False))

    def _text(self, completion: Completion) -> str:
        return self._decoded(completion.token_ids.tolist())

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return self._chat.text_of(token_ids)


class Transcript:
    """The columns of one attempt as it grows."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.token_ids = list(prompt)
        self._mask = [False] * len(prompt)
        self._logprobs = [0.0] * len(prompt)
        self._versions = [0] * len(prompt)
        self._digests: dict[Version, str] = {}

    def sampled(self, completion: Completion, count: int | None = None) -> None:
        """What the model wrote, its first `count` tokens or all: trained on, with the log-probs and versions that it
        was sampled with."""
        self.token_ids += completion.token_ids[:count].tolist()
        self._mask += [True] * len(completion.token_ids[:count])
        self._logprobs += completion.logprobs[:count].tolist()
        self._versions += completion.versions[:count].tolist()
        self._digests |= completion.digests

    def given(self, token_ids: Sequence[int]) -> None:
        """What the environment wrote: read by the model, not trained on."""
        self.token_ids += token_ids
        self._mask += [False] * len(token_ids)
        self._logprobs += [0.0] * len(token_ids)
        self._versions += [0] * len(token_ids)

    def trajectory(self, reward: float, finish: Finish, metrics: dict[str, float]) -> Trajectory:
        return Trajectory(
            token_ids=np.array(self.token_ids, np.int32),
            mask=np.array(self._mask, np.bool_),
            logprobs=np.array(self._logprobs, np.float32),
            versions=np.array(self._versions, np.int32),
            reward=reward,
            finish=finish,
            digests=self._digests,
            metrics=metrics,
        )


def field(row: Row, name: str) -> Any:
    """Column `name` of a row. Raises `ValueError` that names the columns there are, and for one with nothing in it."""
    if name not in row:
        raise ValueError(
            f"a row lacks the column {name!r}; it has {cut(', '.join(sorted(row)))}: rename one, or add it"
        )
    if row[name] is None or row[name] == "":
        raise ValueError(f"a row has nothing in the column {name!r}: remove it, or correct the data: {quote(row, 200)}")
    return row[name]
