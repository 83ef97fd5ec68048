"""What must hold between the knobs of a run. Each rule names the values that break it and the remedy."""

from __future__ import annotations

import math
import re
from datetime import date
from typing import Any

from asyncrl.algo.loss_spec import Loss
from asyncrl.config.schema import Config

_TEMPLATE_OWN = {"conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message"}


def check(config: Config) -> None:
    """The rules between knobs. Raises `ValueError` with the rule, the values and the remedy."""
    _check_least(config)
    _check_ranges(config)
    _check_clipping(config)
    _check_secrets(config.env.args, "env.args")
    _check_secrets(config.rollout.engine_args, "rollout.engine_args")
    _check_critic(config)
    _check_curriculum(config)
    _check_lora(config)
    _check_correction(config)
    _check_truncated(config)
    _check_proximal(config)
    _check_rollout(config)
    _check_watchdog(config)
    _check_template(config)
    if config.learner.num_gpus > 1 and config.runtime == "local":
        raise ValueError(
            f"learner.num_gpus is {config.learner.num_gpus} and runtime 'local' is one process: set runtime=cluster, "
            "or learner.num_gpus=1"
        )
    if config.eval.num_samples > 1 and config.eval.temperature == 0:
        raise ValueError(
            f"eval.num_samples is {config.eval.num_samples} and eval.temperature is 0: greedy samples of a prompt are "
            "all equal; set eval.temperature=1, or eval.num_samples=1"
        )


def _check_template(config: Config) -> None:
    try:
        date.fromisoformat(config.model.date or "2026-12-01")
    except ValueError as error:
        raise ValueError(f"model.date is {config.model.date!r}: write a day as YYYY-MM-DD, or leave it out") from error
    if taken := _TEMPLATE_OWN & config.model.template_args.keys():
        raise ValueError(
            f"model.template_args has {min(taken)!r}, which the run itself gives the template: leave it out"
        )


def _check_correction(config: Config) -> None:
    loss, rollout, buffer = config.loss, config.rollout, config.buffer
    if not loss.is_corrected and not config.algorithm.allow_uncorrected:
        remedy = "choose a corrected preset such as async_default, or set algorithm.allow_uncorrected=true"
        on_policy = ["buffer.max_staleness=0"] if buffer.max_staleness > 0 else []
        on_policy += ["buffer.reuse=1"] if buffer.reuse > 1 else []
        if on_policy:
            raise ValueError(
                f"off-policy training needs a corrected loss: buffer.max_staleness is {buffer.max_staleness}, "
                f"buffer.reuse is {buffer.reuse} and preset {config.algorithm.preset!r} has no importance correction; "
                f"{remedy}, or train with {' and '.join(on_policy)}"
            )
        if rollout.truncates:
            raise ValueError(
                f"truncated sampling needs a corrected loss: rollout.top_p is {rollout.top_p}, rollout.top_k is "
                f"{rollout.top_k} and preset {config.algorithm.preset!r} has no importance correction; set "
                "rollout.top_p=1 and rollout.top_k=0, choose a corrected preset such as tis2, or set "
                "algorithm.allow_uncorrected=true"
            )
    if rollout.group_size < 2 and loss.center in ("mean", "loo") and not loss.advantage:
        raise ValueError(
            f"a group baseline needs at least two samples: rollout.group_size is {rollout.group_size} and the preset's "
            f"center is {loss.center!r}; raise rollout.group_size, or set algorithm.loss.center=none and "
            "algorithm.loss.scale=none, or algorithm.loss.advantage to a function of your own"
        )
    num_samples = rollout.group_size * config.learner.groups_per_step
    if num_samples < 2 and loss.center == "batch" and not loss.advantage:
        raise ValueError(
            "a batch baseline needs at least two samples: rollout.group_size and learner.groups_per_step are 1 and the "
            "preset's center is 'batch', so that every advantage is 0; raise one of them, or set "
            "algorithm.loss.center=none"
        )
    grouped = rollout.group_size > 1 and (loss.center not in ("batch", "none") or loss.advantage)
    if config.algorithm.drop_zero_variance and not grouped:
        raise ValueError(
            "algorithm.drop_zero_variance drops groups of equal rewards because they teach nothing, but with "
            f"rollout.group_size={rollout.group_size} and center {loss.center!r} they do, or all groups are such: set "
            "algorithm.drop_zero_variance=false"
        )


