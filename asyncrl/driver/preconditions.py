"""The preconditions of a run, one list: each has a name, a check and a remedy. `launch/doctor.py` prints all of them,
and a run stops at the first that fails, before it makes a folder.

The order is that of a run: what is cheap, then what torch tells, then the cluster, then the model and the environment.
Rules are in `preflight.py`, facts in `machine.py`. Nothing heavy is imported here, so that a package that is missing is
a finding and not a traceback.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrl.config import cores
from asyncrl.config.schema import BUILT_IN, Config
from asyncrl.driver import machine, preflight
from asyncrl.driver.preflight import Check, Gpu
from asyncrl.utils.importing import interpreter

if TYPE_CHECKING:
    from asyncrl.envs.base import Env
    from asyncrl.types import Prompt


class Look:
    """What the checks look at, each found when it is first asked for. A run goes on with the environment of the check.

    `folder` is the run's, or that which it will be made in; `scratch` an empty folder, for a model made in code;
    `known` what policies without skill scored when a resumed run began.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        scratch: str,
        *,
        num_heldout: int | None = None,
        known: dict[str, float] | None = None,
    ) -> None:
        self.config, self.folder, self._scratch, self._known = config, folder, scratch, known
        self._num_heldout = config.eval.num_prompts if num_heldout is None else num_heldout

    @cached_property
    def joins(self) -> bool:
        """Whether the actors' machines may have other packages, GPUs and memory than this one."""
        return self.config.runtime == "cluster" and self.config.cluster.address is not None

    @cached_property
    def gpus(self) -> list[Gpu]:
        return machine.find_gpus()

    @cached_property
    def source(self) -> str:
        """Where the model's settings and its tokenizer are."""
        from asyncrl.models.loading import check_model
        from asyncrl.models.tiny import build_tiny

        path = self.config.model.path
        check_model(path)
        if path not in BUILT_IN:
            return path
        build_tiny(self._scratch, name=path, num_layers=self.config.model.num_layers, seed=self.config.seed)
        return self._scratch

    @cached_property
    def model(self) -> Any:
        """The model without memory for its weights."""
        from asyncrl.models.loading import described_model

        return described_model(self.source)

    @cached_property
    def tokenizer(self) -> Any:
        from asyncrl.models.loading import load_tokenizer

        return load_tokenizer(self.source, self.config.model)

    @cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def env(self) -> Env:
        from asyncrl.envs.base import load_env

        return load_env(self.config.env.path, self.tokenizer, self.config.env.args)

    @cached_property
    def heldout(self) -> list[Prompt]:
        from asyncrl.envs.base import heldout_prompts

        return heldout_prompts(self.env, self._num_heldout)

    @cached_property
    def baselines(self) -> dict[str, float]:
        """What policies without skill score on the held-out prompts; empty without eval.baseline."""
        from asyncrl.envs.base import no_skill

        return (self._known or no_skill(self.env, self.heldout)) if self.config.eval.baseline else {}

    @cached_property
    def cache_gb(self) -> float:
        """Of each embedded engine's keys and values."""
        return preflight.cache_bytes(self.config, self.model, self.env.max_prompt_tokens) / 1e9


@dataclass(frozen=True)
class Precondition:
    """`check` returns what it found, or raises an error with the rule and the remedy. `remedy` is for errors of others.
    `applies` tells which runs need it; it is left out where one of those that it `needs` has failed."""

    name: str
    check: Callable[[Look], str | Check]
    remedy: str = ""
    applies: Callable[[Look], bool] = lambda _look: True
    needs: tuple[str, ...] = ()


def examine(look: Look) -> Iterator[Check]:
    """A row for each precondition of the run."""
    failed: set[str] = set()
    for condition in PRECONDITIONS:
        if condition.applies(look) and failed.isdisjoint(condition.needs):
            row = tried(condition, look)
            if row.status == "FAIL":
                failed.add(condition.name)
            yield row


def require(look: Look) -> None:
    """Raises `ValueError` for the first precondition that the run does not meet."""
    for condition in PRECONDITIONS:
        if not condition.applies(look):
            continue
        try:
            found = condition.check(look)
        except OSError as error:
            raise ValueError(f"{condition.name}: {error}: {condition.remedy}") from error
        if isinstance(found, Check) and found.status == "FAIL":
            raise ValueError(f"{found.name}: {found.finding}: {found.remedy}")


def tried(condition: Precondition, look: Look) -> Check:
    """The row of one precondition, whatever its check raises: an environment is the user's code."""
    return preflight.attempt(condition.name, condition.remedy, lambda: condition.check(look))


