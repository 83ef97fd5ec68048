"""Looks, before a run, at what the run will need: one row for each thing, with what was found and what to do.

python launch/doctor.py [CONFIG.toml] [--num-rollout-actors 4] [section.key=value ...] [--resume RUN_DIR] [--start-ray]

The words are those of launch/run.py; --watch and --dry-run are taken, too, and change nothing here.
Exit code: 0 when nothing failed, 1 when something did, 2 for a bad configuration. No weights are loaded. Needs of
memory and disk are rough: they count parameters, optimizer and processes, not activations and caches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from asyncrl.imports import interpreter
    from asyncrl.runtime.machine import (
        available_gb,
        bind_loopback,
        count_cores,
        find_driver,
        find_gpus,
        has_wandb_key,
        installed,
        listen,
        nearest,
        reach,
        show_token,
        write,
    )
    from asyncrl.runtime.preflight import (
        Check,
        Gpu,
        attempt,
        attempt_for,
        check_cuda,
        check_disk,
        check_gpu_memory,
        check_gpus,
        check_host_memory,
        check_package,
        check_placement,
        check_ports,
        check_python,
        check_settings,
        check_threads,
        check_transformers,
        check_wandb,
    )
    from asyncrl.tables import Parser
except ImportError as error:
    sys.exit(
        f"error: {error} for {sys.executable}: run `make .venv/installed` and take .venv/bin/python, or "
        f"`{sys.executable} -m pip install -e .`"
    )

if TYPE_CHECKING:  # imported where they are used, so that a missing package is a finding and not a traceback
    from asyncrl.config import Config

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml | section.key=value")
    parser.add_argument("--num-rollout-actors", type=int, metavar="N", help="short for rollout.num_actors=N")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="look at what going on with a run will need")
    for flag in ("--watch", "--dry-run"):
        parser.add_argument(flag, action="store_true", help="as launch/run.py has it; changes nothing here")
    parser.add_argument("--start-ray", action="store_true", help="start Ray and stop it again, which takes seconds")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = resolve(options.words, options.num_rollout_actors, options.resume)
        return show(list(examine(config, options.start_ray)))
    except ImportError as error:
        print(f"error: {error} for {sys.executable}: run `{interpreter()} -m pip install -e .`", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def resolve(words: Sequence[str], num_actors: int | None = None, resume: Path | None = None) -> Config:
    """The configuration that the command line asks for; configs/largest_digit.toml when it names no file. Raises
    `ValueError` for one that the run to `resume` cannot go on with, too."""
    from asyncrl import config as configuration
    from asyncrl import run_folder

    default = ROOT / "configs" / "largest_digit.toml"
    config = configuration.from_words(words, default, num_actors=num_actors, resume=resume)
    if resume is not None:
        run_folder.differences(resume, config)
    return config


def show(checks: Sequence[Check]) -> int:
    """Prints the table and a last line. Returns the exit code."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "status", "finding", "remedy")
    for check in checks:
        table.add_row(check.name, Text(check.status, COLOURS[check.status]), Text(check.finding), Text(check.remedy))
    counts = {status: sum(check.status == status for check in checks) for status in COLOURS}
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["FAIL"] else 0