def _check_truncated(config: Config) -> None:
    """The engine's log-probs are of what it draws from and the learner's of the whole vocabulary."""
    rollout = config.rollout
    if not rollout.truncates:
        return
    least = 0.0 if rollout.top_k > 0 else rollout.top_p  # top_k tokens may have any share of the probability
    if bounds := config.loss.removed_from(least):
        raise ValueError(
            f"with truncated sampling the ratio of even a fresh token is the share of the probability that was left to "
            f"draw from: rollout.top_p is {rollout.top_p} and rollout.top_k is {rollout.top_k}, so it may be as low as "
            f"{least:g}, and preset {config.algorithm.preset!r} removes tokens for that by {', '.join(bounds)}; set "
            "rollout.top_p=1 and rollout.top_k=0, widen that bound, or choose a preset without one, such as tis2, or "
            "tis_recompute, whose mask is on log-probs of the learner alone"
        )


def _check_proximal(config: Config) -> None:
    """A batch is one optimizer step, so the proximal policy is the one being trained and their ratio is always 1."""
    loss, off = config.loss, Loss()
    if loss.anchor != "proximal":
        return
    published = ("policy_weight", "trust", "trust_low", "trust_high", "trust_signed")  # part of decoupled PPO's formula
    idle = [
        f"{name} = {getattr(loss, name)}"
        for name in loss.__struct_fields__
        if name.startswith(("policy_", "trust", "penalty")) and name != "policy_factor"
        if getattr(loss, name) != getattr(off, name) and (name in config.algorithm.loss or name not in published)
    ]
    if idle:
        raise ValueError(
            f'with anchor = "proximal" nothing that acts on the ratio to it has an effect, as a batch is one optimizer '
            f"step and that ratio is 1; got {', '.join(idle)}: remove it, or set algorithm.loss.anchor=behavior and "
            "algorithm.loss.behavior_weight=none; behavior_* and guard do act"
        )


def _check_rollout(config: Config) -> None:
    rollout = config.rollout
    if rollout.engine == "embedded" and (rollout.tensor_parallel_size > 1 or rollout.engine_args):
        raise ValueError(
            f"rollout.tensor_parallel_size ({rollout.tensor_parallel_size}) and rollout.engine_args "
            f"({rollout.engine_args}) are for SGLang: set rollout.engine=sglang or leave them alone"
        )
    if rollout.engine == "sglang" and config.runtime == "local":
        raise ValueError("rollout.engine 'sglang' starts processes of its own: set runtime=cluster")
    if rollout.release_memory and (rollout.engine, config.placement) != ("sglang", "colocated"):
        raise ValueError(
            f"rollout.release_memory is for an SGLang engine that shares the learner's GPU: rollout.engine is "
            f"{rollout.engine!r} and placement is {config.placement!r}; set rollout.engine=sglang and "
            "placement=colocated, or rollout.release_memory=false"
        )
    if rollout.release_memory and rollout.on_update == "keep":
        raise ValueError(
            "rollout.on_update 'keep' keeps the cache that rollout.release_memory gives away: set "
            "rollout.on_update=recompute, or rollout.release_memory=false"
        )
    if config.algorithm.overlong_tail > rollout.max_new_tokens:
        raise ValueError(
            f"algorithm.overlong_tail ({config.algorithm.overlong_tail}) must be at most rollout.max_new_tokens "
            f"({rollout.max_new_tokens}): it is the last part of it; lower it"
        )
    if "" in rollout.stop:
        raise ValueError(f"rollout.stop has an empty text, which would end every reply: remove it, got {rollout.stop}")
    if rollout.temperature == 0:
        raise ValueError("rollout.temperature must be above 0: greedy samples of a group are all equal")


