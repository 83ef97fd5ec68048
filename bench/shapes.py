"""Model shapes that benches share, with random weights, and an environment for them: prompts without meaning."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import Qwen2Config

from asyncrl.envs.base import Generate, Split, Tokenizer, single_turn
from asyncrl.models.tiny import build_tiny
from asyncrl.types import Prompt, Trajectory

_NAMES = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size")
SHAPES: dict[str, dict[str, int]] = {
    "tiny": dict(zip(_NAMES, (2, 128, 384, 4, 2, 25), strict=True)),
    "135m": dict(zip(_NAMES, (30, 576, 1536, 9, 3, 49152), strict=True)),
    "0.5b": dict(zip(_NAMES, (24, 896, 4864, 14, 2, 151936), strict=True)),
    "1.5b": dict(zip(_NAMES, (28, 1536, 8960, 12, 2, 151936), strict=True)),
    "7b": dict(zip(_NAMES, (28, 3584, 18944, 28, 4, 151936), strict=True)) | {"tied": False},
}
"""The built-in model, SmolLM2-135M and those of Qwen2.5, as arguments of `build_tiny`."""
PROMPT_TOKENS = 64


def build(shape: str, folder: str | Path) -> None:
    """Writes a model of the shape to the folder: random float32 weights and the tokenizer of "tiny"."""
    build_tiny(folder, init_std=0.02, seed=0, **SHAPES[shape])


def write_config(shape: str, folder: str | Path) -> None:
    """A model folder without weights, for what makes its own."""
    sizes = {"tied": True} | SHAPES[shape]
    config = Qwen2Config(
        num_hidden_layers=sizes.pop("num_layers"),
        num_attention_heads=sizes.pop("num_heads"),
        num_key_value_heads=sizes.pop("num_kv_heads"),
        tie_word_embeddings=sizes.pop("tied"),
        **sizes,
        max_position_embeddings=4096,
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(folder)


def prompts_of(shape: str) -> list[str]:
    """The words of a run with `RandomPrompts` for a model of the shape."""
    return ["env.path=shapes:RandomPrompts", f"env.args={{vocabulary={SHAPES[shape]['vocab_size']}}}"]


class RandomPrompts:
    """Prompts without meaning; every reply scores 1."""

    max_prompt_tokens = PROMPT_TOKENS

    def __init__(self, _tokenizer: Tokenizer | None, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        rng = np.random.default_rng(seed)
        for number in itertools.count():
            yield Prompt(number, tuple(rng.integers(0, self._vocabulary, PROMPT_TOKENS).tolist()), split)

    async def play(self, prompt: Prompt, generate: Generate) -> Trajectory:
        return single_turn(prompt, await generate(prompt.token_ids), 1.0)

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        return {"anything": float(len(prompts) > 0)}
