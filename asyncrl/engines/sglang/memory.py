"""How much memory of a GPU an engine takes for its cache, whoever else starts on that GPU meanwhile.

SGLang measures free memory before it loads the model and after, and takes the difference for its own. Of two engines
that start on one GPU at a time, each would take the other's cache for its weights, and end as if they left no room.
"""

from __future__ import annotations

from typing import Any

import torch

_GIB = 1 << 30


def replace_memory() -> None:
    """In the scheduler's process, before the model is loaded."""
    from sglang.srt.distributed.parallel_state import get_world_group
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.runtime_context import get_schedule

    whole = KVCacheConfigurator._profile_available_bytes

    def profile_available_bytes(configurator: Any, pre_model_load_memory: int) -> int:
        if configurator.device != "cuda" or configurator.mambaish_config is not None:
            return int(whole(configurator, pre_model_load_memory))  # a part of it goes to states, not to the cache
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(configurator.gpu_id)
        numbers = torch.tensor([free, total, -torch.cuda.memory_reserved(configurator.gpu_id)])
        group = get_world_group()
        if group.world_size > 1:  # tensor-parallel ranks have caches of the same size: that of the fullest GPU
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
        free, total, held = numbers.tolist()
        schedule = get_schedule()
        capped = schedule.max_total_tokens is not None
        return cache_bytes(schedule.mem_fraction_static, total=total, held=-held, free=free, capped=capped)

    KVCacheConfigurator._profile_available_bytes = profile_available_bytes


def cache_bytes(share: float, *, total: int, held: int, free: int, capped: bool = False) -> int:
    """What is left for the cache of `share` of a GPU of `total` bytes, of which the engine holds `held` already.

    `capped`: the user has set a number of tokens, which may be less than the share, and so fit where that does not.
    Raises `ValueError` where nothing is left, or less than that is free.
    """
    wanted = int(share * total) - held
    if capped:
        wanted = min(wanted, free)
    sizes = f"{share * total / _GIB:.1f} of {total / _GIB:.1f} GiB, {held / _GIB:.1f} for the model"
    if wanted <= 0:
        raise ValueError(f"rollout.gpu_memory_utilization {share} leaves no room for a cache ({sizes}): raise it")
    if wanted > free:
        raise ValueError(
            f"rollout.gpu_memory_utilization {share} is more than what is free ({sizes}; {free / _GIB:.1f} free): "
            "lower it, or end what else is on the GPU"
        )
    return wanted
