"""The rules of preconditions: what a run needs against what was found. `machine.py` finds it, `preconditions.py` has
the list of them.

Each check is a function of facts and returns one row. Needs of memory and disk are rough: they count parameters,
optimizer and processes, not activations and caches. Nothing heavy is imported here, so that a package that is missing
is a finding and not a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from asyncrl.utils.importing import interpreter

if TYPE_CHECKING:
    from asyncrl.config.schema import Config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}  # by CUDA major version: NVIDIA's table of minor-version compatibility
STORE_GB = 0.6  # Ray's object store as the run starts it
FILES_OF_A_RUN, FILES_OF_AN_ACTOR = 100, {"local": 20, "cluster": 4}  # measured: 19 and 2
# Host memory of a process without and with a GPU, apart from its model, and what it has at least. Measured on a
# host with H200s: 2.1 GiB of the learner, 0.8 of a rollout actor and 1.8 of the SGLang scheduler that it starts.
PROCESS_GB, LEAST_PROCESS_GB = {False: 0.5, True: 2.8}, {False: 0.2, True: 0.8}


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


def attempt(name: str, remedy: str, action: Callable[[], str | Check]) -> Check:
    """What `action` finds; a failure where it raises, whatever that is, as an environment is the user's code.

    A `ValueError` of the project ends with a remedy of its own, which then stands in place of `remedy`.
    """
    try:
        found = action()
        return found if isinstance(found, Check) else Check(name, "ok", found)
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        rule, own = re.fullmatch(r"(?:(.*)[:;] )?(.*)", text).groups()  # type: ignore[union-attr]
        if type(error) is ValueError and rule:
            return Check(name, "FAIL", rule, own)
        return Check(name, "FAIL", f"{type(error).__name__}: {text}", remedy)


def check_packages(
    requirements: Sequence[str], allowed: str, python: str, version_of: Callable[[str], str | None]
) -> Check:
    """Whether Python and the packages that every run needs have the versions that the project's metadata ask for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(allowed).contains(python, prereleases=True):
        finding = f"Python {python}, needed is {allowed}"
        return Check("packages", "FAIL", finding, f"make the environment with Python {allowed}")
    wanted = [one for one in map(Requirement, requirements) if one.marker is None]
    found = {one.name: version_of(one.name) for one in wanted}
    short = [
        one
        for one in wanted
        if (version := found[one.name]) is None or not one.specifier.contains(version, prereleases=True)
    ]
    if not short:
        return Check("packages", "ok", ", ".join([f"Python {python}", *(f"{name} {found[name]}" for name in found)]))
    finding = ", ".join(f"{one.name} {found[one.name] or 'not installed'}, needed is {one.specifier}" for one in short)
    return Check("packages", "FAIL", finding, _install(*map(str, short)))


def check_transformers(requirements: Sequence[str], found: str | None, attention: str) -> Check:
    """Whether SGLang, whose metadata has these `requirements`, knows the version that is installed. `attention` is what
    else is told where it does."""
    from packaging.requirements import Requirement

    wanted = next((one for one in map(Requirement, requirements) if one.name == "transformers"), None)
    if found is None or wanted is None or wanted.specifier.contains(found, prereleases=True):
        return Check("sglang", "ok", f"transformers {found}, attention {attention}")
    finding = (
        f"transformers {found}, and sglang was made for {wanted.specifier}: another may fail when the engine starts"
    )
    return Check("sglang", "warn", finding, _install(f"transformers{wanted.specifier}"))


def _install(*requirements: str) -> str:
    """For the environment that the run will have, whatever `pip` is found first."""
    return f"{interpreter()} -m pip install {' '.join(map(repr, requirements))}"


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
    """The GPUs and their compute capability; a failure where the configuration is made for some and there are none, a
    warning where they lack the configured bfloat16, or where a cluster may have others."""
    needy = config.device == "cuda" or (config.rollout.engine == "sglang" and config.device == "auto")
    if needy and not gpus:
        remedy = (
            "take a machine with a GPU, or a configuration that needs none, such as configs/quickstart_cpu.toml or "
            "configs/smollm2_135m_cpu.toml; or set device=cpu"
        )
        status: Literal["warn", "FAIL"] = "warn" if config.cluster.address else "FAIL"
        return Check("gpus", status, "none here, and the configuration is made for GPUs", remedy)
    finding = ", ".join("{} ({}.{})".format(gpu.name, *gpu.capability) for gpu in gpus) or "none"
    bfloat16 = config.learner.dtype != "float32" or config.rollout.dtype == "bfloat16"
    if bfloat16 and config.device != "cpu" and any(gpu.capability < (8, 0) for gpu in gpus):
        remedy = "set learner.dtype=float32 and rollout.dtype=float16"
        return Check("gpus", "warn", f"{finding}: bfloat16 needs compute capability 8.0", remedy)
    return Check("gpus", "ok", finding)


