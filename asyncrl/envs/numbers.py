"""Largest of three two-digit numbers, asked in a chat: a task that a small instruct model gets right now and then."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from asyncrl.envs.base import Generate, Split, Tokenizer, single_turn, split_of
from asyncrl.envs.chat import ChatFormat
from asyncrl.types import Prompt, Trajectory

_QUESTION = "Which number is the largest: {}? Answer with the number only."


class LargestOfThree:
    """Reward 1 when the last number of the reply is the largest of the three, and the reply ended by itself."""

    pass_reward = 1.0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._chat = tokenizer, ChatFormat(tokenizer, "chat")
        self.max_prompt_tokens = max(len(self._chat.encode(_QUESTION.format(f"{n}, {n}, {n}"))) for n in range(10, 100))

    def prompts(self, split: Split, seed: int, first_id: int = 0) -> Iterator[Prompt]:
        rng = random.Random(f"{split} {seed}")
        count = 0
        while True:
            numbers = rng.sample(range(10, 100), 3)
            question = _QUESTION.format(", ".join(map(str, numbers)))
            if split_of(question) == split:
                if count >= first_id:
                    yield Prompt(count, tuple(self._chat.encode(question)), str(max(numbers)))
                count += 1

    async def play(self, prompt: Prompt, generate: Generate) -> Trajectory:
        completion = await generate(prompt.token_ids)
        text = self._tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        numbers = re.findall(r"\d+", text)
        right = bool(numbers) and numbers[-1] == prompt.target
        return single_turn(prompt, completion, float(right and completion.finish == "stop"), right=float(right))

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        named = [self._numbers(prompt) for prompt in prompts]
        first = [numbers[0] == prompt.target for numbers, prompt in zip(named, prompts, strict=True)]
        return {"first number": sum(first) / len(first)}

    def _numbers(self, prompt: Prompt) -> list[str]:
        question = self._tokenizer.decode(list(prompt.token_ids)).partition("largest:")[2]
        return re.findall(r"\d+", question)
