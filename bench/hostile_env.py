"""A task whose replies are made to break what reads them: graders, errors, samples, the console.

The tokens and the reward are those of `faults_life.Sevens`, so that the account of the bench holds. Beside that each
attempt has a hostile text graded by an environment that is shipped, or raises it as an error.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from asyncrl.envs.base import Generate, load_env
from asyncrl.envs.digits import SortDigits
from asyncrl.monitor.samples import Samples
from asyncrl.types import Prompt, Trajectory
from bench import graders

SIZE = 5000
"""Of a text: a number of so many digits is more than Python reads."""
RAISED = 0.1
"""Share of the attempts that end in an error with a hostile text."""
_TEXTS = {
    "deep JSON": "[" * SIZE,
    "a huge number": "9" * SIZE,
    "escape codes": "\x1b[2J\x1b]0;owned\x07\x1b[31m\r\x9b1A",
    "surrogates": "\ud800 #### \udfff",
    "NUL": "a\0b\0",
    "directions": "\u202e1 ####",
    "lines": "alarm: all is lost\n\n![x](http://127.0.0.1:9/x.png)\n```\n<script>",
}


class Hostile(SortDigits):
    """The share of sevens in the reply; what is graded besides is hostile."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._rng = random.Random(0)

    async def play(self, prompt: Prompt, generate: Generate) -> Trajectory:
        played = await super().play(prompt, generate)
        told, text = self._rng.choice(list(_texts().items()))
        if self._rng.random() < RAISED:
            raise ValueError(text)
        env, target = self._rng.choice(_graders())
        scored = await graders.play(env, target, text)
        if not scored.reward <= 1:
            raise RuntimeError(f"{type(env).__name__} gave {scored.reward} for {told}")
        seven = self.encode("7")[0]
        reward = float((played.token_ids[played.mask] == seven).mean())
        return replace(played, reward=reward, metrics={"graded": scored.reward})


def spoil_samples() -> None:
    """Has the samples of trained trajectories hold hostile texts in place of their tokens."""
    begin, texts = Samples.__init__, itertools.cycle(_TEXTS.values())

    def spoiled(samples: Samples, folder: Path, config: Any, decode: Callable[[list[int]], str]) -> None:
        del decode
        begin(samples, folder, config, lambda _tokens: next(texts))

    Samples.__init__ = spoiled  # type: ignore[method-assign]


@cache
def _texts() -> dict[str, str]:
    return _TEXTS | graders.replies(SIZE)


@cache
def _graders() -> list[tuple[Any, str]]:
    """Those that start no program."""
    with tempfile.TemporaryDirectory() as folder:
        found = graders.environments(Path(folder))
        made = []
        for name, (path, args, target) in found.items():
            if name.startswith(("Code", "Repair", "ToolUse")):
                continue
            env = load_env(path, graders.Characters(), args)
            next(env.prompts("train", 0))  # reads its data
            made.append((env, target))
        return made