def compare(name: str, need: float, have: float, remedy: str, least: float | None = None) -> Check:
    """`need` against `have`, both in GB: more than 80 % of it is a warning, and more than all of it a failure, for an
    estimate that may be too high by its lower bound `least`."""
    finding = f"about {need:.1f} GB needed, {have:.1f} GB free"
    if need <= 0.8 * have:
        return Check(name, "ok", finding)
    return Check(name, "warn" if (need if least is None else least) <= have else "FAIL", finding, remedy)


def model_gb(config: Config, parameters: int) -> tuple[float, float]:
    """Of the learner (float32 weights, gradients, two moments; reference, critic) and of one engine's weights.

    With LoRA the learner's weights have neither, and count as they are loaded, in float32; adapters count for nothing.
    An SGLang engine that gets adapters alone has two copies of its layers.
    """
    critic = 16 if config.loss.needs_critic and config.critic.backbone == "own" else 0
    policy = 4 if config.lora.rank else 20 if config.loss.needs_reference else 16
    copies = 2 if config.lora.sync == "adapter" and config.rollout.engine == "sglang" else 1
    engine = parameters * copies * BYTES[config.rollout.dtype] / config.rollout.tensor_parallel_size
    return parameters * (policy + critic) / 1e9, engine / 1e9


def saved_gb(config: Config, parameters: int) -> float:
    """Of a checkpoint: float32 weights, and the two moments of what is trained."""
    return parameters * (4 if config.lora.rank else 12) / 1e9


def check_host_memory(
    config: Config, has_gpus: bool, parameters: int, have_gb: float | None, cache_gb: float = 0.0
) -> Check:
    """With every actor on this machine; `cache_gb` is of each embedded engine."""
    if have_gb is None:
        return Check("host memory", "warn", "unknown: there is no /proc/meminfo", "look with the system's own tools")
    on_gpu = config.device == "cuda" or (config.device == "auto" and has_gpus)
    learner, engine = model_gb(config, parameters)
    models = learner + config.num_engines * (engine + cache_gb)
    if on_gpu:  # several learner ranks, or LoRA, put a checkpoint together in it
        models = saved_gb(config, parameters) if config.learner.num_gpus > 1 or config.lora.rank else 0.0
    actors = config.num_engines + config.learner.num_gpus if config.runtime == "cluster" else 0
    need = (1 + actors) * PROCESS_GB[on_gpu] + models + (STORE_GB if actors else 0.0)
    least = (1 + actors) * LEAST_PROCESS_GB[on_gpu] + models  # the store takes memory as it is filled
    knobs = "rollout.num_actors or rollout.max_running" if cache_gb and not on_gpu else "rollout.num_actors"
    return compare("host memory", need, have_gb, f"lower {knobs}, or take a smaller model", least)


def check_gpu_memory(config: Config, parameters: int, gpus: Sequence[Gpu], cache_gb: float = 0.0) -> Check:
    """Of the fullest GPU, which the learner or an engine may get, or which all of them share; `cache_gb` as above."""
    if not gpus or config.device == "cpu":
        return Check("gpu memory", "ok", "no GPU is used")
    gpu = min(gpus, key=lambda gpu: gpu.free_gb)
    learner, engine = model_gb(config, parameters)
    learner, engine = learner / config.learner.num_gpus, engine + cache_gb
    shared = config.placement == "colocated"
    if config.rollout.engine == "sglang" and shared:  # it takes its share, whatever the model
        engine = max(engine, config.rollout.gpu_memory_utilization * gpu.total_gb)
    beside = learner * 3 / 4 if config.rollout.release_memory else learner  # its gradients exist while engines give way
    need = beside + config.num_engines * engine if shared else max(learner, engine)
    knob = "gpu_memory_utilization" if config.rollout.engine == "sglang" else "max_running"
    return compare("gpu memory", need, gpu.free_gb, f"lower rollout.{knob}, or take a smaller model")


