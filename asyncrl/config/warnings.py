"""Settings that a run takes and that may not be what was meant: they change nothing in it, keep it from learning,
or end what is only slow.

They are told and not refused. A file with a [critic] table may be run with a preset that has no critic, to compare the
two, and a learning rate of 0 measures a system whose policy stays as it is. What cannot be meant is in `rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from asyncrl.algo.presets import PRESETS
from asyncrl.config.loading import to_tree
from asyncrl.config.schema import BUILT_IN, Config

_NEEDS: list[tuple[str, Callable[[Config], bool], tuple[str, ...]]] = [
    (f"model.path {' or '.join(BUILT_IN)}", lambda run: run.model.path in BUILT_IN, ("model.num_layers",)),
    (
        "warmup.num_steps above 0",
        lambda run: run.warmup.num_steps > 0,
        ("warmup.batch_size", "warmup.micro_batch_size", "warmup.learning_rate"),
    ),
    (
        "rollout.engine sglang",
        lambda run: run.rollout.engine == "sglang",
        ("rollout.gpu_memory_utilization", "rollout.attention_backend"),
    ),
    ("buffer.max_staleness above 0", lambda run: run.buffer.max_staleness > 0, ("buffer.window",)),
    (
        "critic.num_updates above 1",
        lambda run: not run.loss.needs_critic or run.critic.num_updates > 1,
        ("critic.clip",),
    ),
    ("learner.num_gpus above 1", lambda run: run.learner.num_gpus > 1, ("learner.reshard",)),
    ("lora.rank above 0", lambda run: run.lora.rank > 0, ("lora.alpha", "lora.targets")),
    ("a preset with center critic, such as ppo", lambda run: run.loss.needs_critic, ("critic",)),
    (
        "curriculum.by prompt or source",
        lambda run: run.curriculum.by != "off",
        ("curriculum.visits", "curriculum.bounds", "curriculum.skip"),
    ),
    ("eval.temperature above 0", lambda run: run.eval.temperature > 0, ("eval.top_p",)),
    (
        "runtime cluster",
        lambda run: run.runtime == "cluster",
        ("cluster", "rollout.num_threads", "rollout.start_timeout_s"),
    ),
    ("metrics.prometheus_port above 0", lambda run: run.metrics.prometheus_port > 0, ("metrics.prometheus_host",)),
]
"""What settings need to have an effect, whether a run has it, and which they are: single ones or a whole section. Those
of a loss are refused by `algo/presets.py`."""


def warnings(config: Config) -> list[str]:
    """A sentence for each that is not what it is by default and changes nothing, or does what is seldom wanted."""
    return [
        *_without_effect(config),
        *_without_learning(config),
        *_without_whole_vocabulary(config),
        *_without_room(config),
        *_without_patience(config),
    ]


def _without_effect(config: Config) -> Iterator[str]:
    now, default = to_tree(config), to_tree(Config())
    for words, is_met, names in _NEEDS:
        if is_met(config):
            continue
        changed = [name for name in _single(names, now) if _value(now, name) != _value(default, name)]
        if changed:
            told = ", ".join(f"{name}={_value(now, name)}" for name in changed)
            yield f"no effect in this run of {told}: that needs {words}"


def _without_learning(config: Config) -> Iterator[str]:
    critic = config.critic
    if config.learner.learning_rate == 0:
        yield "learner.learning_rate is 0: the policy stays as it is, which is for measurements"
    if config.loss.needs_critic and critic.learning_rate == 0:
        yield "critic.learning_rate is 0: the critic stays as it is, and begins with a head that expects nothing"
    if config.loss.needs_critic and critic.warmup_steps >= config.num_steps:
        yield (
            f"critic.warmup_steps is {critic.warmup_steps} and num_steps is {config.num_steps}: the critic learns "
            "alone to the end, and the policy stays as it is; raise num_steps, or lower critic.warmup_steps"
        )


def _without_whole_vocabulary(config: Config) -> Iterator[str]:
    rollout, loss = config.rollout, config.loss
    if not rollout.truncates:
        return
    effects = [
        (loss.trust in ("tv", "kl") and loss.anchor != "proximal", f"trust {loss.trust} may remove probable ones"),
        (loss.engine_weight == "sequence", "the weight of a sequence falls with every token of it"),
        (loss.penalty > 0, "the penalty pulls towards that part alone"),
    ]
    told = "".join(f"; {effect}" for happens, effect in effects if happens)
    yield (
        f"rollout.top_p is {rollout.top_p} and rollout.top_k is {rollout.top_k}: tokens are drawn from a part of the "
        "vocabulary and scored over all of it, so even fresh ones have a ratio below 1, the share of that part, which "
        f"mismatch/*, ess/* and their alarms show like staleness{told}; rollout.top_p=1 and rollout.top_k=0 avoid it"
    )


def _without_room(config: Config) -> Iterator[str]:
    """GSPO's range, which is published for the ratio of two policies of a learner, and here holds the engine's."""
    loss, published = config.loss, PRESETS["gspo"]
    judges = (loss.trust, loss.policy_weight) == (published.trust, published.policy_weight)
    narrow = loss.trust_low <= published.trust_low or loss.trust_high <= published.trust_high
    if not judges or loss.anchor == "proximal" or not narrow:
        return
    apart = [
        (config.buffer.max_staleness > 0, f"buffer.max_staleness is {config.buffer.max_staleness}"),
        (config.buffer.reuse > 1, f"buffer.reuse is {config.buffer.reuse}"),
        (config.rollout.dtype != "float32", f"rollout.dtype is {config.rollout.dtype}"),
        (config.learner.dtype == "bfloat16", f"learner.dtype is {config.learner.dtype}"),
    ]
    if told := " and ".join(reason for holds, reason in apart if holds):
        yield (
            f"algorithm.loss.trust_low is {loss.trust_low} and trust_high is {loss.trust_high} on the mean ratio of a "
            f"sequence to the engine, and {told}: rounding or one step takes many sequences beyond that, and they are "
            "removed, more of one sign of the advantage than of the other; widen both, such as to 0.03 and 0.04 for "
            "replies of a few tokens, until clip/removed_share is a small part (docs/guide.md)"
        )


def _without_patience(config: Config) -> Iterator[str]:
    action, timeout_s = config.watchdog.action, config.watchdog.timeout_s
    slow_s = config.rollout.max_attempts * config.env.timeout_s
    if action != "warn" and timeout_s <= slow_s:
        yield (
            f"watchdog.timeout_s is {timeout_s:g} s with action {action}, and a slow scorer may rightly take longer: "
            f"rollout.max_attempts x env.timeout_s is {slow_s:g} s, beside generation"
        )


def _single(names: Iterable[str], tree: dict[str, Any]) -> list[str]:
    """The settings that are named, one by one, and all of a section that is."""
    return [part for name in names for part in ([f"{name}.{key}" for key in tree[name]] if name in tree else [name])]


def _value(tree: dict[str, Any], name: str) -> Any:
    value: Any = tree
    for part in name.split("."):
        value = value[part]
    return value
