"""A member that is silent, not dead: it is found out, ended and replaced, and the run goes on."""

import asyncio
import os
import signal
from types import SimpleNamespace

import pytest
from helpers import run, telling
from test_rollout_pool import PROMPTS, Actor, Learner, abandoned  # noqa: F401

from asyncrl.config import loading as configuration
from asyncrl.driver import heartbeat
from asyncrl.driver import run as job
from asyncrl.driver.rollout_pool import AllActorsDied, RolloutPool
from asyncrl.monitor import metrics
from asyncrl.recovery import journal
from asyncrl.recovery.prompt_states import Admitted, Batch
from asyncrl.runtime import ray_cluster as cluster
from asyncrl.runtime.handles import ActorDied
from asyncrl.weights.broadcast import BroadcastFailed


class Stopped(Actor):
    """An actor whose process may be stopped: nothing answers then, until it is killed."""

    def __init__(self, name):
        super().__init__(name)
        self.stopped = False
        self.killed = asyncio.Event()

    async def run(self, prompt):
        await self._answer()
        return await super().run(prompt)

    async def join(self, where, first_rank):
        await self._answer()
        await super().join(where, first_rank)

    async def update_weights(self, buckets, version):
        await self._answer()
        return await super().update_weights(buckets, version)

    async def ping(self):
        await self._answer()

    async def _answer(self):
        if self.stopped:
            await self.killed.wait()
        if self.killed.is_set():
            raise ActorDied("killed")


def listened(actors, timeout_s=0.2):
    """A pool of them with its heartbeats, and what it said."""
    pool, said = RolloutPool(actors, max_attempts=3), []
    pool.presence.emit, pool.kill = telling(said), lambda actor: actor.killed.set()
    return pool, asyncio.ensure_future(pool.listen(timeout_s)), said


@pytest.mark.parametrize("when", ["join", "update"])
def test_a_silent_actor_is_left_out_of_an_update_and_ended(when):
    async def body():
        silent, other = Stopped("silent"), Stopped("other")
        pool, listening, said = listened([silent, other])
        if when == "update":
            await pool.update_weights(Learner())
        silent.stopped = True

        async def fail_once(*_):
            del other.update_weights  # as a broadcast does at everybody when one stalls
            raise BroadcastFailed("gloo: timed out")

        if when == "update":
            other.update_weights = fail_once
        assert (await pool.update_weights(Learner()))["rollout/num_actors"] == 1
        assert pool.actors == [other]
        assert pool.failures == {"actor fell silent": 1}
        assert [line for line in said if "silent" in line] == [
            "alarm: silent fell silent: no answer for 0 s (weights.timeout_s); nobody takes its place"
        ]
        await silent.closed.wait()
        listening.cancel()

    run(body())


def test_the_prompts_of_a_silent_actor_are_played_elsewhere():
    async def body():
        silent, other = Stopped("silent"), Stopped("other")
        pool, listening, _ = listened([silent, other])
        silent.stopped = True
        groups = await asyncio.gather(*(pool.run(prompt) for prompt in PROMPTS))
        assert [group.prompt for group in groups] == PROMPTS
        assert sorted(other.played) == [prompt.id for prompt in PROMPTS]
        listening.cancel()

    run(body())


def test_the_silence_of_the_last_one_ends_the_run_with_its_reason():
    async def body():
        silent = Stopped("silent")
        _, listening, _ = listened([silent])
        silent.stopped = True
        with pytest.raises(AllActorsDied, match="silent, fell silent: no answer"):
            await listening

    run(body())


def test_an_actor_that_answers_late_but_in_time_stays(monkeypatch):
    """Also when it is this process that was stopped: the clock jumps, nobody is blamed."""

    async def body():
        actor = Stopped("slow")
        now, pings = [0.0], []
        monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))

        async def ping():
            pings.append(now[0])
            now[0] += 1000  # at each look
            await asyncio.sleep(0.1)

        actor.ping = ping
        listening = asyncio.ensure_future(heartbeat.listen(lambda: [actor], lambda *told: pytest.fail(str(told)), 0.4))
        while len(pings) < 3:
            await asyncio.sleep(0.01)
            assert not listening.done()
        listening.cancel()

    run(body())


