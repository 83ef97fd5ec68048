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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # imported where they are used, so that a missing package is a finding and not a traceback
    from asyncrl.config import Config

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}  # by CUDA major version: NVIDIA's table of minor-version compatibility
STORE_GB = 0.6  # Ray's object store as the run starts it
PROCESS_GB = {False: 0.5, True: 3.0}  # host memory of a process without and with a GPU, apart from its model


@dataclass(frozen=True)
class Check:
    """One row of the table. `remedy` is empty where nothing has to be done."""

    name: str
    status: Literal["ok", "warn", "FAIL"]
    finding: str
    remedy: str = ""


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it; memory in GB (1e9 bytes)."""

    name: str
    capability: tuple[int, int]
    free_gb: float
    total_gb: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml | section.key=value")
    parser.add_argument("--start-ray", action="store_true", help="start Ray and stop it again, which takes seconds")
    options = parser.parse_args(arguments)
    try:
        config = resolve(options.words)
        return show(list(examine(config, options.start_ray)))
    except ImportError as error:
        print(f"error: {error} (Python {platform.python_version()}): pip install --editable .", file=sys.stderr)
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
    sglang = config.rollout.engine == "sglang"
    extras = project["optional-dependencies"]["gpu"] if sglang else []
    yield check_python(platform.python_version(), project["requires-python"])
    for requirement in [*project["dependencies"], *extras]:
        yield check_package(requirement, installed)
    gpus, build = find_gpus()
    yield check_cuda(config.device, build, find_driver(), len(gpus))
    yield check_gpus(config, gpus)
    yield check_placement(config, len(gpus))
    if sglang:
        from asyncrl.engine.sglang_launch import SUPPORTED_VERSIONS

        yield check_sglang(installed("sglang"), SUPPORTED_VERSIONS)
        yield attempt("attention backend", "pip install 'asyncrl[gpu]'", lambda: attention(config, gpus))
    models: list[tuple[int, Any]] = []
    yield attempt("model", "name 'tiny', a folder or a hub id in model.path", lambda: read_model(config, models))
    for parameters, tokenizer in models:
        yield attempt("environment", "see env.path and env.args", lambda: draw_prompt(config, tokenizer))  # noqa: B023
        yield check_host_memory(config, bool(gpus), parameters, available_gb(Path("/proc/meminfo")))
        yield check_gpu_memory(config, parameters, gpus)
        yield check_disk(config, parameters, shutil.disk_usage(nearest(Path(config.run_dir))).free / 1e9)
    yield attempt("run folder", "set run_dir to a folder that you may write to", lambda: write(Path(config.run_dir)))
    if config.runtime == "cluster":
        yield check_ports(4 + 4 * config.rollout.num_actors, bind_loopback)
        yield attempt(
            "ray start", "see the error; `ray stop` ends other Ray processes", lambda: try_ray(config, start_ray)
        )


def attempt(name: str, remedy: str, action: Callable[[], str]) -> Check:
    """What `action` finds, or a failure with what it raises, whatever that is: an environment is the user's code.

    A `ValueError` of the project ends with a remedy of its own, which then stands in place of `remedy`.
    """
    try:
        return Check(name, "ok", action())
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        rule, own = re.fullmatch(r"(?:(.*)[:;] )?(.*)", text).groups()  # type: ignore[union-attr]
        if type(error) is ValueError and rule:
            return Check(name, "FAIL", rule, own)
        return Check(name, "FAIL", f"{type(error).__name__}: {text}", remedy)


def check_python(version: str, allowed: str) -> Check:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(allowed).contains(version, prereleases=True):
        return Check("python", "ok", version)
    return Check("python", "FAIL", f"{version}, needed is {allowed}", f"make the environment with Python {allowed}")


def check_package(requirement: str, version_of: Callable[[str], str | None]) -> Check:
    """Whether the version that `version_of` finds meets a line of the project's dependencies."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    found = version_of(wanted.name)
    if found is not None and wanted.specifier.contains(found, prereleases=True):
        return Check(wanted.name, "ok", found)
    finding = f"{found or 'not installed'}, needed is {wanted.specifier}"
    return Check(wanted.name, "FAIL", finding, f"pip install '{requirement}'")


def check_sglang(found: str | None, supported: Collection[str]) -> Check:
    """Whether the engine was run with this SGLang version."""
    if found in supported:
        return Check("sglang version", "ok", f"{found} is supported")
    wanted = " or ".join(supported)
    return Check("sglang version", "FAIL", f"{found or 'none'}, supported is {wanted}", f"install sglang {wanted}")


def check_cuda(device: str, build: str | None, driver: str | None, num_gpus: int) -> Check:
    """Torch's CUDA version (`build`, None for a CPU build) against the driver's version and what torch sees."""
    finding = f"torch for {'CUDA ' + build if build else 'CPU'}, driver {driver or 'none'}, {num_gpus} GPUs seen"
    if device == "cpu" or (num_gpus and build) or (device == "auto" and driver is None):
        return Check("cuda", "ok", finding)
    oldest = OLDEST_DRIVERS.get(int(build.split(".")[0]), 0) if build else 0
    if driver is None:
        remedy = "install NVIDIA's driver"
    elif build is None:
        remedy = "install a CUDA build of torch"
    elif int(driver.split(".")[0]) < oldest:
        remedy = f"update the driver to {oldest} or later, or install torch for an older CUDA"
    else:
        remedy = "see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return Check("cuda", "warn" if device == "auto" else "FAIL", finding, f"{remedy}; or set device=cpu")


