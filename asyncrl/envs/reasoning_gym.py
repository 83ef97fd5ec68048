"""Tasks of the package reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760): made by rule, scored by rule.

One environment is one task; `envs.mixture` puts several together. A task is drawn again from its seed and index where
it is scored, so prompts stay small. Look at a task's no-skill score before you trust its reward.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from asyncrl.envs.base import Generate, Split, Tokenizer, single_turn, split_of
from asyncrl.envs.chat import ChatFormat, Style
from asyncrl.envs.gsm8k import NUMBER, plain, value_of
from asyncrl.types import Prompt, Trajectory

_SIZE = 10**9
"""Examples that a task is asked for, which are made when drawn. A few tasks want less: `config = { size = 1000 }`."""
_NUMBER = re.compile(rf"(?:{NUMBER})(?:/\d+)?")


class ReasoningGym:
    """One task; the reward is the task's own, from 0 to 1."""

    pass_reward = 1.0

    def __init__(
        self,
        tokenizer: Tokenizer,
        task: str,
        *,
        config: Mapping[str, Any] | None = None,
        answer: Literal["tag", "last_number", "whole"] = "tag",
        system_prompt: str = "",
        style: Style = "auto",
        max_prompt_tokens: int = 512,
        end_required: bool = True,
    ) -> None:
        """`config`: the task's own settings. `answer`: what of a reply is scored, the last `<answer>...</answer>`, the
        last number, or all of it; without a tag or a number the reward is 0. Prompts longer than `max_prompt_tokens`
        are left out and counted in `skipped`. `end_required`: a completion that ran out of tokens has reward 0."""
        try:
            import reasoning_gym
        except ImportError as error:
            raise ValueError("reasoning-gym is not installed: pip install 'asyncrl[reasoning-gym]'") from error
        known = reasoning_gym.factory.DATASETS
        if task not in known:
            raise ValueError(f"env.args.task {task!r} is no task of reasoning-gym: it has {', '.join(sorted(known))}")
        try:
            self._tasks = reasoning_gym.create_dataset(task, **{"seed": 0, "size": _SIZE, **(config or {})})
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"env.args.config {dict(config or {})} does not fit the task {task!r}: {error}") from error
        if answer == "tag" and not system_prompt:
            system_prompt = "Think first. Then give the final answer within <answer> </answer> tags."
        self.max_prompt_tokens = max_prompt_tokens
        self.skipped: Counter[str] = Counter()
        self._task, self._answer, self._end_required = task, answer, end_required
        self._chat = ChatFormat(tokenizer, style, "" if style == "raw" else system_prompt)

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        rng = random.Random(f"{split} {seed}")
        count = num_long = 0
        while True:
            index = rng.randrange(self._tasks.size)
            question = self._tasks[index]["question"]
            if split_of(question) != split:
                continue
            token_ids = tuple(self._chat.encode(question))
            if len(token_ids) <= self.max_prompt_tokens:
                yield Prompt(count, token_ids, str(index))
                count, num_long = count + 1, 0
                continue
            self.skipped[f"prompt longer than {self.max_prompt_tokens} tokens"] += 1
            num_long += 1
            if num_long == 1000:
                raise ValueError(
                    f"1000 prompts of {self._task!r} in a row are longer than env.args.max_prompt_tokens "
                    f"({self.max_prompt_tokens}), the last has {len(token_ids)}: raise it"
                )

    async def play(self, prompt: Prompt, generate: Generate) -> Trajectory:
        completion = await generate(prompt.token_ids)
        text = self._chat.text_of(completion.token_ids.tolist())
        answer = self._extract(self._chat.reply_in(text))
        score = self._score(answer, prompt)
        counted = completion.finish == "stop" or not self._end_required
        told = {"answered": float(answer is not None), "scorer_raised": float(score is None)}
        return single_turn(prompt, completion, (score or 0.0) if counted else 0.0, **told)

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Of three constant answers: the most frequent one of these prompts, "0" and "1"."""
        answers = Counter(str(self._tasks[int(prompt.target)]["answer"]) for prompt in prompts)
        constants = dict.fromkeys([max(answers, key=lambda answer: (answers[answer], answer)), "0", "1"])
        return {
            f"always {constant[:20]!r}": sum(self._score(constant, prompt) or 0.0 for prompt in prompts) / len(prompts)
            for constant in constants
        }

    def _score(self, answer: str | None, prompt: Prompt) -> float | None:
        """The task's score of an answer; None where its scorer raises, as some do on free text,
        or says no finite number."""
        if answer is None:
            return 0.0
        entry = self._tasks[int(prompt.target)]
        try:
            score = float(self._tasks.score_answer(answer, entry))
        except Exception:  # whatever the task's parser stumbles on: the answer is at fault, not the run
            return None
        return score if math.isfinite(score) else None

    def _extract(self, text: str) -> str | None:
        if self._answer == "whole":
            return text.strip()
        if self._answer == "last_number":
            numbers = _NUMBER.findall(plain(text))
            return value_of(numbers[-1]) if numbers else None
        begin = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
        answer = text[begin + len("<answer>") :].partition("</answer>")[0]
        return answer.strip() if begin >= 0 else None