def _check_watchdog(config: Config) -> None:
    if config.watchdog.action == "restart" and config.runtime == "local":
        raise ValueError(
            "watchdog.action 'restart' kills a rollout actor and runtime 'local' has them in one process, where none "
            "can be: set watchdog.action=stop, or runtime=cluster"
        )
    if config.watchdog.action == "restart" and config.watchdog.timeout_s <= config.weights.timeout_s:
        raise ValueError(
            "watchdog.action 'restart' would kill all that wait in a broadcast for one that hangs: watchdog.timeout_s "
            f"must be above weights.timeout_s ({config.weights.timeout_s:g}), after which they wait no more, got "
            f"{config.watchdog.timeout_s:g}; raise the one or lower the other"
        )


_SECRET = re.compile(
    r"(^|_)(api_?key|password|secret|credentials|(hf|hub|auth|access|api|bearer)_?token)$", re.IGNORECASE
)


def _check_secrets(tables: dict[str, Any], prefix: str) -> None:
    """The configuration goes to the run folder, its command line too, and to every sink."""
    for key, value in tables.items():
        if isinstance(value, dict):
            _check_secrets(value, f"{prefix}.{key}")
        elif value and isinstance(value, str) and _SECRET.search(key):
            raise ValueError(
                f"{prefix}.{key} looks like a secret, and the configuration is written to the run folder: have the "
                "environment's code read it from an environment variable"
            )


def _check_critic(config: Config) -> None:
    if not config.loss.needs_critic:
        return
    if config.learner.num_gpus > 1:
        raise ValueError(
            f"a critic is not split between learner ranks: learner.num_gpus is {config.learner.num_gpus}; set "
            "learner.num_gpus=1, or choose a preset without a critic"
        )
    if config.critic.path and config.critic.backbone == "policy":
        raise ValueError(
            f"critic.path {config.critic.path!r} is the model of a critic of its own and critic.backbone is 'policy': "
            "set critic.backbone=own, or leave critic.path empty"
        )
    if config.algorithm.drop_zero_variance:
        raise ValueError(
            "algorithm.drop_zero_variance drops groups that teach nothing, and with a critic equal rewards do teach: "
            "set algorithm.drop_zero_variance=false"
        )


def _check_curriculum(config: Config) -> None:
    if not 0 <= config.curriculum.skip < 1:
        raise ValueError(
            f"curriculum.skip must be at least 0 and below 1, got {config.curriculum.skip}: what is always left out "
            "would never come back; 0.95 keeps one draw in twenty"
        )
    hard, easy = config.curriculum.bounds
    if not 0 <= hard < easy <= 1:
        raise ValueError(f"curriculum.bounds are pass rates with 0 <= hard < easy <= 1, got {hard} and {easy}")


def _check_lora(config: Config) -> None:
    targets = config.lora.targets
    if not targets or "" in list(targets):
        raise ValueError(f'lora.targets names no layers, got {targets!r}: name some, or set it to "all-linear"')
    if config.lora.sync == "adapter" and not config.lora.rank:
        raise ValueError("lora.sync 'adapter' sends adapters and lora.rank is 0: set lora.rank, or lora.sync=merged")
    if config.lora.sync == "adapter" and config.rollout.release_memory:
        raise ValueError(
            "lora.sync 'adapter' adds to weights that rollout.release_memory gives away: set lora.sync=merged, or "
            "rollout.release_memory=false"
        )


