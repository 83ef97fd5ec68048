"""Weight updates between processes that share a GPU: nothing may grow with their number."""

import asyncio

import pytest
import torch
from sglang_learner import Learner, buckets_of

MIB = 2**20


@pytest.mark.parametrize("num_receivers", [1, 2])
def test_memory_is_flat_over_updates_and_the_death_of_a_receiver(run, num_receivers):
    tensors = {f"w{number}": torch.full((16 * MIB // 4,), float(number)) for number in range(3)}
    buckets = buckets_of(tensors)
    assert len(buckets) == 3

    async def updates(learner, receivers, num_updates):
        where = await learner.rendezvous(1 + len(receivers), 60)
        joins = (receiver.join_as(where, rank) for rank, receiver in enumerate(receivers, 1))
        await asyncio.gather(learner.enter(), *joins)
        used = []
        for _ in range(num_updates):
            sending = asyncio.create_task(learner._ask("send", tensors, None))
            for flats in await asyncio.gather(*(receiver.receive(buckets) for receiver in receivers)):
                assert [flat.view(torch.float32).unique().tolist() for flat in flats] == [[0.0], [1.0], [2.0]]
            await sending
            used.append(await learner.memory())
        return used

    async def body():
        learner, *receivers = members = [Learner("ipc", "cuda:0") for _ in range(2 + num_receivers)]
        try:
            used = await updates(learner, receivers, 10)
            receivers.pop().kill()
            used += await updates(learner, receivers, 10)
        finally:
            for member in members:
                member.close()
        return used

    used = run(body(), 300)
    assert max(used) - min(used) < 2 * MIB, used
    assert max(used) < 40 * MIB, "two buffers"
