"""Two tasks on digit strings that a 0.4 M parameter model learns on a laptop: largest digit, sort digits.

Both give reward 1 for exactly the right reply, ended by the end token, and 0 otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from asyncrl.envs.base import Generate, Split, Tokenizer, single_turn, split_of
from asyncrl.types import Prompt, Trajectory


class _DigitTask:
    """What the two tasks share: drawing prompts of one split, and exact-match scoring of a single turn."""

    max_prompt_tokens: int
    pass_reward = 1.0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` and nothing else."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """One question and its answer."""
        raise NotImplementedError

    def prompts(self, split: Split, seed: int, first_id: int = 0) -> Iterator[Prompt]:
        rng = random.Random(f"{split} {seed}")
        count = 0
        while True:
            question, answer = self.draw(rng)
            if split_of(question) == split:
                if count >= first_id:
                    yield Prompt(count, tuple(self.encode(question)), answer)
                count += 1

    async def play(self, prompt: Prompt, generate: Generate) -> Trajectory:
        completion = await generate(prompt.token_ids)
        text = self._tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        return single_turn(prompt, completion, float(completion.finish == "stop" and text == prompt.target))

    def _question(self, prompt: Prompt) -> str:
        return str(self._tokenizer.decode(list(prompt.token_ids)))


class LargestDigit(_DigitTask):
    """`m4071=` -> `7`: three to five different digits, the answer uniform over 3 to 9."""

    max_prompt_tokens = 7

    def draw(self, rng: random.Random) -> tuple[str, str]:
        largest = rng.randint(3, 9)
        others = rng.sample(range(largest), min(rng.randint(2, 4), largest))
        digits = [largest, *others]
        rng.shuffle(digits)
        return f"m{''.join(map(str, digits))}=", str(largest)

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        targets = [prompt.target for prompt in prompts]
        best = max(sorted(set(targets)), key=targets.count)  # of several, the same one in every process
        first = [self._question(prompt)[1] for prompt in prompts]
        return {
            f"always {best}": targets.count(best) / len(targets),
            "first digit": sum(a == b for a, b in zip(first, targets, strict=True)) / len(targets),
        }


class SortDigits(_DigitTask):
    """`s48271=` -> `12478`: three to six different digits in rising order, replies of four to seven tokens."""

    max_prompt_tokens = 8

    def draw(self, rng: random.Random) -> tuple[str, str]:
        digits = [str(digit) for digit in rng.sample(range(10), rng.randint(3, 6))]
        return f"s{''.join(digits)}=", "".join(sorted(digits))

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        same = [self._question(prompt)[1:-1] == prompt.target for prompt in prompts]
        return {"digits as given": sum(same) / len(same)}

    def demonstrations(self, seed: int) -> Iterator[tuple[list[int], list[int]]]:
        """Replies of mixed quality: 28 % right, 45 % in falling order, the rest with a slip.

        The skill is in the data but is not the most likely reply; reinforcement learning has to pick it out.
        """
        rng = random.Random(f"demonstrations {seed}")
        while True:
            question, answer = self.draw(rng)
            if split_of(question) == "heldout":
                continue
            kind = rng.random()
            slip = rng.choice(_SLIPS)
            reply = answer if kind < 0.28 else answer[::-1] if kind < 0.73 else slip(answer, rng)
            yield self.encode(question), [*self.encode(reply), self._end]


def _swapped(answer: str, rng: random.Random) -> str:
    at = rng.randrange(len(answer) - 1)
    return answer[:at] + answer[at + 1] + answer[at] + answer[at + 2 :]


def _lost(answer: str, rng: random.Random) -> str:
    at = rng.randrange(len(answer))
    return answer[:at] + answer[at + 1 :]


def _doubled(answer: str, rng: random.Random) -> str:
    at = rng.randrange(len(answer))
    return answer[:at] + answer[at] + answer[at:]


def _unsorted(answer: str, rng: random.Random) -> str:
    return "".join(rng.sample(answer, len(answer)))


_SLIPS: list[Callable[[str, random.Random], str]] = [_swapped, _lost, _doubled, _unsorted]