def _packages(look: Look) -> str | Check:
    del look
    try:
        needed = metadata.requires("asyncrl") or []
        allowed = metadata.metadata("asyncrl")["Requires-Python"]
    except metadata.PackageNotFoundError:
        remedy = f"{interpreter()} -m pip install -e ."
        return Check("packages", "warn", "asyncrl is not installed here, and so its needs are unknown", remedy)
    return preflight.check_packages(needed, allowed, platform.python_version(), machine.installed)


def _sglang(look: Look) -> str | Check:
    """The package, what it was made for, and the attention of each kind of GPU that is here."""
    from asyncrl.engines.sglang import launch as sglang_launch

    sglang_launch.check_version()
    wanted, found = look.config.rollout.attention_backend, sglang_launch.available_attention_backends()
    kinds = sorted({gpu.capability for gpu in look.gpus}) if look.config.device != "cpu" else []
    chosen = [
        f"{sglang_launch.choose_attention_backend(wanted, kind, found)} for {kind[0]}.{kind[1]}" for kind in kinds
    ]
    told = ", ".join(chosen) or f"{sglang_launch.choose_attention_backend(wanted, None, found)} on the CPU"
    return preflight.check_transformers(metadata.requires("sglang") or [], machine.installed("transformers"), told)


def _peft(look: Look) -> str:
    from asyncrl.training.lora import check_peft

    del look
    check_peft()
    return machine.installed("peft") or ""


def _placement(look: Look) -> str | Check:
    from asyncrl.runtime.placement import check_resources, plan

    config, num_gpus, totals = look.config, len(look.gpus), None
    if config.runtime == "local":
        num_gpus = 0
    elif config.cluster.address is not None:
        totals = machine.join(config.cluster.address)
        num_gpus = int(totals.get("GPU", 0))
    found = plan(config, num_gpus)
    if config.runtime == "cluster":
        check_resources(config, machine.own_resources(config) if totals is None else totals)
    learner = f"{config.learner.num_gpus} x {found.learner_gpus:g} for the learner"
    shares = f"{learner}, {config.num_engines} x {found.rollout_gpus:g} GPUs"
    return f"{shares if found.device == 'cuda' else 'cpu'}, weights by {found.backend}"


def _threads(look: Look) -> Check:
    return preflight.check_threads(cores.with_limit(look.config), cores.count(), on_gpu=_on_gpu(look))


def _on_gpu(look: Look) -> bool:
    return look.config.device == "cuda" or (look.config.device == "auto" and bool(look.gpus))


def _learner_attention(look: Look) -> str:
    from asyncrl.models.loading import check_attention

    check_attention(look.config)
    return look.config.learner.attention


def _own_loss(look: Look) -> str:
    from asyncrl.runtime.build import check_own

    check_own(look.config)
    return ", ".join(path for path in (look.config.loss.function, look.config.loss.advantage) if path)


def _model(look: Look) -> str:
    size = f"{look.parameters / 1e6:,.1f} M parameters"
    return f"{look.config.model.path}, {size}, {len(look.tokenizer)} tokens"


def _model_files(look: Look) -> str:
    """Whether the files have every weight, and what is beside them can be saved again."""
    from asyncrl.models import pretrained

    with tempfile.TemporaryDirectory() as saved:
        pretrained.check(look.source, look.tokenizer, saved)
    return "every weight is there" if Path(look.source).is_dir() else "weights of the hub, which loading looks at"


def _adapters(look: Look) -> str:
    from asyncrl.runtime.build import check_targets

    check_targets(look.config, look.source)
    targets = look.config.lora.targets
    return f"rank {look.config.lora.rank}, {targets if isinstance(targets, str) else ', '.join(targets)}"


def _environment(look: Look) -> str:
    """Builds the environment, and draws prompts of each kind."""
    from asyncrl.driver.build import try_prompts

    config = look.config
    _ = look.baselines
    try_prompts(config, look.env)
    if config.warmup.num_steps and not hasattr(look.env, "demonstrations"):
        raise ValueError(f"{config.env.path} has no demonstrations(): set warmup.num_steps=0 or add the method")
    return f"{config.env.path}, first prompt of {len(look.heldout[0].token_ids)} tokens"


def _kv_cache(look: Look) -> str:
    length = look.env.max_prompt_tokens + look.config.rollout.max_new_tokens
    requests = f"{min(look.config.rollout.max_running, look.config.in_flight)} requests of {length} tokens"
    return f"{look.cache_gb * 1000:,.1f} MB in each engine, for {requests}"


