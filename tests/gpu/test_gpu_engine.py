"""The engine on a GPU: log-probs, updates in flight over IPC and NCCL, memory that is given back, tensor parallelism.

The engine computes in bfloat16 and the reference in float32 with the same weights, so log-probs agree to some 0.01
and never exactly; the two sets of weights differ by about 1.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import test_engine as contract
import torch
from sglang_learner import Learner, buckets_of
from sglang_world import World, start
from test_engine import (  # noqa: F401
    test_a_request_that_cannot_fit_says_what_to_change,
    test_a_stop_token_ends_a_completion_and_is_part_of_it,
    test_logprobs_are_the_models_own,
)
from test_sglang_engine import exact, mixed

from asyncrl.types import Completion, Sampling
from asyncrl.weights import broadcast as transport

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]
CLOSE, FAR = 0.05, 0.3
# Tokens: the first requests still run when the last one, which waited for company, has begun and an update comes.
LENGTH = 400
LONG = Sampling(LENGTH)
PROMPTS = [[2 + (7 * i + 3 * j) % 20 for j in range(3 + i % 9)] for i in range(48)]
BACKENDS = ["ipc", pytest.param("nccl", marks=pytest.mark.multi_gpu)]


@pytest.fixture
def setup(world, run, monkeypatch):
    monkeypatch.setattr(contract, "run", run)
    monkeypatch.setattr(world.engine, "_max_length", 96)
    run(world.reset())
    return contract.Setup(world.engine, world.old, 0.2, world.folder)


@pytest.fixture(params=BACKENDS)
def joined(request, world, learner) -> World:
    return World(world.folder, world.engine, learner(request.param), world.old, world.new)


def boundary_of(completion: Completion) -> int:
    return int(np.searchsorted(completion.versions, 1))


def gaps(completions: list[Completion], expected: list[np.ndarray], where: list[slice]) -> np.ndarray:
    """|log-prob - expected| of all the chosen tokens."""
    parts = (np.abs(c.logprobs - e)[w] for c, e, w in zip(completions, expected, where, strict=True))
    return np.concatenate(list(parts))


async def in_flight(world: World, mode: str) -> list[Completion]:
    await world.reset(mode)
    calls = [asyncio.create_task(world.engine.generate(p, LONG, i)) for i, p in enumerate(PROMPTS)]
    await world.started()
    await world.publish_new(1)
    return await asyncio.gather(*calls)


def check_boundary(world: World, completions: list[Completion], mode: str) -> None:
    """Tokens are of the weights that their versions name, up to the very last and from the very first one."""
    bounds = [boundary_of(completion) for completion in completions]
    assert sum(0 < bound < LENGTH for bound in bounds) > len(bounds) // 2, bounds  # the GPU's pace is not ours
    pairs = list(zip(PROMPTS, completions, strict=True))
    old = [exact(world.old, prompt, completion) for prompt, completion in pairs]
    if mode == "keep":
        new = [mixed(world.old, world.new, *pair, bound) for pair, bound in zip(pairs, bounds, strict=True)]
    else:
        new = [exact(world.new, prompt, completion) for prompt, completion in pairs]
    last, first = [slice(b - 1, b) for b in bounds], [slice(b, b + 1) for b in bounds]
    assert gaps(completions, old, [slice(b) for b in bounds]).mean() < CLOSE
    assert gaps(completions, new, [slice(b, None) for b in bounds]).mean() < CLOSE
    assert gaps(completions, old, last).mean() < CLOSE
    assert gaps(completions, new, first).mean() < CLOSE
    assert gaps(completions, old, first).mean() > FAR


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_an_update_in_flight_has_its_boundary_where_the_versions_say(joined, run, mode):
    check_boundary(joined, run(in_flight(joined, mode)), mode)


def test_an_abort_returns_what_there_is(joined, run):
    completions = run(in_flight(joined, "abort"))
    expected = [exact(joined.old, prompt, c) for prompt, c in zip(PROMPTS, completions, strict=True)]
    finishes = [completion.finish for completion in completions]
    assert set(finishes) <= {"abort", "length"}
    assert finishes.count("abort") > len(finishes) // 2, finishes  # the GPU's pace is not ours
    assert {version for completion in completions for version in completion.versions} == {0}
    assert gaps(completions, expected, [slice(None)] * len(PROMPTS)).mean() < CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broadcast_is_bit_equal(run, learner, world, backend):
    tensors = dict(world.new.named_parameters())
    sender = learner(backend)
    receiver = Learner(backend, "cuda:0", "bfloat16")

    async def body():
        where = await sender.rendezvous(2, 60)
        await asyncio.gather(sender.enter(), receiver.join_as(where, 1))
        buckets = buckets_of(tensors, "bfloat16")
        _, received = await asyncio.gather(sender._ask("send", tensors, None), receiver.receive(buckets))
        return buckets, received

    buckets, received = run(body(), 120)
    assert len(received) == len(buckets) > 1
    for bucket, flat in zip(buckets, received, strict=True):
        assert torch.equal(flat, bucket.pack(tensors, bucket.empty(torch.device("cpu"))))
    receiver.close()


def test_many_updates_in_a_row(joined, run):
    async def body():
        await joined.reset()
        calls = [asyncio.create_task(joined.engine.generate(p, Sampling(400), i)) for i, p in enumerate(PROMPTS)]
        await joined.started()
        for version in range(1, 21):
            await joined.publish_new(version)
        return await asyncio.gather(*calls)

    for completion in run(body()):
        assert (np.diff(completion.versions) >= 0).all()
        assert len(completion.token_ids) == 400


def test_generation_goes_on_while_the_others_of_a_group_are_waited_for(joined, run):
    async def body():
        await joined.reset()
        where = await joined.learner.rendezvous(2, 60)
        joining = asyncio.create_task(joined.engine.join(where, 1))
        before = await joined.engine.generate(PROMPTS[0], LONG, 0)
        assert not joining.done()
        calls = [asyncio.create_task(joined.engine.generate(p, Sampling(400), i)) for i, p in enumerate(PROMPTS)]
        await asyncio.gather(joined.learner.enter(), joining)
        await joined.publish_new(1)
        await asyncio.gather(*calls)
        return before, await joined.engine.generate(PROMPTS[0], LONG, 0)

    for model, completion in zip((joined.old, joined.new), run(body()), strict=True):
        assert np.abs(completion.logprobs - exact(model, PROMPTS[0], completion)).mean() < CLOSE


def test_memory_is_given_back_and_no_request_is_lost(world, run):
    async def body():
        await world.reset("recompute")
        calls = [asyncio.create_task(world.engine.generate(p, LONG, i)) for i, p in enumerate(PROMPTS)]
        await world.started()
        held = torch.cuda.mem_get_info(0)[0]
        await world.engine.release()
        released = torch.cuda.mem_get_info(0)[0]
        await world.publish_new(1)
        back = torch.cuda.mem_get_info(0)[0]
        return await asyncio.gather(*calls), released - held, released - back

    completions, given, taken = run(body())
    assert given > 2**30
    assert abs(taken - given) < 2**28
    check_boundary(world, completions, "recompute")


@pytest.mark.multi_gpu
def test_a_dead_member_over_nccl_is_heard_at_once_and_the_rest_go_on(world, run, learner):
    """The dead one is a process that joined and never broadcasts, as a killed actor looks to NCCL."""
    alive = learner("nccl")

    async def body():
        other = Learner("nccl", "cuda:0", "bfloat16")
        where = await alive.rendezvous(2, 300)
        await asyncio.gather(alive.enter(), other.join_as(where, 1))
        other.kill()
        sending = asyncio.create_task(alive._ask("send", dict(world.new.named_parameters()), None))
        await asyncio.to_thread(transport.abandon, where, "actor 1 died")
        with pytest.raises(RuntimeError, match="the group was abandoned: actor 1 died"):
            await sending
        again = World(world.folder, world.engine, alive, world.old, world.new)
        await again.reset()
        await again.publish_new(1)
        return await world.engine.generate(PROMPTS[0], LONG, 0)

    completion = run(body(), 120)
    assert np.abs(completion.logprobs - exact(world.new, PROMPTS[0], completion)).mean() < CLOSE


@pytest.mark.multi_gpu
def test_a_member_that_is_silent_over_nccl_is_named_by_the_timeout(world, run, learner):
    alive = learner("nccl")

    async def body():
        await alive.meet(world.engine, timeout_s=3)
        with pytest.raises(RuntimeError, match="failed or took longer than 3 s: nothing came"):
            await alive._ask("send", dict(world.new.named_parameters()), None)
        again = World(world.folder, world.engine, alive, world.old, world.new)
        await again.reset()
        await again.publish_new(1)

    run(body(), 120)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_tensor_parallel_engines_take_updates_in_flight(run, learner, parallel, world, mode):
    """Over gloo: two GPUs leave none for a learner on NCCL."""
    wide = World(world.folder, parallel, learner("gloo"), world.old, world.new)

    async def more():
        calls = [asyncio.create_task(parallel.generate(p, LONG, i)) for i, p in enumerate(PROMPTS)]
        for version in range(2, 12):
            await wide.publish_new(version)
        return await asyncio.gather(*calls)

    check_boundary(wide, run(in_flight(wide, mode), 120), mode)
    assert all(len(completion.token_ids) == LENGTH for completion in run(more(), 120))


@pytest.fixture(scope="module")
def parallel(world, run):
    options = {"max_running": 64, "max_length": 512, "gpu_memory_utilization": 0.2, "tensor_parallel_size": 2}
    engine = run(start(world.folder, dtype="bfloat16", device="cuda", **options), 400)
    yield engine
    run(engine.close())