def check_disk(config: Config, parameters: int, free_gb: float) -> Check:
    """For checkpoints of weights and two moments; one more than are kept exists while it is written."""
    need = (config.checkpoint.keep + 1) * saved_gb(config, parameters) + 0.1
    return compare("disk", need, free_gb, "free some space, lower checkpoint.keep, or move run_dir")


def check_open_files(config: Config, limit: int) -> Check:
    """Whether the driver may have as many files and sockets open as its actors take of it."""
    each = FILES_OF_AN_ACTOR[config.runtime]
    need = FILES_OF_A_RUN + each * config.num_engines
    finding = f"about {need} needed for {config.num_engines} engines, {limit:,} allowed"
    if need <= limit:
        return Check("open files", "ok", finding)
    return Check("open files", "FAIL", finding, f"run `ulimit -n {2 * need}` before, or lower rollout.num_actors")


def check_ports(wanted: int, bind: Callable[[int], int]) -> Check:
    """Whether `bind` gets as many ports at once as the run's processes listen on."""
    found = bind(wanted)
    if found == wanted:
        return Check("ports", "ok", f"{wanted} free ports on 127.0.0.1")
    return Check("ports", "FAIL", f"{found} of {wanted} ports on 127.0.0.1", "see `ss -ltn` and `ulimit -n`")


def cache_bytes(config: Config, model: Any, max_prompt_tokens: int) -> int:
    """Of an embedded engine's keys and values, whose rules for a model see `model`, which takes no memory."""
    from torch import nn

    from asyncrl.engines.embedded.kv_cache import SlotCache
    from asyncrl.weights.buckets import DTYPES

    nn.Module.to(model, "meta", DTYPES[config.rollout.dtype])
    length = max_prompt_tokens + config.rollout.max_new_tokens
    return SlotCache(model, min(config.rollout.max_running, config.in_flight), length).num_bytes


def check_settings(config: Config) -> Check:
    """What `launch/run.py` warns of when it starts."""
    from asyncrl.config.warnings import warnings

    if told := warnings(config):
        return Check("settings", "warn", "\n".join(told), "see whether it is meant")
    return Check("settings", "ok", "nothing to warn of")


def check_threads(config: Config, cores: int, *, on_gpu: bool = False) -> Check:
    """Whether the learner's threads and the engines' have a core each, and, where numbers were set and no GPU computes,
    whether they leave half of the cores idle. In one process all threads are the learner's."""
    from asyncrl.config.cores import share

    threads = share(config, cores)
    learner = config.learner.num_gpus * threads.learner
    engines = config.num_engines * threads.engine if config.runtime == "cluster" else 0
    finding = f"{learner} of the learner and {engines} of engines on {cores} CPU cores"
    set_by_hand = "auto" not in (config.learner.num_threads, config.rollout.num_threads)
    if learner + engines > cores:
        remedy = "lower rollout.num_actors"
        if set_by_hand:
            remedy += ", or set rollout.num_threads and learner.num_threads to auto, without OMP_NUM_THREADS"
        return Check("threads", "warn", f"{finding}: they slow each other down", remedy)
    if set_by_hand and not on_gpu and config.runtime == "cluster" and 2 * (learner + engines) <= cores:
        remedy = (
            "set rollout.num_threads=auto and learner.num_threads=auto, without OMP_NUM_THREADS, unless it is meant"
        )
        return Check("threads", "warn", f"{finding}: {cores - learner - engines} of them idle", remedy)
    return Check("threads", "ok", finding)


def check_wandb(project: str, version: str | None, mode: str, has_key: bool) -> Check:
    """Whether the package is there and can log in: `mode` is WANDB_MODE, and `has_key` whether a key was found."""
    if version is None:
        finding = f"metrics.wandb is {project!r} and the package is not installed"
        return Check("wandb", "FAIL", finding, f"{_install('wandb')}, or leave metrics.wandb empty")
    if mode in ("offline", "dryrun", "disabled"):
        return Check("wandb", "ok", f"{version}, {mode}")
    if has_key:
        return Check("wandb", "ok", f"{version}, with a key")
    finding = f"{version}, and no key: it asks for one, and without a terminal the run ends"
    return Check("wandb", "warn", finding, "run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")