def examine(config: Config, start_ray: bool) -> Iterator[Check]:
    """Every check of this machine, in the order of the table."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    gpus, build = find_gpus()
    seen = check_gpus(config, gpus)
    sglang = config.rollout.engine == "sglang" and seen.status != "FAIL"  # without a GPU it would be of no use
    wanted = {"gpu": sglang, "lora": config.lora.rank > 0}
    extras = [line for name, lines in project["optional-dependencies"].items() if wanted.get(name) for line in lines]
    yield seen
    yield check_cuda(config.device, build, find_driver(), len(gpus))
    yield check_placement(config, len(gpus))
    yield check_python(platform.python_version(), project["requires-python"])
    for requirement in [*project["dependencies"], *extras]:
        yield check_package(requirement, installed)
    if sglang:
        if installed("sglang"):
            yield check_transformers(metadata.requires("sglang") or [], installed("transformers"))
        yield attempt("attention backend", "see the row of sglang", lambda: attention(config, gpus))
    yield check_settings(config)
    if config.learner.attention == "varlen":
        yield attempt("learner attention", "see learner.attention", lambda: try_attention(config))
    if config.loss.function or config.loss.advantage:
        yield attempt("own loss", "see algorithm.preset and algorithm.loss.advantage", lambda: try_loss(config))
    with tempfile.TemporaryDirectory() as scratch:
        yield from examine_model(config, scratch, gpus)
    yield attempt("run folder", "set run_dir to a folder that you may write to", lambda: write(Path(config.run_dir)))
    if port := config.metrics.prometheus_port:
        host = config.metrics.prometheus_host
        yield attempt("metrics port", "choose another metrics.prometheus_port", lambda: listen(host, port))
    if project_name := config.metrics.wandb:
        yield check_wandb(project_name, installed("wandb"), os.environ.get("WANDB_MODE", ""), has_wandb_key())
    address = config.cluster.address if config.runtime == "cluster" else None
    if address is None:
        yield check_threads(config, count_cores())
    else:
        yield attempt("cluster", "start Ray there, or name another cluster.address", lambda: reach(address))
    if config.runtime == "cluster":
        yield check_ports(4 + 4 * config.num_engines, bind_loopback)
        yield attempt(
            "ray start", "see the error; `ray stop` ends other Ray processes", lambda: try_ray(config, start_ray)
        )


def examine_model(config: Config, scratch: str, gpus: Sequence[Gpu]) -> Iterator[Check]:
    """The checks that read the model's settings, and those that need what they say."""
    remedy = "name 'tiny', a folder or a hub id in model.path"
    check, model = attempt_for("model", remedy, lambda: read_model(config, scratch))
    yield check
    if model is None:
        return
    folder, parameters, tokenizer = model
    if config.lora.rank:
        yield attempt("adapters", "see lora.targets", lambda: try_targets(config, folder))
    check, longest = attempt_for("environment", "see env.path and env.args", lambda: draw_prompt(config, tokenizer))
    yield check
    cache_gb = 0.0
    if longest is not None and config.rollout.engine == "embedded":
        check, found = attempt_for("kv cache", "see rollout.max_running", lambda: size_cache(config, folder, longest))
        yield check
        cache_gb = (found or 0) / 1e9
    yield check_host_memory(config, bool(gpus), parameters, available_gb(Path("/proc/meminfo")), cache_gb)
    yield check_gpu_memory(config, parameters, gpus, cache_gb)
    yield check_disk(config, parameters, shutil.disk_usage(nearest(Path(config.run_dir))).free / 1e9)


def attention(config: Config, gpus: Sequence[Gpu]) -> str:
    """SGLang's attention backend for each kind of GPU that is here."""
    from asyncrl.engine.sglang_launch import available_attention_backends, choose_attention_backend

    wanted, found = config.rollout.attention_backend, available_attention_backends()
    kinds = sorted({gpu.capability for gpu in gpus}) if config.device != "cpu" else []
    chosen = [f"{choose_attention_backend(wanted, kind, found)} for {kind[0]}.{kind[1]}" for kind in kinds]
    return ", ".join(chosen) or f"{choose_attention_backend(wanted, None, found)} on the CPU"


def try_attention(config: Config) -> str:
    """Whether the learner can have the attention that is asked for, as far as it shows without a model."""
    from asyncrl.model import check_attention

    check_attention(config)
    return config.learner.attention


def try_loss(config: Config) -> str:
    """Imports the user's loss and advantages, and calls them where the learner would compute on this CPU."""
    from asyncrl.runtime.parts import check_own

    check_own(config)
    return ", ".join(path for path in (config.loss.function, config.loss.advantage) if path)


