"""What new weights do to requests in flight, proved by log-probs; what ends a request; what ends an engine."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang_learner import buckets_of
from sglang_world import Run, World, adapted, start

from asyncrl.engines.base import EngineDied
from asyncrl.engines.sglang.launch import open_contexts
from asyncrl.types import Completion, Sampling

pytestmark = pytest.mark.timeout(120)
PROMPTS = [[19, 6, 2, 9, 3, 12], [5], [20, 4, 8], [7] * 17, [3, 14, 15, 9, 2, 6, 5, 3, 5]]
LENGTH = 200
LONG = Sampling(LENGTH)


def logprobs_of(logits: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    return torch.log_softmax(logits.float(), dim=-1).gather(1, ids[:, None])[:, 0].numpy()


def exact(model: Any, prompt: list[int], completion: Completion) -> np.ndarray:
    """Log-probs of the completion's tokens from one forward of the model."""
    ids = torch.tensor([*prompt, *completion.token_ids.tolist()])
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logprobs_of(logits, ids[len(prompt) :])


def mixed(old: Any, new: Any, prompt: list[int], completion: Completion, boundary: int) -> np.ndarray:
    """The same when `new` takes over the keys and values of `old` before token `boundary`; tokens before it are 0."""
    ids = torch.tensor([*prompt, *completion.token_ids.tolist()])
    seen = len(prompt) + boundary - 1  # The last token before the boundary is fed after it.
    with torch.no_grad():
        cache = old(ids[None, :seen], use_cache=True).past_key_values
        logits = new(ids[None, seen:-1], past_key_values=cache).logits[0]
    return np.concatenate([np.zeros(boundary), logprobs_of(logits, ids[seen + 1 :])])


def difference(completion: Completion, expected: np.ndarray, part: slice) -> float:
    return float(np.abs(completion.logprobs[part] - expected[part]).max())


async def update_in_flight(world: Any, mode: str) -> list[Completion]:
    await world.reset(mode)
    calls = [asyncio.create_task(world.engine.generate(p, LONG, i)) for i, p in enumerate(PROMPTS)]
    await world.started()
    await world.publish_new(1)
    return await asyncio.gather(*calls)


