"""Builds what lives inside the actors from a configuration. The same for both runtimes."""

from __future__ import annotations

from pathlib import Path

import torch

from asyncrl import checkpoint
from asyncrl.checkpoint import Cursor
from asyncrl.config import Config
from asyncrl.engine.embedded import EmbeddedEngine
from asyncrl.envs.base import load_env
from asyncrl.learner import Learner, row_length
from asyncrl.model import load_model, load_tokenizer, stop_token_ids
from asyncrl.rollout import Rollout
from asyncrl.types import Sampling
from asyncrl.weights import DTYPES


def build_rollout(config: Config, folder: str, address: str = "127.0.0.1") -> Rollout:
    """An engine with the weights in `folder`, and its environment."""
    settings = config.rollout
    tokenizer = load_tokenizer(folder)
    env = load_env(config.env.path, tokenizer, config.env.args)
    model = load_model(folder, dtype=DTYPES[settings.dtype], device="cpu")
    engine = EmbeddedEngine(
        model,
        max_running=settings.max_running,
        max_length=env.max_prompt_tokens + settings.max_new_tokens,
        on_update=settings.on_update,
        address=address,
    )
    sampling = Sampling(
        settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k, stop_token_ids(model, tokenizer)
    )
    return Rollout(engine, env, sampling, settings.group_size, config.seed)


class LearnerPart:
    """The learner and what it saves and resumes with."""

    def __init__(self, config: Config, folder: str, resume: Path | None, address: str = "127.0.0.1") -> None:
        torch.manual_seed(config.seed)
        self._keep = config.checkpoint.keep
        self._tokenizer = load_tokenizer(folder)
        env = load_env(config.env.path, self._tokenizer, config.env.args)
        model = load_model(str(resume or folder), dtype=torch.float32, device="cpu")
        row_tokens = row_length(config, env.max_prompt_tokens)
        # A resumed run keeps the reference of its beginning.
        reference = load_model(folder, dtype=torch.float32, device="cpu") if config.loss.needs_reference else None
        self.learner = Learner(config, model, row_tokens, reference=reference, address=address)
        if resume is not None:
            self.learner.load_state(checkpoint.load_optimizer(resume), checkpoint.load_cursor(resume).version)

    def save(self, root: Path, cursor: Cursor) -> None:
        if cursor.version != self.learner.version:
            raise RuntimeError(f"asked to save version {cursor.version}, the learner is at {self.learner.version}")
        checkpoint.save(root, cursor, self.learner.model, self._tokenizer, self.learner.state(), keep=self._keep)
