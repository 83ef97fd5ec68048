"""A weight update of all rollout actors: what one that fails, dies or hangs in it means for the others."""

import asyncio

import pytest
from helpers import run
from test_rollout_pool import PROMPTS, Actor, Learner, abandoned  # noqa: F401

from asyncrl.driver.rollout_pool import RolloutPool
from asyncrl.driver.watchdog import Watchdog
from asyncrl.monitor.events import nowhere
from asyncrl.runtime.handles import ActorDied
from asyncrl.runtime.rollout_worker import UpdateReport


@pytest.mark.parametrize("fault", ["digest", "error"])
def test_an_update_that_fails_on_one_engine_ends_the_run_and_names_it(fault):
    async def body():
        actors = [Actor("rollout 0"), Actor("rollout 1")]
        if fault == "digest":
            actors[1].digest = "wrong"
        else:
            actors[1].update_error = RuntimeError("disk on fire")
        message = (
            "rollout 1 holds other weights.*version 3.*wrong" if fault == "digest" else "rollout 1 failed.*on fire"
        )
        pool = RolloutPool(actors, max_attempts=1)
        with pytest.raises(RuntimeError, match=message):
            await pool.update_weights(Learner())
        assert 3 not in pool.published

    run(body())


def test_utilisation_is_that_of_the_time_since_the_update_before():
    async def body():
        actor = Actor("a")
        pool = RolloutPool([actor], max_attempts=1)
        assert (await pool.update_weights(Learner()))["rollout/idle"] == pytest.approx(0.5)
        now = UpdateReport("right", 0.004, 0.01, 0.02, 3.0, 2.0, 0.4, 30)
        actor.update_weights = lambda *_: asyncio.sleep(0, now)
        metrics = await pool.update_weights(Learner())
        assert metrics["rollout/idle"] == pytest.approx(0.25)
        assert metrics["rollout/held"] == pytest.approx(0.15)
        assert metrics["rollout/num_tokens"] == 20
        assert [metrics[f"sync/{name}_s"] for name in ("settle", "receive", "pause")] == [0.004, 0.01, 0.02]

    run(body())


def test_an_actor_retired_while_another_dies_in_the_same_update_is_resumed_by_the_next_try():
    async def body():
        dying, retired, other = actors = [Actor("dying"), Actor("retired"), Actor("other")]
        pool = RolloutPool(actors, max_attempts=1)
        await pool.update_weights(Learner())
        for actor in actors:
            actor.gate.clear()
            actor.updating.clear()
        plays = [asyncio.ensure_future(pool.run(prompt)) for prompt in PROMPTS[:3]]
        update = asyncio.ensure_future(pool.update_weights(Learner()))
        await asyncio.sleep(0.01)
        pool._load[dying] = pool._load[other] = 2
        assert pool.retire() is retired
        dying.update_error, retired.update_error = ActorDied("gone"), RuntimeError("abandoned")
        for actor in actors:
            actor.updating.set()
        while len(retired.joined) < 2:
            await asyncio.sleep(0)
        retired.update_error = None
        assert (await update)["rollout/num_actors"] == 2
        assert not retired.closed.is_set()
        for actor in actors:
            actor.gate.set()
        await asyncio.gather(*plays, return_exceptions=True)
        await retired.closed.wait()
        assert (await pool.update_weights(Learner()))["rollout/num_actors"] == 1

    run(body())


@pytest.mark.parametrize("when", ["join", "update"])
def test_an_actor_that_hangs_in_an_update_is_killed_and_the_others_get_the_weights(tmp_path, when):
    """By the watchdog: the others had failed by then, as no broadcast goes on without a member."""

    async def body():
        hanging, other = Actor("hanging"), Actor("other")
        killed, failed = asyncio.Event(), []

        async def hang(*_):
            await killed.wait()
            raise ActorDied("killed")

        async def fail_once(*_):
            del other.update_weights
            failed.append(1)
            raise RuntimeError("nothing came")

        async def stacks():
            return ""

        setattr(hanging, "join" if when == "join" else "update_weights", hang)
        if when == "update":
            other.update_weights = fail_once
        pool = RolloutPool([hanging, other], max_attempts=1)
        pool.watchdog = Watchdog(
            tmp_path,
            timeout_s=0.1,
            action="restart",
            emit=nowhere,
            stacks=stacks,
            kill=lambda actor: killed.set() if actor is hanging else pytest.fail(actor.name),
        )
        watch = asyncio.ensure_future(pool.watchdog.run())
        with pool.watchdog.wait("sync", "version 3 to be live on every rollout actor"):
            assert (await pool.update_weights(Learner()))["rollout/num_actors"] == 1
        assert pool.actors == [other]
        assert len(failed) == (when == "update")
        watch.cancel()

    run(body())


@pytest.mark.parametrize("when", ["join", "update"])
def test_the_others_of_a_broadcast_group_hear_of_a_death(abandoned, when):  # noqa: F811
    async def body():
        dying, other = Actor("dying"), Actor("other")
        setattr(dying, f"{when}_error", ActorDied("gone"))
        pool = RolloutPool([dying, other], max_attempts=1)
        assert (await pool.update_weights(Learner()))["rollout/num_actors"] == 1
        assert abandoned == ["dying died"]

    run(body())
