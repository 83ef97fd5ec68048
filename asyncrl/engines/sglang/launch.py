"""How SGLang is started: which versions, which attention backend, which arguments, and what it may not do to its host.

SGLang takes a process for its own: it installs signal handlers, and it ends all children, or the process itself, when
one of its children fails. Here it may do none of that; the engine watches its processes instead.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import difflib
import gc
import importlib.util
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import metadata
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from asyncrl.config.out_of_memory import OutOfMemory, says_shortage
from asyncrl.engines.sglang import scheduler as sglang_scheduler
from asyncrl.utils.threads import kept_handlers

AttentionBackend: TypeAlias = Literal["auto", "flashinfer", "fa3", "triton", "torch_native"]
Capability: TypeAlias = tuple[int, int]

SUPPORTED_VERSION = "0.5.17"
"""The version of SGLang that the engine was run with, which pyproject.toml pins. Others differ in what it relies on."""

_PREFERRED = ("flashinfer", "fa3", "triton")
_CAPABILITIES: dict[str, tuple[Capability, Capability]] = {
    "flashinfer": ((7, 5), (99, 0)),
    "fa3": ((8, 0), (9, 0)),
    "triton": ((7, 0), (99, 0)),
    "torch_native": ((0, 0), (99, 0)),
}

_OWNED = {
    "model_path": "model.path",
    "dtype": "rollout.dtype",
    "device": "the machine",
    "tp_size": "rollout.tensor_parallel_size",
    "attention_backend": "rollout.attention_backend",
    "max_running_requests": "rollout.max_running",
    "mem_fraction_static": "rollout.gpu_memory_utilization",
    "random_seed": "seed",
    "enable_memory_saver": "rollout.release_memory",
}
_FIXED = {
    "skip_tokenizer_init": "prompts and completions are token ids",
    "stream_interval": "completions are not streamed",
    "incremental_streaming_output": "completions are not streamed",
    "dp_size": "weight updates need one replica per engine: raise rollout.num_actors",
    "pp_size": "weight updates reach tensor-parallel ranks only: raise rollout.tensor_parallel_size",
    "nnodes": "an engine lives on one node: raise rollout.num_actors",
    "tokenizer_worker_num": "requests are sent from the rollout actor itself",
    "weight_version": "versions are stamped token by token",
    "custom_sigquit_handler": "the engine watches its processes itself",
    "speculative_algorithm": "the version and the log-prob of a drafted token are not reported",
    "disaggregation_mode": "weight updates need prefill and decoding in one process",
    "quantization": "updates bring plain weights, which would have to be quantised again",
    "sampling_backend": "tokens are drawn by the engine's own function",
    "enable_deterministic_inference": "its log-probs are from before top-k and top-p",
    "rl_on_policy_target": "its log-probs are from before top-k and top-p",
}


def check_version() -> None:
    """Raises `ValueError` when SGLang is missing, or is another version than the engine reaches into."""
    try:
        found = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise ValueError(
            "rollout.engine 'sglang' needs the package sglang, which is not installed: pip install 'asyncrl[gpu]', or "
            "set rollout.engine=embedded"
        ) from None
    if found != SUPPORTED_VERSION:
        raise ValueError(f"sglang must be {SUPPORTED_VERSION}, found {found}: pip install sglang=={SUPPORTED_VERSION}")


def compute_capability(device: str) -> Capability | None:
    """That of the first visible GPU; None for a CPU. Raises `ValueError` when there is no GPU."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs a GPU and torch finds none: use 'cpu', or give the actor a GPU")
    return torch.cuda.get_device_capability()


def known_arguments() -> set[str]:
    """The names of this SGLang version's server arguments."""
    from sglang.srt.server_args import ServerArgs

    return {field.name for field in dataclasses.fields(ServerArgs)}


def available_attention_backends() -> set[str]:
    """Attention backends whose packages are installed here."""
    found = {"torch_native"}
    packages = {"flashinfer": "flashinfer", "fa3": "sgl_kernel.flash_attn", "triton": "triton"}
    for backend, package in packages.items():
        try:
            if importlib.util.find_spec(package) is not None:
                found.add(backend)
        except ModuleNotFoundError:  # The parent package is missing.
            continue
    return found


