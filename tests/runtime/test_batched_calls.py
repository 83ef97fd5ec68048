"""Several prompts and groups in one call: each comes back by itself, with its own tokens or its own error."""

import asyncio
from dataclasses import replace

import pytest
from helpers import run, trajectory

from asyncrl.envs.attempt import EnvFault
from asyncrl.runtime import batched_calls as exchange
from asyncrl.runtime.batched_calls import Exchange, Outbox, Part, separate, unite
from asyncrl.runtime.handles import ActorDied
from asyncrl.runtime.rollout_worker import make_group
from asyncrl.types import Prompt

PROMPTS = [Prompt(number, (1, 2, number), "") for number in range(8)]


def group_of(prompt):
    """One whose tokens tell which prompt they belong to."""
    return make_group(prompt, [trajectory(2, 3, seed=prompt.id)])


class Link:
    """Joins the two sides without Ray."""

    def __init__(self, play):
        self.outbox = Outbox(play)
        self.sent, self.open = [], 0
        self.exchange = Exchange(self.call, lambda error: ActorDied(str(error)))

    def call(self, prompts):
        self.sent.append(len(prompts))
        self.open += 1
        both = asyncio.ensure_future(self.outbox.exchange(prompts))

        async def half(index):
            return (await both)[index]

        answers = asyncio.ensure_future(half(0))
        answers.add_done_callback(self.closed)
        return answers, asyncio.ensure_future(half(1))

    def closed(self, _answers):
        self.open -= 1

    def run(self, prompts):
        return [asyncio.ensure_future(self.exchange.run(prompt)) for prompt in prompts]


def held_link():
    """A link whose groups finish once the event is set, and the event."""
    release = asyncio.Event()

    async def play(prompt):
        await release.wait()
        return group_of(prompt)

    return Link(play), release


async def tokens_of(group):
    return (await group.trajectories)[0].token_ids.tolist()