def read_model(config: Config, scratch: str) -> tuple[str, tuple[str, int, Any]]:
    """Reads settings and tokenizer, of a model made in code from the empty folder `scratch`. Returns where they are,
    the rough number of parameters and the tokenizer, too."""
    from asyncrl.config import BUILT_IN
    from asyncrl.model import check_model, load_tokenizer
    from asyncrl.tiny import build_tiny

    path = config.model.path
    check_model(path)
    if path in BUILT_IN:
        build_tiny(scratch, name=path, num_layers=config.model.num_layers, seed=config.seed)
        path = scratch
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        if Path(path).exists():
            raise
        raise ValueError(
            f"{path!r} is neither a folder here nor a model that the hub gave: make the folder "
            f"(`{interpreter()} launch/prepare_model.py` does so from GGUF), or name another in model.path"
        ) from error
    parameters = count_parameters(read_settings(path))
    finding = f"{config.model.path}, about {parameters / 1e6:,.1f} M parameters, {len(tokenizer)} tokens"
    return finding, (path, parameters, tokenizer)


def read_settings(path: str) -> dict[str, Any]:
    """The model's config.json, from a folder or from the hub."""
    from huggingface_hub import hf_hub_download

    file = Path(path) / "config.json" if Path(path).is_dir() else Path(hf_hub_download(path, "config.json"))
    settings: dict[str, Any] = json.loads(file.read_text())
    return settings


def count_parameters(settings: dict[str, Any]) -> int:
    """Of a dense or mixture-of-experts decoder with these settings: attention, gated MLPs and embeddings."""
    settings = settings.get("text_config", settings)
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    head = settings.get("head_dim") or width // heads
    attention_size = 2 * width * head * (heads + (settings.get("num_key_value_heads") or heads))
    experts = settings.get("num_experts") or settings.get("num_local_experts") or 1
    mlp_size = 3 * width * (settings.get("moe_intermediate_size") or settings["intermediate_size"]) * experts
    embeddings = settings["vocab_size"] * width * (1 if settings.get("tie_word_embeddings") else 2)
    return int(settings["num_hidden_layers"] * (attention_size + mlp_size) + embeddings)


def try_targets(config: Config, folder: str) -> str:
    """Puts adapters into a model without weights."""
    from asyncrl.runtime.parts import check_targets

    check_targets(config, folder)
    targets = config.lora.targets
    return f"rank {config.lora.rank}, {targets if isinstance(targets, str) else ', '.join(targets)}"


def size_cache(config: Config, folder: str, max_prompt_tokens: int) -> tuple[str, int]:
    """Makes an embedded engine's cache without memory, which its rules for a model see. Returns its bytes, too."""
    from torch import nn

    from asyncrl.engine.kv_cache import SlotCache
    from asyncrl.model import empty_model
    from asyncrl.weights import DTYPES

    model, length = empty_model(folder), max_prompt_tokens + config.rollout.max_new_tokens
    nn.Module.to(model, "meta", DTYPES[config.rollout.dtype])
    num_bytes = SlotCache(model, config.rollout.max_running, length).num_bytes
    requests = f"{config.rollout.max_running} requests of {length} tokens"
    return f"{num_bytes / 1e6:,.1f} MB in each engine, for {requests}", num_bytes


def draw_prompt(config: Config, tokenizer: Any) -> tuple[str, int]:
    """Imports the environment, builds it and draws a prompt of each kind. Returns the tokens of its longest, too."""
    from asyncrl.envs.base import checked_prompts, heldout_prompts, load_env, no_skill

    env = load_env(config.env.path, tokenizer, config.env.args)
    heldout = heldout_prompts(env, most=1)
    if config.eval.baseline:
        no_skill(env, heldout)
    next(checked_prompts(env, "train", config.seed))
    if config.warmup.num_steps and not hasattr(env, "demonstrations"):
        raise ValueError(f"{config.env.path} has no demonstrations(): set warmup.num_steps=0 or add the method")
    return f"{config.env.path}, first prompt of {len(heldout[0].token_ids)} tokens", env.max_prompt_tokens


def try_ray(config: Config, start: bool) -> str:
    """Imports Ray and, where asked to, starts it or joins the cluster, and stops it again."""
    show_token(config.cluster.address)
    import ray

    if not start:
        return f"{ray.__version__} can be imported; --start-ray starts it"
    own: dict[str, Any] = {} if config.cluster.address else {"include_dashboard": False}
    ray.init(address=config.cluster.address or "local", log_to_driver=False, **own)
    try:
        return f"started with {ray.cluster_resources().get('GPU', 0):g} GPUs"
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