def attention_backend_here(requested: str, device: str) -> str:
    """`choose_attention_backend` for this machine."""
    return choose_attention_backend(requested, compute_capability(device), available_attention_backends())


def choose_attention_backend(requested: str, capability: Capability | None, available: Collection[str]) -> str:
    """The attention backend to use on a GPU of this compute capability, or on a CPU (`capability` None).

    Raises `ValueError` with the rule, the values and the remedy for a choice that cannot work.
    """
    if requested not in ("auto", *_CAPABILITIES):
        near = difflib.get_close_matches(requested, _CAPABILITIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"attention_backend must be auto, {', '.join(_CAPABILITIES)}, got {requested!r}{hint}")
    if capability is None:
        if requested not in ("auto", "torch_native"):
            raise ValueError(
                f"attention_backend {requested!r} needs a GPU and this engine runs on a CPU: use 'auto' or "
                "'torch_native'"
            )
        return "torch_native"
    problems = {backend: _problem(backend, capability, available) for backend in _CAPABILITIES}
    usable = [backend for backend in _PREFERRED if problems[backend] is None]
    if requested == "auto":
        if not usable:
            reasons = "; ".join(f"{backend} {problems[backend]}" for backend in _PREFERRED)
            raise ValueError(f"no attention backend works on this GPU: {reasons}; 'torch_native' works but is slow")
        return usable[0]
    if problems[requested] is not None:
        raise ValueError(
            f"attention_backend {requested!r} {problems[requested]}: use {' or '.join(map(repr, ['auto', *usable]))}"
        )
    return requested


def _problem(backend: str, capability: Capability, available: Collection[str]) -> str | None:
    low, high = _CAPABILITIES[backend]
    if not low <= capability <= high:
        span = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}" if high[0] < 99 else f"{low[0]}.{low[1]} or more"
        return f"needs compute capability {span}, this GPU has {capability[0]}.{capability[1]}"
    return None if backend in available else "is not installed"


def server_arguments(
    *,
    model_path: str,
    dtype: str,
    device: str,
    tensor_parallel_size: int,
    attention_backend: str,
    max_running: int,
    max_length: int,
    gpu_memory_utilization: float,
    release_memory: bool = False,
    seed: int,
    extra: Mapping[str, Any],
    known: Collection[str],
) -> dict[str, Any]:
    """The arguments of `sglang.Engine`; `extra` is the user's table, `known` the names that SGLang has.

    Raises `ValueError` for a key that is set elsewhere, that the engine depends on, or that SGLang does not know.
    """
    _check_extra(extra, known)
    if release_memory and device == "cuda" and importlib.util.find_spec("torch_memory_saver") is None:
        raise ValueError("rollout.release_memory needs the package torch_memory_saver: install it, or set it to false")
    defaults: dict[str, Any] = {"grammar_backend": "none", "log_level": "error"}
    if device == "cpu":
        # The default cache would take a share of the host's whole memory, and an idle scheduler a whole core.
        max_total_tokens = min(max_running * max_length, 1 << 16) + 1024
        defaults |= {"disable_cuda_graph": True, "max_total_tokens": max_total_tokens, "sleep_on_idle": True}
    else:
        defaults |= {"cuda_graph_max_bs_decode": max_running}
    fixed = {
        "model_path": model_path,
        "dtype": dtype,
        "device": device,
        "tp_size": tensor_parallel_size,
        "attention_backend": attention_backend,
        "sampling_backend": "pytorch",
        "max_running_requests": max_running,
        "mem_fraction_static": gpu_memory_utilization,
        "random_seed": seed % 2**32,  # numpy takes no other; what is drawn follows the seeds of the requests
        "skip_tokenizer_init": True,
        "enable_memory_saver": release_memory and device == "cuda",
    }
    return defaults | dict(extra) | fixed