def check_gpus(config: Config, gpus: Sequence[Gpu]) -> Check:
    """The GPUs and their compute capability; a warning where they lack the configured bfloat16."""
    finding = ", ".join("{} ({}.{})".format(gpu.name, *gpu.capability) for gpu in gpus) or "none"
    bfloat16 = config.learner.dtype != "float32" or config.rollout.dtype == "bfloat16"
    if bfloat16 and config.device != "cpu" and any(gpu.capability < (8, 0) for gpu in gpus):
        remedy = "set learner.dtype=float32 and rollout.dtype=float16"
        return Check("gpus", "warn", f"{finding}: bfloat16 needs compute capability 8.0", remedy)
    return Check("gpus", "ok", finding)


def check_placement(config: Config, num_gpus: int) -> Check:
    """Whether the GPUs suffice; a failure is only a warning where an existing cluster may have more of them."""
    from asyncrl.runtime.placement import plan

    def describe() -> str:
        found = plan(config, num_gpus)
        shares = f"{found.learner_gpus:g} for the learner, {config.rollout.num_actors} x {found.rollout_gpus:g} GPUs"
        return f"{shares if found.device == 'cuda' else 'cpu'}, weights by {found.backend}"

    check = attempt("placement", "", describe)
    return replace(check, status="warn") if check.status == "FAIL" and config.cluster.address else check


def compare(name: str, need: float, have: float, remedy: str) -> Check:
    """`need` against `have`, both in GB: more is a failure, more than 80 % of it a warning."""
    finding = f"about {need:.1f} GB needed, {have:.1f} GB free"
    if need <= 0.8 * have:
        return Check(name, "ok", finding)
    return Check(name, "warn" if need <= have else "FAIL", finding, remedy)


def model_gb(config: Config, parameters: int) -> tuple[float, float]:
    """Of the learner (float32 weights, gradients, two moments, the reference if any) and of one engine's weights."""
    learner = parameters * (20 if config.loss.needs_reference else 16) / 1e9
    return learner, parameters * BYTES[config.rollout.dtype] / 1e9 / config.rollout.tensor_parallel_size


def check_host_memory(config: Config, has_gpus: bool, parameters: int, have_gb: float | None) -> Check:
    """With every actor on this machine."""
    if have_gb is None:
        return Check("host memory", "warn", "unknown: there is no /proc/meminfo", "look with the system's own tools")
    on_gpu = config.device == "cuda" or (config.device == "auto" and has_gpus)
    learner, engine = model_gb(config, parameters)
    models = 0.0 if on_gpu else learner + config.rollout.num_actors * engine
    need = STORE_GB + (config.rollout.num_actors + 2) * PROCESS_GB[on_gpu] + models
    return compare("host memory", need, have_gb, "lower rollout.num_actors, or take a smaller model")


def check_gpu_memory(config: Config, parameters: int, gpus: Sequence[Gpu]) -> Check:
    """Of the fullest GPU, which the learner or an engine may get, or which all of them share."""
    if not gpus or config.device == "cpu":
        return Check("gpu memory", "ok", "no GPU is used")
    gpu = min(gpus, key=lambda gpu: gpu.free_gb)
    learner, engine = model_gb(config, parameters)
    shared = config.placement == "colocated"
    if config.rollout.engine == "sglang" and shared:  # it takes its share, whatever the model
        engine = max(engine, config.rollout.gpu_memory_utilization * gpu.total_gb)
    need = learner + config.rollout.num_actors * engine if shared else max(learner, engine)
    return compare("gpu memory", need, gpu.free_gb, "lower rollout.gpu_memory_utilization, or take a smaller model")


def check_disk(config: Config, parameters: int, free_gb: float) -> Check:
    """For checkpoints of weights and two moments; one more than are kept exists while it is written."""
    need = (config.checkpoint.keep + 1) * parameters * 12 / 1e9 + 0.1
    return compare("disk", need, free_gb, "free some space, lower checkpoint.keep, or move run_dir")


def check_ports(wanted: int, bind: Callable[[int], int]) -> Check:
    """Whether `bind` gets as many ports at once as the run's processes listen on."""
    found = bind(wanted)
    if found == wanted:
        return Check("ports", "ok", f"{wanted} free ports on 127.0.0.1")
    return Check("ports", "FAIL", f"{found} of {wanted} ports on 127.0.0.1", "see `ss -ltn` and `ulimit -n`")


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
    from asyncrl.model import TINY, build_tiny, load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = config.model.path
        if path == TINY:
            build_tiny(folder, num_layers=config.model.num_layers, seed=config.seed)
            path = folder
        tokenizer = load_tokenizer(path)
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
    """Imports the environment, builds it and draws one prompt."""
    from asyncrl.envs.base import load_env

    env = load_env(config.env.path, tokenizer, config.env.args)
    prompt = next(env.prompts("heldout", 0))
    if config.warmup.num_steps and not hasattr(env, "demonstrations"):
        raise ValueError(f"{config.env.path} has no demonstrations(): set warmup.num_steps=0 or add the method")
    return f"{config.env.path}, first prompt of {len(prompt.token_ids)} tokens"


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