_AT_LEAST = {
    "num_steps": 1,
    "model.num_layers": 1,
    "warmup.num_steps": 0,
    "warmup.batch_size": 1,
    "warmup.micro_batch_size": 1,
    "rollout.num_actors": 1,
    "rollout.group_size": 1,
    "rollout.max_new_tokens": 1,
    "rollout.temperature": 0,
    "rollout.top_k": 0,
    "rollout.max_running": 1,
    "rollout.max_attempts": 1,
    "rollout.max_failed_prompts": 0,
    "rollout.max_replacements": 0,
    "rollout.start_timeout_s": 1,
    "env.timeout_s": 0.001,
    "learner.max_skipped_steps": 0,
    "rollout.num_threads": 1,
    "buffer.reuse": 1,
    "rollout.tensor_parallel_size": 1,
    "learner.num_gpus": 1,
    "lora.rank": 0,
    "lora.alpha": 1,
    "algorithm.overlong_tail": 0,
    "learner.groups_per_step": 1,
    "learner.learning_rate": 0,
    "learner.warmup_steps": 0,
    "learner.weight_decay": 0,
    "learner.row_tokens": 1,
    "learner.micro_batch_tokens": 1,
    "learner.head_chunk": 1,
    "learner.num_threads": 1,
    "critic.learning_rate": 0,
    "critic.num_updates": 1,
    "critic.warmup_steps": 0,
    "critic.clip": 0,
    "curriculum.visits": 1,
    "eval.every": 0,
    "eval.num_prompts": 1,
    "eval.num_samples": 1,
    "eval.temperature": 0,
    "eval.num_actors": 0,
    "eval.max_running": 1,
    "weights.bucket_mb": 0.001,
    "weights.timeout_s": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "journal.sync_s": 0.01,
    "watchdog.timeout_s": 0.1,
    "metrics.sample_trajectories": 0,
    "metrics.prometheus_port": 0,
}


def _check_clipping(config: Config) -> None:
    for name, norm in (("learner", config.learner.max_grad_norm), ("critic", config.critic.max_grad_norm)):
        if not 0 < norm < math.inf:
            raise ValueError(
                f"{name}.max_grad_norm must be above 0 and finite, got {norm}; for no clipping set it to 1e9"
            )


def _check_least(config: Config) -> None:
    for name, least in _AT_LEAST.items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        if value == "auto":
            continue
        if not value >= least:  # nor NaN
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if value == math.inf:
            raise ValueError(f"{name} must be finite, got {value}")


def _check_ranges(config: Config) -> None:
    if not -(2**63) <= config.seed < 2**63:
        raise ValueError(f"seed must be a whole number of 64 bits, from -2**63 to 2**63 - 1, got {config.seed}")
    if not 0 < config.rollout.gpu_memory_utilization < 1:
        raise ValueError(
            f"rollout.gpu_memory_utilization must be above 0 and below 1, got {config.rollout.gpu_memory_utilization}"
        )
    if not all(0 <= beta < 1 for beta in config.learner.betas):
        raise ValueError(f"learner.betas must each be at least 0 and below 1, got {list(config.learner.betas)}")
    for name, discount in (("gamma", config.critic.gamma), ("lam", config.critic.lam)):
        if not 0 <= discount <= 1:
            raise ValueError(f"critic.{name} must be from 0 to 1, got {discount}")
    for name, top_p in (("rollout", config.rollout.top_p), ("eval", config.eval.top_p)):
        if not 0 < top_p <= 1:
            raise ValueError(f"{name}.top_p must be above 0 and at most 1, got {top_p}")
    if config.buffer.max_staleness < 0:
        raise ValueError(f"buffer.max_staleness must be at least 0, got {config.buffer.max_staleness}")
    if config.buffer.window is not None and config.buffer.window < 1:
        raise ValueError(f"buffer.window must be at least 1, got {config.buffer.window}")
    if config.eval.pass_reward is not None and not math.isfinite(config.eval.pass_reward):
        raise ValueError(f"eval.pass_reward must be finite, got {config.eval.pass_reward}: leave it out for no mark")
    if config.metrics.prometheus_port > 65535:
        raise ValueError(f"metrics.prometheus_port must be at most 65535, got {config.metrics.prometheus_port}")