def _context(look: Look) -> str:
    from asyncrl.models.loading import longest_context

    prompt, new = look.env.max_prompt_tokens, look.config.rollout.max_new_tokens
    most = longest_context(look.model.config)
    if most is not None and prompt + new > most:
        raise ValueError(
            f"a context may have {prompt + new} tokens (max_prompt_tokens of the environment is {prompt}, "
            f"rollout.max_new_tokens {new}) and the model has positions for {most} (max_position_embeddings): lower "
            f"them to {most} in all, or take a model with more"
        )
    return f"up to {prompt + new} tokens of {most or 'any number of'} positions"


def _memory(look: Look) -> Check:
    cache_gb = look.cache_gb if look.config.rollout.engine == "embedded" else 0.0
    have_gb = machine.available_gb()
    return preflight.check_host_memory(look.config, bool(look.gpus), look.parameters, have_gb, cache_gb)


def _gpu_memory(look: Look) -> Check:
    cache_gb = look.cache_gb if look.config.rollout.engine == "embedded" else 0.0
    return preflight.check_gpu_memory(look.config, look.parameters, look.gpus, cache_gb)


def _disk(look: Look) -> Check:
    free_gb = shutil.disk_usage(machine.nearest(look.folder)).free / 1e9
    return preflight.check_disk(look.config, look.parameters, free_gb)


def _metrics_port(look: Look) -> str:
    return machine.listen(look.config.metrics.prometheus_host, look.config.metrics.prometheus_port)


def _wandb(look: Look) -> Check:
    mode, has_key = os.environ.get("WANDB_MODE", ""), machine.has_wandb_key()
    return preflight.check_wandb(look.config.metrics.wandb, machine.installed("wandb"), mode, has_key)


def _here(look: Look) -> bool:
    return not look.joins


PRECONDITIONS = [
    Precondition("packages", _packages),
    Precondition("settings", lambda look: preflight.check_settings(look.config)),
    Precondition(
        "run folder", lambda look: machine.write(look.folder), "set run_dir to a folder that you may write to"
    ),
    Precondition("open files", lambda look: preflight.check_open_files(look.config, machine.open_files_limit())),
    Precondition(
        "ports",
        lambda look: preflight.check_ports(4 + 4 * look.config.num_engines, machine.bind_loopback),
        applies=lambda look: look.config.runtime == "cluster",
    ),
    Precondition(
        "metrics port",
        _metrics_port,
        "choose another metrics.prometheus_port",
        applies=lambda look: look.config.metrics.prometheus_port > 0,
    ),
    Precondition("wandb", _wandb, applies=lambda look: bool(look.config.metrics.wandb)),
    Precondition(
        "cluster",
        lambda look: machine.reach(look.config.cluster.address or ""),
        "start Ray there, or name another cluster.address",
        applies=lambda look: look.joins,
    ),
    Precondition("threads", _threads, applies=_here, needs=("packages",)),
    Precondition("gpus", lambda look: preflight.check_gpus(look.config, look.gpus), needs=("packages",)),
    Precondition(
        "cuda",
        lambda look: preflight.check_cuda(
            look.config.device, machine.cuda_build(), machine.find_driver(), len(look.gpus)
        ),
        applies=_here,
        needs=("packages",),
    ),
    Precondition("placement", _placement, "see `ray status`", needs=("packages", "cluster")),
    Precondition(
        "sglang",
        _sglang,
        applies=lambda look: look.config.rollout.engine == "sglang" and not look.joins,
        needs=("gpus",),
    ),
    Precondition("peft", _peft, applies=lambda look: look.config.lora.rank > 0 and not look.joins),
    Precondition(
        "learner attention",
        _learner_attention,
        applies=lambda look: look.config.learner.attention == "varlen",
    ),
    Precondition(
        "own loss",
        _own_loss,
        "see algorithm.preset and algorithm.loss.advantage",
        applies=lambda look: bool(look.config.loss.function or look.config.loss.advantage),
    ),
    Precondition("model", _model, "name 'tiny', a folder or a hub id in model.path", needs=("packages",)),
    Precondition("model files", _model_files, "see the files in model.path", needs=("model",)),
    Precondition("environment", _environment, "see env.path and env.args", needs=("model",)),
    Precondition("context", _context, needs=("environment",)),
    Precondition(
        "adapters",
        _adapters,
        "see lora.targets",
        applies=lambda look: look.config.lora.rank > 0,
        needs=("peft", "model"),
    ),
    Precondition(
        "kv cache",
        _kv_cache,
        "see rollout.max_running",
        applies=lambda look: look.config.rollout.engine == "embedded",
        needs=("environment",),
    ),
    Precondition("host memory", _memory, applies=_here, needs=("environment", "kv cache")),
    Precondition("gpu memory", _gpu_memory, applies=_here, needs=("environment", "kv cache")),
    Precondition("disk", _disk, needs=("model",)),
]
