"""Several environments in one, drawn by weight. Each group comes from one of them; rewards are reported by name, too.

[env]
path = "asyncrl.envs.mixture:Mixture"
[env.args.envs.gcd]
path = "asyncrl.envs.reasoning_gym:ReasoningGym"
args = { task = "gcd" }
weight = 2.0
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from asyncrl.envs.base import (
    Env,
    Generate,
    Split,
    Tokenizer,
    can_skip,
    load_env,
    no_skill,
    pass_mark,
    prompts_from,
)
from asyncrl.types import Prompt, Trajectory
from asyncrl.utils.settings_text import check_value

_KEYS = {"path": str, "args": dict[str, Any], "weight": float}
_AT_ONCE = 10_000
"""Draws that are skipped at once: they are held in a list."""


class Mixture:
    """Prompts of several environments; `Prompt.source` is the name of the one that scores it."""

    def __init__(self, tokenizer: Tokenizer, envs: Mapping[str, Mapping[str, Any]]) -> None:
        """`envs`: name -> `path` and `args` as in the configuration's table `env`, and `weight`, 1 by default: the
        share of prompts is proportional to it."""
        if not envs:
            raise ValueError("env.args.envs is empty: a mixture needs at least one environment")
        self._envs: dict[str, Env] = {}
        self._weights: dict[str, float] = {}
        for name, given in envs.items():
            knob = f"env.args.envs.{name}"
            if unknown := set(given) - set(_KEYS):
                raise ValueError(f"{knob} takes path, args and weight, got {', '.join(sorted(unknown))}")
            for key, value in given.items():
                check_value(value, _KEYS[key], f"{knob}.{key}")
            if "path" not in given or given["path"].endswith(":Mixture"):
                raise ValueError(f"{knob}.path must name an environment, and no mixture: got {given}")
            self._weights[name] = float(given.get("weight", 1.0))
            if not 0 < self._weights[name] < float("inf"):
                raise ValueError(f"{knob}.weight must be above 0, got {given['weight']}: or leave it out")
            self._envs[name] = load_env(given["path"], tokenizer, dict(given.get("args", {})), knob)
        self.max_prompt_tokens = max(env.max_prompt_tokens for env in self._envs.values())
        marks = {pass_mark(env, None) for env in self._envs.values()}
        self.pass_reward = marks.pop() if len(marks) == 1 else None
        """That of all environments; None where they differ."""

    @property
    def skipped(self) -> Counter[str]:
        """Rows that the environments left out, by reason."""
        counts: Counter[str] = Counter()
        for name, env in self._envs.items():
            for reason, count in getattr(env, "skipped", {}).items():
                counts[f"{name}: {reason}"] += count
        return counts

    def prompts(self, split: Split, seed: int, first_id: int = 0) -> Iterator[Prompt]:
        """Draws an environment by weight for each prompt. Held-out prompts end when every environment's have ended."""
        rng = random.Random(f"mixture {split} {seed}")
        skipped: Counter[str] = Counter()
        if split == "train" and all(map(can_skip, self._envs.values())):
            skipped = self._drawn(rng, first_id)
        sources = {name: prompts_from(env, split, seed, skipped[name]) for name, env in self._envs.items()}
        count = skipped.total()
        while sources:
            (name,) = rng.choices(list(sources), [self._weights[name] for name in sources])
            prompt = next(sources[name], None)
            if prompt is None:
                del sources[name]
                continue
            if count >= first_id:
                yield replace(prompt, id=count, source=name)
            count += 1

    def _drawn(self, rng: random.Random, num_prompts: int) -> Counter[str]:
        """How many of the first prompts come from each environment, where none ends. `rng` is where they leave it."""
        counts: Counter[str] = Counter()
        while left := min(_AT_ONCE, num_prompts - counts.total()):
            counts.update(rng.choices(list(self._weights), list(self._weights.values()), k=left))
        return counts

    async def play(self, prompt: Prompt, generate: Generate) -> Trajectory:
        return await self._envs[prompt.source].play(prompt, generate)

    async def score_group(self, prompt: Prompt, attempts: Sequence[Trajectory]) -> Sequence[Trajectory]:
        score = getattr(self._envs[prompt.source], "score_group", None)
        return attempts if score is None else await score(prompt, attempts)

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """The best policy without skill of each environment, together: weighted as the prompts are."""
        drawn: dict[str, list[Prompt]] = defaultdict(list)
        for prompt in prompts:
            drawn[prompt.source].append(prompt)
        names, total = [], 0.0
        for source, some in drawn.items():
            name, score = max(no_skill(self._envs[source], some).items(), key=lambda item: item[1])
            names.append(f"{source} {name}")
            total += score * len(some)
        return {", ".join(names): total / len(prompts)}