async def settle():
    """Until nothing is left to do but wait."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_prompts_of_one_turn_are_one_call_and_nobody_waits_for_a_straggler():
    async def body():
        release = asyncio.Event()

        async def play(prompt):
            if prompt.id == 0:
                await release.wait()
            return group_of(prompt)

        link = Link(play)
        straggler, *others = link.run(PROMPTS)
        groups = await asyncio.gather(*others)
        assert link.sent[0] == len(PROMPTS)
        assert not straggler.done()
        release.set()
        groups.insert(0, await straggler)
        assert [group.prompt for group in groups] == PROMPTS
        for prompt, group in zip(PROMPTS, groups, strict=True):
            assert await tokens_of(group) == group_of(prompt).trajectories[0].token_ids.tolist()
        await settle()
        assert link.open == 0
        places, batches = unite(groups)
        assert len(batches) == 2, "the tokens of the seven are one object"
        assert len(set(places)) == len(PROMPTS)

    run(body(), seconds=10)


class Unsendable(Exception):
    kind = "engine lost"

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


@pytest.mark.parametrize(
    ("error", "kind"), [(EnvFault("env exception", "it broke"), "env exception"), (Unsendable(1, 2), "engine lost")]
)
def test_an_error_reaches_its_own_prompt_alone_with_its_kind_and_stack(error, kind):
    async def play(prompt):
        if prompt.id == 3:
            raise error
        return group_of(prompt)

    async def body():
        return await asyncio.gather(*Link(play).run(PROMPTS), return_exceptions=True)

    results = run(body(), seconds=10)
    failed = results.pop(3)
    assert failed.kind == kind
    assert "in play" in "".join(failed.__notes__)
    assert all(group.rewards == (0.0,) for group in results)


def test_a_play_that_is_cancelled_fails_its_prompt():
    async def body():
        link, _ = held_link()
        (play,) = link.run(PROMPTS[:1])
        await settle()
        (playing,) = link.outbox._running
        playing.cancel()
        with pytest.raises(RuntimeError, match=r"the play of prompt 0 ended by CancelledError\(\)"):
            await play
        assert not link.outbox._running

    run(body(), seconds=10)


def test_a_call_that_fails_fails_every_prompt_of_the_actor():
    async def body():
        async def play(_prompt):
            await asyncio.Event().wait()

        link = Link(play)
        plays = link.run(PROMPTS[:4])
        await settle()
        dead = asyncio.get_running_loop().create_future()
        link.exchange._call = lambda _prompts: (dead, None)
        plays += link.run(PROMPTS[4:])
        await settle()
        dead.set_exception(ConnectionError("gone"))
        results = await asyncio.gather(*plays, return_exceptions=True)
        assert [str(result) for result in results] == ["gone"] * len(PROMPTS)
        assert {type(result) for result in results} == {ActorDied}

    run(body(), seconds=10)


def test_a_call_that_cannot_be_made_fails_its_prompts():
    def refuse(_prompts):
        raise TypeError("cannot be sent")

    async def body():
        with pytest.raises(ActorDied, match="cannot be sent"):
            await Exchange(refuse, lambda error: ActorDied(str(error))).run(PROMPTS[0])

    run(body(), seconds=10)


@pytest.mark.parametrize(("typical_s", "together"), [(3.2, True), (0.03, False)])
def test_a_group_waits_for_company_in_proportion_to_what_groups_take(typical_s, together):
    """The second comes 0.05 s after the first: within 3.2 / 32 s, and not within the least of 0.01 s."""

    async def body():
        never = asyncio.Event()

        async def play(prompt):
            await (never.wait() if prompt.id == 2 else asyncio.sleep(0.05 * prompt.id))
            return group_of(prompt)

        link = Link(play)
        link.outbox._typical_s = typical_s
        *plays, straggler = link.run(PROMPTS[:3])
        _, batches = unite(await asyncio.gather(*plays))
        assert (len(batches) == 1) == together
        never.set()
        await straggler
        assert link.outbox._typical_s < typical_s or not together, "what these took counts from now on"

    run(body(), seconds=10)


def test_the_last_group_ends_the_wait_for_company(monkeypatch):
    monkeypatch.setattr(exchange, "_LINGER_S", (60, 60))

    async def body():
        async def play(prompt):
            await asyncio.sleep(0.05 * prompt.id)
            return group_of(prompt)

        _, batches = unite(await asyncio.gather(*Link(play).run(PROMPTS[:3])))
        assert len(batches) == 1

    run(body(), seconds=10)


def test_open_calls_never_outnumber_the_prompts_that_are_out():
    """Prompts that come one by one bring a call each; their groups, finished together, leave in one answer."""

    async def body():
        link, release = held_link()
        plays = []
        for prompt in PROMPTS:
            plays += link.run([prompt])
            await settle()
        assert link.open == len(PROMPTS)
        release.set()
        await asyncio.gather(*plays)
        await settle()
        assert link.open == 0
        assert link.sent == [1] * len(PROMPTS)

    run(body(), seconds=10)


def test_a_prompt_that_was_given_up_disturbs_nobody():
    async def body():
        link, release = held_link()
        plays = link.run(PROMPTS)
        await settle()
        plays[2].cancel()
        await settle()
        release.set()
        results = await asyncio.gather(*plays, return_exceptions=True)
        assert isinstance(results.pop(2), asyncio.CancelledError)
        assert [group.prompt.id for group in results] == [0, 1, 3, 4, 5, 6, 7]

    run(body(), seconds=10)


def test_groups_from_disk_and_from_actors_train_together():
    batch = [[trajectory(2, 3, seed=seed)] for seed in range(3)]
    restored = group_of(PROMPTS[0])
    groups = [replace(restored, trajectories=Part(batch, 2)), restored, replace(restored, trajectories=Part(batch, 0))]
    places, batches = unite(groups)
    assert len(batches) == 2
    assert separate(places, batches) == [batch[2], restored.trajectories, batch[0]]