def _check_extra(extra: Mapping[str, Any], known: Collection[str]) -> None:
    for key in extra:
        if key in _OWNED:
            raise ValueError(f"rollout.engine_args.{key} is set from {_OWNED[key]}: set that instead")
        if key in _FIXED:
            raise ValueError(f"rollout.engine_args.{key} cannot be changed: {_FIXED[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"rollout.engine_args.{key} is not an argument of this SGLang version{hint}")


def launch(arguments: Mapping[str, Any]) -> Any:
    """A started `sglang.Engine`, bound to the running event loop, which it blocks until the model is loaded.

    Raises `RuntimeError` when one of its processes ends meanwhile, or `ValueError` if it said that of a setting.
    """
    from sglang.srt.entrypoints.engine import Engine

    class VersionedEngine(Engine):  # type: ignore[misc]
        """SGLang's engine with the scheduler of `sglang_scheduler`."""

        run_scheduler_process_func = staticmethod(sglang_scheduler.run_scheduler)

        @classmethod
        def _launch_detokenizer_subprocesses(cls, *_args: Any, **_kwargs: Any) -> tuple[list[Any], list[str]]:
            # Token ids go straight from the scheduler to this process; the detokenizer would only take memory.
            return [], []

    others, contexts = set(multiprocessing.active_children()), open_contexts()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[sglang_scheduler.START_ERRORS] = folder  # which its processes inherit
        try:
            with _kept_signal_handlers():
                engine = VersionedEngine(**arguments)
                engine.tokenizer_manager.auto_create_handle_loop()
        except BaseException as error:
            end_processes(set(multiprocessing.active_children()) - others)
            for context in open_contexts():
                if not any(context is other for other in contexts):
                    context.destroy(linger=0)  # as `close_sockets`: there is no engine that has them
            for told in Path(folder).iterdir():
                name, _, text = told.read_text().partition(": ")
                if name == "ValueError":  # of a setting
                    raise ValueError(f"SGLang could not start: {text}") from error
                if says_shortage(text):
                    raise OutOfMemory(_without_room(text, arguments)) from error
                raise RuntimeError(f"SGLang could not start: {name}: {text}") from error
            raise
    # It would answer the end of a child by a signal that ends this process.
    engine.tokenizer_manager._subprocess_watchdog.stop()
    # It would end every child of this process, those of another engine included.
    atexit.unregister(engine.shutdown)
    return engine


def _without_room(text: str, arguments: Mapping[str, Any]) -> str:
    """SGLang's words for it, with who may hold the GPU's memory and the settings to change."""
    share, rows = arguments.get("mem_fraction_static"), arguments.get("max_running_requests")
    return (
        f"SGLang could not start for lack of memory ({' '.join(text.split())[:600]}). Each engine may have "
        f"rollout.gpu_memory_utilization ({share}) of its GPU for weights and cache: lower it where others hold the "
        "memory, such as a learner or more engines on the same GPU (nvidia-smi), raise it where the model leaves none "
        f"of it for the cache, then lower rollout.max_running ({rows}), whose CUDA graphs come on top"
    )


@contextlib.contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Undoes the handlers that SGLang installs when it starts in a main thread: they end this process."""
    with kept_handlers(signal.SIGTERM, signal.SIGQUIT) as before:
        try:
            yield
        finally:
            for number in before:
                asyncio.get_running_loop().remove_signal_handler(number)


def own_processes(engine: Any) -> list[BaseProcess]:
    """The processes of this engine and of no other; they are ended when Python exits, if not before."""
    own = set(engine.get_all_child_pids())
    processes = [process for process in multiprocessing.active_children() if process.pid in own]
    # Python would wait for them at its exit.
    atexit.register(end_processes, processes)
    return processes


def close_sockets(engine: Any) -> None:
    """Closes an engine's sockets to its processes. Left open, they keep the interpreter from ending: whenever the
    garbage collector came to their context first, it would wait for them for ever."""
    manager = engine.tokenizer_manager
    for socket in (manager.recv_from_detokenizer, manager.send_to_scheduler, engine.send_to_rpc):
        socket.context.destroy(linger=0)


def open_contexts() -> list[Any]:
    """What owns sockets to other processes, of all engines here and of one that did not come to be."""
    import zmq

    return [one for one in gc.get_objects() if issubclass(type(one), zmq.Context) and not one.closed]


def end_processes(processes: Iterable[BaseProcess]) -> None:
    """Ends them at once and waits until they are gone, their GPU memory too."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(timeout=30)
