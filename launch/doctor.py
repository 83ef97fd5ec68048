"""Looks, before a run, at what the run will need: one row for each thing, with what was found and what to do.

python launch/doctor.py [CONFIG.toml] [section.key=value ...] [--start-ray]

Exit code: 0 when nothing failed, 1 when something did, 2 for a bad configuration. No weights are loaded. Needs of
memory and disk are rough: they count parameters, optimizer and processes, not activations and caches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from asyncrl.imports import interpreter
    from asyncrl.runtime.preflight import (
        Check,
        Gpu,
        attempt,
        check_cuda,
        check_disk,
        check_gpu_memory,
        check_gpus,
        check_host_memory,
        check_package,
        check_placement,
        check_ports,
        check_python,
        check_transformers,
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
    parser.add_argument("--start-ray", action="store_true", help="start Ray and stop it again, which takes seconds")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = resolve(options.words)
        return show(list(examine(config, options.start_ray)))
    except ImportError as error:
        print(f"error: {error} for {sys.executable}: run `{interpreter()} -m pip install -e .`", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def resolve(words: Sequence[str]) -> Config:
    """The configuration that the command line asks for; configs/largest_digit.toml when it names no file."""
    from asyncrl import config as configuration

    files = [word for word in words if "=" not in word] or [str(ROOT / "configs" / "largest_digit.toml")]
    if len(files) > 1:
        raise ValueError(f"one configuration file at most, got {', '.join(files)}")
    return configuration.load(files[0], [word for word in words if "=" in word])


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
    models: list[tuple[int, Any]] = []
    yield attempt("model", "name 'tiny', a folder or a hub id in model.path", lambda: read_model(config, models))
    for parameters, tokenizer in models:
        yield attempt("environment", "see env.path and env.args", lambda: draw_prompt(config, tokenizer))  # noqa: B023
        yield check_host_memory(config, bool(gpus), parameters, available_gb(Path("/proc/meminfo")))
        yield check_gpu_memory(config, parameters, gpus)
        yield check_disk(config, parameters, shutil.disk_usage(nearest(Path(config.run_dir))).free / 1e9)
    yield attempt("run folder", "set run_dir to a folder that you may write to", lambda: write(Path(config.run_dir)))
    if port := config.metrics.prometheus_port:
        host = config.metrics.prometheus_host
        yield attempt("metrics port", "choose another metrics.prometheus_port", lambda: listen(host, port))
    if config.runtime == "cluster":
        yield check_ports(4 + 4 * config.num_engines, bind_loopback)
        yield attempt(
            "ray start", "see the error; `ray stop` ends other Ray processes", lambda: try_ray(config, start_ray)
        )


def installed(name: str) -> str | None:
    """The version of an installed package."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def find_gpus() -> tuple[list[Gpu], str | None]:
    """The GPUs that torch sees, and the CUDA version that it was built for."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        gpus.append(Gpu(name, capability, free / 1e9, total / 1e9))
    return gpus, torch.version.cuda


def find_driver() -> str | None:
    """The version of NVIDIA's driver, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def attention(config: Config, gpus: Sequence[Gpu]) -> str:
    """SGLang's attention backend for each kind of GPU that is here."""
    from asyncrl.engine.sglang_launch import available_attention_backends, choose_attention_backend

    wanted, found = config.rollout.attention_backend, available_attention_backends()
    kinds = sorted({gpu.capability for gpu in gpus}) if config.device != "cpu" else []
    chosen = [f"{choose_attention_backend(wanted, kind, found)} for {kind[0]}.{kind[1]}" for kind in kinds]
    return ", ".join(chosen) or f"{choose_attention_backend(wanted, None, found)} on the CPU"


def read_model(config: Config, models: list[tuple[int, Any]]) -> str:
    """Reads settings and tokenizer; appends the rough number of parameters, and the tokenizer, to `models`."""
    from asyncrl.model import TINY, TINY_BYTES, build_tiny, check_model, load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = config.model.path
        check_model(path)
        if path in (TINY, TINY_BYTES):
            build_tiny(folder, name=path, num_layers=config.model.num_layers, seed=config.seed)
            path = folder
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
    models.append((parameters, tokenizer))
    return f"{config.model.path}, about {parameters / 1e6:,.1f} M parameters, {len(tokenizer)} tokens"


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


def draw_prompt(config: Config, tokenizer: Any) -> str:
    """Imports the environment, builds it and draws a prompt of each kind."""
    from asyncrl.envs.base import checked_prompts, heldout_prompts, load_env, no_skill

    env = load_env(config.env.path, tokenizer, config.env.args)
    heldout = heldout_prompts(env, most=1)
    no_skill(env, heldout)
    next(checked_prompts(env, "train", config.seed))
    if config.warmup.num_steps and not hasattr(env, "demonstrations"):
        raise ValueError(f"{config.env.path} has no demonstrations(): set warmup.num_steps=0 or add the method")
    return f"{config.env.path}, first prompt of {len(heldout[0].token_ids)} tokens"


def available_gb(meminfo: Path) -> float | None:
    """Memory that can still be taken; None where the system does not tell."""
    found = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 / 1e9 if found else None


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def write(folder: Path) -> str:
    """Writes a file to the nearest existing folder; nothing is left behind."""
    with tempfile.TemporaryFile(dir=nearest(folder)) as file:
        file.write(b"x")
    return f"{folder} can be written"


def bind_loopback(wanted: int) -> int:
    """Binds up to `wanted` free ports at once and lets go of them. Returns how many it got."""
    with contextlib.ExitStack() as stack:
        bound: list[socket.socket] = []
        with contextlib.suppress(OSError):
            while len(bound) < wanted:
                bound.append(stack.enter_context(socket.create_server(("127.0.0.1", 0))))
        return len(bound)


def listen(host: str, port: int) -> str:
    """Opens the port and lets go of it."""
    socket.create_server((host, port)).close()
    return f"{port} of {host} is free"


def try_ray(config: Config, start: bool) -> str:
    """Imports Ray and, where asked to, starts it or joins the cluster, and stops it again."""
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
