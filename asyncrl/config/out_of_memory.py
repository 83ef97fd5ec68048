"""Memory that ran out, told once: what was asked for, what there was, who held it, and which settings to change.

Of this machine's memory, and of a GPU's; the settings are in order of their effect, and each caller gives its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from asyncrl.config.schema import Config

_GIB = 1 << 30
_SHORTAGE = re.compile(
    r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED",
    re.IGNORECASE,
)
"""What torch, CUDA's libraries and SGLang say of it."""
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": _GIB}


class OutOfMemory(ValueError):
    """Memory did not suffice for the settings of the run."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, torch's on a GPU, or that of its allocator on the host."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and says_shortage(str(error)))


def says_shortage(text: str) -> bool:
    return _SHORTAGE.search(text) is not None


@contextmanager
def told(doing: str, remedies: Sequence[str], holder: str = "this process") -> Iterator[None]:
    """Memory that runs out in here raises `OutOfMemory`. `doing` is what needed it, `holder` who this process is, and
    `remedies` are settings to change, the most effective first."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        raise OutOfMemory(describe(doing, str(error), remedies, holder)) from error


def describe(doing: str, error: str, remedies: Sequence[str], holder: str) -> str:
    """One line: what was asked for, what was there, who held it, what to change."""
    on_gpu = re.search(r"CUDA|CUBLAS|CUDNN|NCCL", error) is not None
    match = _ASKED.search(error)
    asked = f", {_size(float(match[1]) * _UNITS[match[2]])} asked for" if match else ""
    there = _gpu_state(holder) if on_gpu else _host_state(holder)
    return f"out of {'GPU' if on_gpu else 'host'} memory in {doing}{asked}{there}: {', then '.join(remedies)}"


def _gpu_state(holder: str) -> str:
    import torch

    try:
        free, total = torch.cuda.mem_get_info()
        own = torch.cuda.memory_reserved()
    except (RuntimeError, AssertionError):  # a build for CPUs, or a device that is in no state to tell
        return ""
    others = max(0, total - free - own)
    return f", {_size(free)} of {_size(total)} free; {holder} held {_size(own)}, other processes {_size(others)}"


def _host_state(holder: str) -> str:
    free, own = available_bytes(), _resident_bytes()
    return "" if free is None else f", {_size(free)} free; {holder} held {_size(own)}"


def available_bytes(meminfo: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Host memory that can still be taken, within the limit of the container; None where the system does not tell."""
    found = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    left = [int(found[1]) * 1024] if found else []
    try:
        limit, used = ((groups / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)", (groups / "memory.stat").read_text(), re.MULTILINE)
        if limit != "max":
            left.append(max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0)))
    except (OSError, ValueError):
        pass  # no limit, or one of another kind
    return min(left, default=None)


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def learner_remedies(config: Config) -> list[str]:
    """Settings that lower what a step of the learner takes, or raise what it may take."""
    learner, smaller = config.learner, _engines_leave(config)
    smaller.append(f"lower learner.micro_batch_tokens ({learner.micro_batch_tokens})")
    if not learner.activation_checkpointing:
        smaller.append("set learner.activation_checkpointing=true")
    smaller.append(f"lower learner.head_chunk ({learner.head_chunk})")
    return [*smaller, *_smaller_models(config)]


def start_remedies(config: Config) -> list[str]:
    """Settings that let the learner's model and optimizer fit."""
    return _engines_leave(config) + _smaller_models(config)


def _smaller_models(config: Config) -> list[str]:
    found = [] if config.lora.rank else ["train adapters (lora.rank=32)"]
    if config.placement == "disaggregated" and config.runtime == "cluster":
        found.append(f"split the learner between more GPUs (learner.num_gpus, now {config.learner.num_gpus})")
    return [*found, "take a smaller model"]


def _engines_leave(config: Config) -> list[str]:
    """What lets engines leave more to the learner, of memory that they share."""
    if config.placement != "colocated" and config.device == "cuda":
        return []
    if config.rollout.engine == "embedded":
        return [f"lower rollout.num_actors ({config.num_engines} engines) or rollout.max_running"]
    share = f"{config.rollout.gpu_memory_utilization:g} of the GPU for each of {config.num_engines} engines"
    return [f"lower rollout.gpu_memory_utilization ({share})"]


def cache_remedies(config: Config) -> list[str]:
    """What makes an embedded engine's keys and values smaller."""
    length = f"rollout.max_new_tokens ({config.rollout.max_new_tokens}) or the environment's max_prompt_tokens"
    found = [f"lower rollout.max_running ({config.rollout.max_running})", f"lower {length}"]
    if config.rollout.dtype == "float32":
        found.append("set rollout.dtype=bfloat16")
    if config.runtime == "local" or config.placement == "colocated" or config.device == "cpu":
        found.append(f"lower rollout.num_actors ({config.rollout.num_actors})")
    return found
