"""Builds what lives inside the actors from a configuration. The same for both runtimes."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from asyncrl.algo import custom as own
from asyncrl.algo.loss import try_own
from asyncrl.config import out_of_memory as memory
from asyncrl.config.schema import Config
from asyncrl.engines.base import Engine
from asyncrl.engines.embedded.engine import EmbeddedEngine
from asyncrl.engines.stop_texts import Decode
from asyncrl.envs.attempt import Bounds
from asyncrl.envs.base import load_env
from asyncrl.models.loading import empty_model, load_model, load_tokenizer, stop_token_ids
from asyncrl.recovery import checkpoint
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.runtime.placement import Placement
from asyncrl.runtime.rollout_worker import Attempts, Rollout
from asyncrl.training.learner import Learner, row_length
from asyncrl.training.lora import Adapters, refuse_adapters
from asyncrl.training.sharding import Ranks
from asyncrl.types import Sampling
from asyncrl.weights.buckets import DTYPES


def check_own(config: Config) -> None:
    """Raises `ValueError` for a loss or advantage of the user that cannot be imported, or raises. It is called where
    the learner would compute on this machine's CPU: written for a GPU it need not run here."""
    own.check(config.loss)
    if not _joins_cluster(config) and (config.device == "cpu" or not torch.cuda.is_available()):
        try_own(config.loss, config.learner.groups_per_step, config.rollout.group_size)


def check_targets(config: Config, folder: str) -> None:
    """Raises `ValueError` for adapters that do not fit the model in `folder`, which shows without weights."""
    if config.lora.rank and config.lora.targets != "all-linear" and not _joins_cluster(config):
        Adapters(empty_model(folder), config.lora)


def _joins_cluster(config: Config) -> bool:
    """Whether the actors' machines may have other packages and GPUs than this one."""
    return config.runtime == "cluster" and config.cluster.address is not None


async def build_rollout(
    config: Config,
    folder: str,
    placement: Placement,
    *,
    address: str = "127.0.0.1",
    name: str = "rollout",
    store: Path | None = None,
) -> Rollout:
    """An engine with the weights in `folder`, and its environment. `address` is this node's own; `store` is where
    finished groups are written."""
    settings = config.rollout
    tokenizer = load_tokenizer(folder, config.model)
    env = load_env(config.env.path, tokenizer, config.env.args)

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids))

    longest = env.max_prompt_tokens + settings.max_new_tokens
    engine = await _build_engine(config, folder, placement, longest, address=address, decode=decode)
    sampling = sampling_of(config, folder, tokenizer)
    tried = dataclasses.replace(sampling, temperature=config.eval.temperature, top_p=config.eval.top_p, top_k=0)
    return Rollout(
        engine,
        env,
        sampling,
        group_size=settings.group_size,
        seed=config.seed,
        name=name,
        evaluation=Attempts(tried, config.eval.num_samples, config.eval.max_running),
        timeout_s=config.env.timeout_s,
        max_attempts=settings.max_attempts,
        store=store,
        bounds=Bounds(engine.vocabulary, row_length(config, env.max_prompt_tokens)),
    )


def sampling_of(config: Config, folder: str, tokenizer: Any) -> Sampling:
    """How the tokens of training are drawn from the model in `folder`."""
    settings = config.rollout
    return Sampling(
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        settings.top_k,
        stop_token_ids(folder, tokenizer),
        settings.stop,
    )


async def _build_engine(
    config: Config, folder: str, placement: Placement, max_length: int, *, address: str, decode: Decode
) -> Engine:
    settings = config.rollout
    if settings.engine == "embedded":
        remedies = memory.cache_remedies(config)
        with memory.told("making an embedded engine", remedies, "the engine"):
            model = load_model(folder, dtype=DTYPES[settings.dtype], device=placement.device)
            adapters = None
            if config.lora.sync == "adapter":
                adapters = Adapters(model, replace(config.lora, alpha=config.lora.rank)).named()  # they arrive scaled
            return EmbeddedEngine(
                model,
                max_running=min(settings.max_running, config.in_flight),
                max_length=max_length,
                on_update=settings.on_update,
                address=address,
                updated=adapters,
                decode=decode,
                remedies=remedies,
            )
    from asyncrl.engines.sglang.engine import SGLangEngine  # an optional package

    return await SGLangEngine.start(
        folder,
        dtype=settings.dtype,
        device=placement.device,
        max_running=settings.max_running,
        max_length=max_length,
        tensor_parallel_size=settings.tensor_parallel_size,
        attention_backend=settings.attention_backend,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        release_memory=settings.release_memory,
        on_update=settings.on_update,
        seed=config.seed,
        address=address,
        engine_args=settings.engine_args,
        decode=decode,
    )


class LearnerPart:
    """The learner and what it saves and resumes with."""

    def __init__(
        self,
        config: Config,
        folder: str,
        resume: Path | None,
        placement: Placement,
        *,
        address: str = "127.0.0.1",
        ranks: Ranks | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self._keep = config.checkpoint.keep
        self._tokenizer = load_tokenizer(folder, config.model)
        env = load_env(config.env.path, self._tokenizer, config.env.args)
        with memory.told("making the learner", memory.start_remedies(config), "the learner"):
            # Adapters come from a checkpoint by themselves, to the base that they were trained on.
            model = _learner_model(folder if resume is None or config.lora.rank else str(resume), placement, ranks)
            reference = None
            if config.loss.needs_reference and not config.lora.rank:  # of a resumed run it is that of its beginning
                reference = _learner_model(folder, placement, ranks)
            critic = None
            if config.loss.needs_critic and config.critic.backbone == "own":
                critic = _learner_model(config.critic.path or folder, placement, ranks, headless=True)
            self.learner = Learner(
                config,
                model,
                row_length(config, env.max_prompt_tokens),
                reference=reference,
                critic=critic,
                address=address,
                backend=placement.backend,
                ranks=ranks,
            )
            if resume is not None:
                if self.learner.adapters is not None:
                    self.learner.adapters.load(resume)
                else:
                    refuse_adapters(resume)
                self.learner.load_state(checkpoint.load_optimizer(resume), checkpoint.load_cursor(resume).version)
                checkpoint.load_random_state(resume)

    def save(self, root: Path, cursor: Cursor) -> None:
        """Writes a checkpoint at the first rank. Every rank."""
        if cursor.version != self.learner.version:
            raise RuntimeError(f"asked to save version {cursor.version}, the learner is at {self.learner.version}")
        learner, adapters = self.learner, self.learner.adapters
        weights, optimizer = learner.weights(), learner.state()
        more = partial(adapters.save, tensors=adapters.tensors(learner.ranks)) if adapters is not None else None
        if learner.ranks.is_first:
            checkpoint.save(
                root,
                cursor,
                learner.model,
                self._tokenizer,
                weights=weights,
                optimizer=optimizer,
                keep=self._keep,
                more=more,
            )


def _learner_model(path: str, placement: Placement, ranks: Ranks | None, *, headless: bool = False) -> nn.Module:
    """Ranks that will split a model get it in host memory, as one GPU may not hold it, and its values at the first."""
    if ranks is None:
        return load_model(path, dtype=torch.float32, device=placement.device, headless=headless)
    if ranks.is_first:
        return load_model(path, dtype=torch.float32, device="cpu", headless=headless)
    return empty_model(path)