@pytest.fixture(scope="module")
def wide(world, run):
    """An engine of two tensor-parallel ranks, each with a core of its own."""
    if os.cpu_count() == 1:
        pytest.skip("needs two CPU cores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
        engine = run(start(world.folder, max_length=512, tensor_parallel_size=2), 120)
    yield replace(world, engine=engine)
    run(engine.close())


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_the_boundary_is_where_the_versions_say(world, run, mode):
    check_boundary(world, run, mode)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_tensor_parallel_engines_take_updates_in_flight(wide, run, mode):
    check_boundary(wide, run, mode)


@pytest.mark.parametrize(
    ("ranks", "targets"), [(1, ("q_proj", "gate_proj", "down_proj")), (2, ("k_proj", "v_proj", "o_proj", "up_proj"))]
)
def test_adapters_alone_make_the_weights_that_were_merged(world, run, ranks, targets):
    """They go into fused and split layers, some of which have no adapter in a part of them."""
    with pytest.MonkeyPatch.context() as patch:
        if ranks == 2:
            if os.cpu_count() == 1:
                pytest.skip("needs two CPU cores")
            patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
        engine = run(start(world.folder, max_length=512, tensor_parallel_size=ranks), 120)
    try:
        adapters = adapted(world, engine, targets)
        for mode in ("keep", "recompute"):
            check_boundary(adapters, run, mode)
    finally:
        run(engine.close())


def test_many_updates_in_a_row_reach_both_tensor_parallel_ranks(wide, run):
    async def body():
        await wide.reset()
        calls = [asyncio.create_task(wide.engine.generate(p, Sampling(400), i)) for i, p in enumerate(PROMPTS)]
        await wide.started()
        digests = [await wide.publish_new(version) for version in range(1, 11)]
        return await asyncio.gather(*calls), digests

    completions, digests = run(body(), 120)
    assert len(set(digests)) == 1
    for completion in completions:
        assert (np.diff(completion.versions) >= 0).all()
        assert completion.finish == "length"


def check_boundary(world: World, run: Run, mode: str) -> None:
    for prompt, completion in zip(PROMPTS, run(update_in_flight(world, mode)), strict=True):
        boundary = int(np.searchsorted(completion.versions, 1))
        assert 0 < boundary < len(completion.versions) == LENGTH
        assert completion.versions.tolist() == [0] * boundary + [1] * (LENGTH - boundary)
        before = exact(world.old, prompt, completion)
        if mode == "keep":
            after = mixed(world.old, world.new, prompt, completion, boundary)
        else:
            after = exact(world.new, prompt, completion)
        assert difference(completion, before, slice(boundary)) < 1e-5
        assert difference(completion, after, slice(boundary, None)) < 1e-5
        # The first token after it is not one of the old weights, nor the last one before it one of the new.
        assert difference(completion, before, slice(boundary, boundary + 1)) > 1e-3
        if mode == "recompute":
            assert difference(completion, after, slice(boundary - 1, boundary)) > 1e-3


def test_an_abort_returns_what_there_is_and_keeps_the_waiting(world, run):
    async def body():
        await world.reset("abort")
        calls = [asyncio.create_task(world.engine.generate(p, LONG, i)) for i, p in enumerate(PROMPTS)]
        await world.started()
        await world.engine.pause()
        waiting = [asyncio.create_task(world.engine.generate([5], Sampling(6), i)) for i in range(3)]
        await world.publish_new(1)
        return await asyncio.gather(*calls), await asyncio.gather(*waiting)

    partial, waited = run(body())
    for prompt, completion in zip(PROMPTS, partial, strict=True):
        assert completion.finish == "abort"
        assert 0 < len(completion.token_ids) < LENGTH
        assert set(completion.versions.tolist()) == {0}
        assert difference(completion, exact(world.old, prompt, completion), slice(None)) < 1e-5
    for completion in waited:
        assert completion.finish == "length"
        assert set(completion.versions.tolist()) == {1}
        assert difference(completion, exact(world.new, [5], completion), slice(None)) < 1e-5


@pytest.mark.parametrize("mode", ["keep", "recompute", "abort"])
def test_a_pause_without_an_update_changes_nothing(world, run, mode):
    async def body(pauses):
        calls = [asyncio.create_task(world.engine.generate(p, LONG, i)) for i, p in enumerate(PROMPTS)]
        await world.started()
        for _ in range(pauses):
            await world.engine.pause()
            await world.engine.resume(0)
        return await asyncio.gather(*calls)

    run(world.reset(mode))
    for straight, paused in zip(run(body(0)), run(body(3)), strict=True):
        assert straight.token_ids.tolist() == paused.token_ids.tolist()
        assert straight.finish == paused.finish == "length"
        assert set(paused.versions.tolist()) == {0}


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_requests_that_wait_for_a_place_start_under_the_new_weights(world, run, mode):
    """Their prompts are in the prefix cache, as the old weights computed them."""

    async def body():
        await world.reset(mode)
        await world.engine.generate(PROMPTS[3], Sampling(2), 0)
        running = [asyncio.create_task(world.engine.generate(PROMPTS[4], LONG, i)) for i in range(8)]
        waiting = [asyncio.create_task(world.engine.generate(PROMPTS[3], Sampling(20), i)) for i in range(3)]
        while world.engine.num_open < 11:
            await asyncio.sleep(0)
        await world.publish_new(1)
        await asyncio.gather(*running)
        return await asyncio.gather(*waiting)

    for completion in run(body()):
        assert set(completion.versions.tolist()) == {1}
        assert difference(completion, exact(world.new, PROMPTS[3], completion), slice(None)) < 1e-5


def test_the_prefix_cache_is_kept_and_salted(world, run):
    prompt = PROMPTS[3] + PROMPTS[0]

    async def cached(seed):
        before = world.engine.num_cached_tokens
        completion = await world.engine.generate(prompt, Sampling(4), seed)
        return world.engine.num_cached_tokens - before, completion

    async def body():
        await world.reset()
        found = [(await cached(seed))[0] for seed in range(2)]
        await world.engine.pause()
        await world.engine.resume(0)
        found.append((await cached(2))[0])
        await world.publish_new(1)
        return found, await cached(3), await cached(4)

    found, (first, completion), (second, _) = run(body())
    assert found[0] == first == 0
    assert found[1] == found[2] == second == len(prompt) - 1
    assert difference(completion, exact(world.new, prompt, completion), slice(None)) < 1e-5


def test_prefixes_of_old_weights_leave_the_cache():
    """In parts, and none that a request still holds."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    from asyncrl.engines.sglang import scheduler as sglang_scheduler

    freed: list[int] = []
    allocator = SimpleNamespace(
        free_group_begin=lambda: None,
        free_group_end=lambda: None,
        free_segment=lambda slots, **_: freed.extend(slots.tolist()),
        device=torch.device("cpu"),
    )
    cache = RadixCache.create_simulated(mock_allocator=allocator)

    def insert(first: int, count: int, salt: str) -> RadixKey:
        key = RadixKey(array("q", range(first, first + count)), extra_key=salt)
        cache.insert(InsertParams(key=key, value=torch.arange(first, first + count)))
        return key

    size = sglang_scheduler._FORGET_TOKENS // 4
    keys = [insert(number * size, size, "0") for number in range(7)]
    cache.inc_lock_ref(cache.match_prefix(MatchPrefixParams(key=keys[2])).last_device_node)
    scheduler = SimpleNamespace(tree_cache=cache, token_to_kv_pool_allocator=allocator)
    scheduler._dead_tokens = cache.evictable_size()
    insert(100 * size, size, "1")
    sizes = []
    for _ in range(3):
        sglang_scheduler.SchedulerMixin._forget(scheduler)
        sizes.append(len(freed) // size)
    assert sizes == [4, 6, 6]
    assert {slot // size for slot in freed} == {0, 1, 3, 4, 5, 6}
    assert cache.total_size() == 2 * size


def test_sglang_asks_whether_those_that_wait_may_enter(monkeypatch):
    from sglang.srt.managers import scheduler as managers

    from asyncrl.engines.sglang.scheduler import Refill

    # An engine that was started before in this process would have published it.
    monkeypatch.setattr(managers, "get_memory", lambda: SimpleNamespace(enable_flexkv=False))
    scheduler = managers.Scheduler.__new__(managers.Scheduler)
    scheduler.grammar_manager = SimpleNamespace(has_waiting_grammars=lambda: False)
    scheduler.enable_hierarchical_cache = scheduler.enable_priority_preemption = scheduler.is_hybrid_swa = False
    scheduler.waiting_queue, scheduler.chunked_req = [None], None
    scheduler.get_num_allocatable_reqs = lambda _running: 4
    scheduler.min_free_slots_delayer = Refill(lambda: len(scheduler.waiting_queue), 1)
    running = SimpleNamespace(batch_is_full=False, reqs=[None] * 9)
    assert scheduler._get_new_batch_prefill_raw(None, running) == (None, running)
    assert scheduler.min_free_slots_delayer._cost == 1


@pytest.mark.parametrize(
    ("change", "replaced"),
    [({}, True), ({"spec": True}, False), ({"mamba": True}, False), ({"offload": True}, False)],
)
def test_sglang_books_tokens_itself_where_more_is_asked_for_at_each(monkeypatch, change, replaced):
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor

    from asyncrl.engines.sglang import results as sglang_results

    scheduler = SimpleNamespace(
        tree_cache=SimpleNamespace(supports_mamba=lambda: change.get("mamba", False)),
        spec_algorithm=SimpleNamespace(is_none=lambda: not change.get("spec", False)),
        server_args=SimpleNamespace(
            disaggregation_mode="null", disaggregation_decode_enable_offload_kvcache=change.get("offload", False)
        ),
    )
    whole = SchedulerBatchResultProcessor.process_batch_result_decode
    monkeypatch.setattr(SchedulerBatchResultProcessor, "process_batch_result_decode", whole)
    sglang_results.replace_results(scheduler)
    assert (SchedulerBatchResultProcessor.process_batch_result_decode is not whole) == replaced


def test_greedy_requests_need_no_truncation(monkeypatch):
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.sampling.sampling_params import SamplingParams

    from asyncrl.engines.sglang import sampling as sglang_sampling

    def info(*params):
        batch = SimpleNamespace(reqs=[SimpleNamespace(sampling_params=one) for one in params])
        return SamplingBatchInfo.from_schedule_batch(batch, 10)

    made = SimpleNamespace(temperatures=torch.ones(2, 1), need_top_k_sampling=True)
    monkeypatch.setattr(SamplingBatchInfo, "from_schedule_batch", lambda *_: made)
    monkeypatch.setattr(Sampler, "_sample_from_probs", None)
    sglang_sampling.replace_sampling()
    sampled, greedy, truncated = SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(top_k=5)
    assert not info(sampled, greedy).need_top_k_sampling
    assert info(sampled, truncated).need_top_k_sampling


def test_cancelling_a_call_ends_its_request_and_no_other(world, run):
    async def body():
        await world.reset()
        # Sixteen, so that the ids of some would be prefixes of others if they were plain numbers.
        calls = [asyncio.create_task(world.engine.generate([5], Sampling(300), i)) for i in range(3)]
        others = [asyncio.create_task(world.engine.generate([6], Sampling(30), i)) for i in range(13)]
        await asyncio.gather(*others)
        running = dict(world.engine._manager.rid_to_state)
        calls[0].cancel()
        calls[1].cancel()
        kept = await calls[2]
        return kept, [len(state.output_ids) for state in running.values()], world.engine._manager.rid_to_state

    kept, lengths, left = run(body())
    assert len(kept.token_ids) == 300
    assert sorted(lengths)[2] == 300
    assert all(30 <= length < 300 for length in sorted(lengths)[:2])
    assert not left


def test_a_partial_update_is_an_error_and_can_be_made_again(world, run):
    async def body():
        await world.reset()
        calls = [asyncio.create_task(world.engine.generate(p, LONG, i)) for i, p in enumerate(PROMPTS)]
        await world.started()
        await world.engine.pause()
        await world.learner.send(dict(world.new.named_parameters()), 2, world.engine)
        with pytest.raises(RuntimeError, match=r"partial: \d+ of 26 parameters did not arrive"):
            await world.engine.resume(1)
        await world.learner.meet(world.engine)
        # The new group does not make good what the old one broke off.
        with pytest.raises(RuntimeError, match=r"partial: 26 of 26 parameters did not arrive"):
            await world.engine.resume(1)
        await world.publish_new(1)
        return await asyncio.gather(*calls)

    for prompt, completion in zip(PROMPTS, run(body()), strict=True):
        boundary = int(np.searchsorted(completion.versions, 1))
        after = mixed(world.old, world.new, prompt, completion, boundary)
        assert difference(completion, after, slice(boundary, None)) < 1e-5


def test_a_learner_that_stays_away_is_named_and_may_come_back(world, run):
    async def body():
        alone = await world.learner.rendezvous(2, 1.0)
        with pytest.raises(RuntimeError, match=rf"rank 1 of 2 could not join .*{alone.name}.* within 1 s"):
            await world.engine.join(alone, 1)
        await world.learner.meet(world.engine, timeout_s=1.0)
        await world.engine.pause()
        [bucket, *_] = buckets_of(dict(world.new.named_parameters()))
        with pytest.raises(RuntimeError, match=r"receiving 1 buckets of \d+ bytes in all: .* took longer than 1 s"):
            await world.engine.receive([bucket])
        await world.reset()
        return await world.engine.generate(PROMPTS[0], Sampling(20), 0)

    run(world.reset())
    completion = run(body())
    assert difference(completion, exact(world.old, PROMPTS[0], completion), slice(None)) < 1e-5


def test_generation_goes_on_while_the_others_of_a_group_are_waited_for(world, run):
    async def body():
        where = await world.learner.rendezvous(2, 30.0)
        joining = asyncio.create_task(world.engine.join(where, 1))
        completion = await world.engine.generate(PROMPTS[0], Sampling(20), 0)
        assert not joining.done()
        await asyncio.gather(world.learner.enter(), joining)
        await world.publish_new(1)
        return completion, await world.engine.generate(PROMPTS[0], Sampling(20), 0)

    run(world.reset())
    before, after = run(body())
    for weights, completion in ((world.old, before), (world.new, after)):
        assert difference(completion, exact(weights, PROMPTS[0], completion), slice(None)) < 1e-5


def test_two_engines_on_one_host_and_the_end_of_one(world, run):
    async def body(second):
        tensors = dict(world.new.named_parameters())
        await world.learner.meet(world.engine, second)
        await world.learner.update(1, tensors, world.engine, second)
        one, two = [await engine.generate(PROMPTS[0], LONG, 3) for engine in (world.engine, second)]
        assert one.token_ids.tolist() == two.token_ids.tolist()
        assert one.digests == two.digests

        calls = [asyncio.create_task(second.generate(p, Sampling(400), 0)) for p in PROMPTS]
        await second.generate([5], Sampling(2), 0)
        [process] = second._calls.processes
        os.kill(process.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            assert isinstance(result, EngineDied)
            assert f"process {process.pid} ended with exit code -9" in str(result)
        with pytest.raises(EngineDied, match="exit code -9"):
            await second.pause()
        await second.close()
        manager = second._engine.tokenizer_manager
        sockets = (manager.recv_from_detokenizer, manager.send_to_scheduler, second._engine.send_to_rpc)
        assert all(socket.closed and socket.context.closed for socket in sockets), "or Python may not end"
        assert len((await world.engine.generate(PROMPTS[0], LONG, 3)).token_ids) == LENGTH

    run(world.reset())
    second = run(start(world.folder, max_length=512), 120)
    run(body(second))


def test_an_engine_that_cannot_start_says_so(world, run):
    with pytest.raises(ValueError, match=r"engine_args.max_runing_requests is not an argument .*did you mean"):
        run(start(world.folder, max_length=64, engine_args={"max_runing_requests": 4}))
    with pytest.raises(ValueError, match="'triton' needs a GPU"):
        run(start(world.folder, max_length=64, attention_backend="triton"))


def test_a_scheduler_that_cannot_start_says_why(world, run, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    before = open_contexts()
    with pytest.raises(RuntimeError, match=r"SGLang could not start: SafetensorError: .*header"):
        run(start(folder, max_length=64), 120)
    assert len(open_contexts()) == len(before), "the collector would wait for what is left, for ever"
    settings = folder / "config.json"
    settings.write_text(settings.read_text().replace('"silu"', '"tanh"'))
    with pytest.raises(ValueError, match=r"SGLang could not start: Unsupported activation: tanh"):
        run(start(folder, max_length=64), 120)


@pytest.mark.parametrize("mode", ["recompute", "abort"])
def test_memory_given_back_costs_no_request(world, run, mode):
    async def body():
        await world.reset(mode)
        calls = [asyncio.create_task(world.engine.generate(p, LONG, i)) for i, p in enumerate(PROMPTS)]
        await world.started()
        await world.engine.release()
        with pytest.raises(RuntimeError, match="not within it"):
            await world.engine.release()
        late = asyncio.create_task(world.engine.generate([4, 4], LONG, 9))
        with pytest.raises(RuntimeError, match="given back and no update has come since"):
            await world.engine.resume(1)
        await world.publish_new(1)
        return await asyncio.gather(*calls), await late

    completions, late = run(body())
    assert set(late.versions.tolist()) == {1}
    assert difference(late, exact(world.new, [4, 4], late), slice(None)) < 1e-5
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        boundary = int(np.searchsorted(completion.versions, 1))
        assert boundary > 0
        assert difference(completion, exact(world.old, prompt, completion), slice(boundary)) < 1e-5
        if mode == "abort":
            assert (completion.finish, boundary) == ("abort", len(completion.versions))
        else:
            assert len(completion.versions) == LENGTH
            assert difference(completion, exact(world.new, prompt, completion), slice(boundary, None)) < 1e-5