@pytest.mark.parametrize("failing", ["learner", "actor"])
def test_a_broadcast_that_failed_while_all_live_is_made_again(failing):
    async def body():
        actors = [Stopped("a"), Stopped("b")]
        pool, listening, said = listened(actors, timeout_s=60)
        learner = Learner()
        await pool.update_weights(learner)

        async def fail_once(*_):
            del failing_one.__dict__[name]
            raise BroadcastFailed("rank 0: timed out\nof gloo")

        failing_one, name = (learner, "broadcast") if failing == "learner" else (actors[1], "update_weights")
        setattr(failing_one, name, fail_once)
        assert (await pool.update_weights(learner))["rollout/num_actors"] == 2
        assert said == ["alarm: version 3 goes out again, as its broadcast failed: rank 0: timed out of gloo"]
        assert [len(actor.joined) for actor in actors] == [2, 2], "in a new group"
        listening.cancel()

    run(body())


@pytest.mark.parametrize(("first", "num_tries"), [(True, 1), (False, 3)])
def test_a_broadcast_that_always_fails_ends_the_run(first, num_tries):
    async def body():
        actor, learner, tries = Stopped("a"), Learner(), []
        pool, listening, _ = listened([actor], timeout_s=60)
        if not first:
            await pool.update_weights(learner)

        async def fail():
            tries.append(1)
            raise BroadcastFailed("closed ports")

        learner.broadcast = fail
        with pytest.raises(BroadcastFailed, match="closed ports"):
            await pool.update_weights(learner)
        assert len(tries) == num_tries
        listening.cancel()

    run(body())


def test_an_actor_that_failed_by_itself_is_named_and_not_the_broadcast_that_it_broke():
    async def body():
        actors, learner = [Stopped("a"), Stopped("b")], Learner()
        pool, listening, _ = listened(actors, timeout_s=60)

        async def fail():
            raise BroadcastFailed("nothing came")

        learner.broadcast = fail
        actors[1].update_error = RuntimeError("disk on fire")
        with pytest.raises(RuntimeError, match="b failed to take weights version 3: disk on fire"):
            await pool.update_weights(learner)
        listening.cancel()

    run(body())


WORDS = [
    "env.path=asyncrl.envs.digits:SortDigits",
    "rollout.num_actors=2",
    "rollout.max_new_tokens=8",
    "rollout.group_size=4",
    "learner.groups_per_step=4",
    "eval.num_prompts=8",
    "eval.every=0",
    "num_steps=100000",
    "checkpoint.every=0",
    "weights.timeout_s=5",
]


@pytest.mark.timeout(300)
def test_a_run_goes_on_without_a_process_that_was_stopped_and_loses_no_prompt(tmp_path, monkeypatch):
    started, real = [], cluster.start_rollout

    async def watched(*arguments):
        started.append(await real(*arguments))
        return started[-1]

    monkeypatch.setattr(cluster, "start_rollout", watched)
    config = configuration.load(None, [*WORDS, f"run_dir={tmp_path}"])

    async def body():
        training = asyncio.ensure_future(job.train(config, quiet=True))

        async def steps(after, num_actors=None):
            """The version of a step after this one, made with so many actors."""
            while True:
                rows = [row for path in tmp_path.glob("*/metrics.jsonl") for row in metrics.read(path.parent)]
                found = [row["version"] for row in rows if row["version"] > after and "rollout/num_actors" in row]
                right = [row for row in rows if row["version"] in found and row.get("rollout/num_actors") == num_actors]
                if right or (found and num_actors is None):
                    return found[-1]
                assert not training.done(), training.result()
                await asyncio.sleep(0.1)

        at = await steps(0)
        os.kill(started[0].facts["pid"], signal.SIGSTOP)
        at = await steps(at, num_actors=1)
        while len(started) < 3:
            await asyncio.sleep(0.1)
        at = await steps(at, num_actors=2)
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)
        return next(path for path in tmp_path.iterdir() if path.name != "cache"), at

    folder, last = run(body(), seconds=280)
    assert not os.path.exists(f"/proc/{started[0].facts['pid']}"), "the one that was stopped would come back"
    assert "fell silent: no answer for" in (folder / "events.jsonl").read_text()
    records, _, _ = journal.read(folder / "journal.bin")
    trained = [number for record in records if isinstance(record, Batch) for number in record.ids]
    assert len(trained) == len(set(trained)) >= 4 * last
    accounts = journal.Journal(folder / "journal.bin").accounts
    admitted = {record.id for record in records if isinstance(record, Admitted)}
    assert set(trained) | set(accounts.open_ids) == admitted == set(range(accounts.next_id)), "a prompt was lost"
