"""The pool of rollout actors: who gets a prompt, who leaves, who joins, and what waits for whom meanwhile."""

import asyncio
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import pytest
from helpers import run, telling, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.driver import supervisor
from asyncrl.driver import weight_update as update_group
from asyncrl.driver.rollout_pool import AllActorsDied, RolloutFailed, RolloutPool
from asyncrl.driver.supervisor import Supervisor, request
from asyncrl.envs.attempt import EnvFault
from asyncrl.monitor.events import nowhere
from asyncrl.recovery.journal import Journal
from asyncrl.runtime.handles import ActorDied
from asyncrl.runtime.rollout_worker import UpdateReport, make_group
from asyncrl.types import Failure, Prompt
from asyncrl.weights.broadcast import Rendezvous

PROMPTS = [Prompt(number, (1, 2), "") for number in range(8)]


@pytest.fixture(autouse=True)
def abandoned(monkeypatch):
    """Why broadcast groups were abandoned, in order."""
    reasons = []
    monkeypatch.setattr(update_group, "abandon", lambda _where, reason: reasons.append(reason))
    return reasons


class Actor:
    num_ranks = 1

    def __init__(self, name):
        self.name = name
        self.played, self.joined = [], []
        self.gate = asyncio.Event()
        self.gate.set()
        self.updating = asyncio.Event()
        self.updating.set()
        self.error = None
        self.digest = "right"
        self.join_error = self.update_error = None
        self.closed = asyncio.Event()

    async def run(self, prompt):
        self.played.append(prompt.id)
        await self.gate.wait()
        if self.error:
            raise self.error
        return make_group(prompt, [trajectory(2, 3, seed=prompt.id)])

    async def evaluate(self, prompts):
        await self.gate.wait()
        if self.error:
            raise self.error
        return [make_group(prompt, [trajectory(2, 3, seed=prompt.id)]) for prompt in prompts]

    async def join(self, where, first_rank):
        self.joined.append((where.world_size, first_rank))
        if self.join_error:
            raise self.join_error

    async def update_weights(self, _buckets, _version):
        await self.updating.wait()
        if self.update_error:
            raise self.update_error
        return UpdateReport(self.digest, 0.002, 0.005, 0.01, 1.0, 0.5, 0.1, 10)

    async def close(self):
        self.closed.set()


class Learner:
    version = 3
    buckets = ()

    async def rendezvous(self, world_size):
        return Rendezvous("nowhere", 0, world_size, "test")

    async def join(self):
        pass

    async def prepare(self):
        pass

    async def broadcast(self):
        return "right"


def supervised(pool, start, folder, emit=nowhere, **options):
    """The task of a supervisor over a pool."""
    supervisor = Supervisor(pool, start, folder, **options, emit=emit)
    return asyncio.ensure_future(supervisor.run(asyncio.Lock(), lambda: pool.update_weights(Learner())))


async def ask(folder, wanted):
    """Another number of actors, of a supervisor that looks often; comes back once it has read that."""
    (folder / "control.json").write_text(f'{{"num_rollout_actors": {wanted}}}')
    while (folder / "control.json").exists():
        await asyncio.sleep(0.01)


def test_prompts_go_to_the_least_loaded():
    async def body():
        slow, fast = Actor("slow"), Actor("fast")
        slow.gate.clear()
        pool = RolloutPool([slow, fast], max_attempts=1)
        first = asyncio.ensure_future(pool.run(PROMPTS[0]))
        await asyncio.sleep(0)
        for prompt in PROMPTS[1:4]:
            await pool.run(prompt)
        slow.gate.set()
        await first
        assert (slow.played, fast.played) == ([0], [1, 2, 3])

    run(body())


def test_prompts_of_one_turn_go_to_few_actors_and_loads_stay_even():
    async def body():
        actors = [Actor(str(number)) for number in range(4)]
        pool = RolloutPool(actors, max_attempts=1)
        for actor in actors:
            actor.gate.clear()
        plays = [asyncio.ensure_future(pool.run(Prompt(number, (1, 2), ""))) for number in range(256)]
        await asyncio.sleep(0)
        loads = [len(actor.played) for actor in actors]
        assert sum(loads) == 256
        assert max(loads) - min(loads) <= 256 // 4 // 8 + 1
        turns = [next(a.name for a in actors if number in a.played) for number in range(192, 256)]
        changes = sum(one != other for one, other in pairwise(turns))
        assert changes <= 64 // 6, "an actor gets several prompts in a row, and not every fourth"
        for actor in actors:
            actor.gate.set()
        await asyncio.gather(*plays)

    run(body())


def test_a_failure_is_tried_on_the_other_actor_and_counted():
    async def body():
        broken, sound = Actor("broken"), Actor("sound")
        broken.error = KeyError("x")
        pool, said = RolloutPool([broken, sound], max_attempts=2), []
        pool.presence.emit = telling(said)
        for prompt in PROMPTS:
            assert (await pool.run(prompt)).prompt == prompt
        assert sound.played == [prompt.id for prompt in PROMPTS]
        assert pool.failures == {"KeyError": len(broken.played)}
        assert said == ["alarm: 'x'; such attempts are made again, within limits, and counted"]

    run(body())


def test_attempts_that_an_actor_made_again_are_counted_and_told_once():
    class Flaky(Actor):
        async def run(self, prompt):
            return replace(await super().run(prompt), failures=(Failure("env timeout", f"slow on {prompt.id}"),) * 2)

    async def body():
        pool, said = RolloutPool([Flaky("a")], max_attempts=1), []
        pool.presence.emit = telling(said)
        for prompt in PROMPTS[:3]:
            await pool.run(prompt)
        assert pool.failures == {"env timeout": 6}
        assert said == ["alarm: slow on 0; such attempts are made again, within limits, and counted"]

    run(body())


def test_an_environment_that_used_up_its_attempts_is_tried_elsewhere_and_nowhere_twice():
    async def body():
        fault = EnvFault("env exception", "no judge")
        fault.failures = (Failure("env timeout", "slow"), Failure("env exception", "no judge"))
        broken, sound = Actor("broken"), Actor("sound")
        broken.error = fault
        pool = RolloutPool([broken, sound], max_attempts=3)
        assert (await pool.run(PROMPTS[0])).prompt == PROMPTS[0]
        assert pool.failures == {"env exception": 1, "env timeout": 1}
        sound.error = fault
        with pytest.raises(RolloutFailed, match=r"4 attempts of prompt 1 failed, the last on .*no judge"):
            await pool.run(PROMPTS[1])
        assert broken.played.count(1) == sound.played.count(1) == 1
        pool.add(Actor("arriving"))
        with pytest.raises(RolloutFailed, match=r"6 attempts of prompt 2 failed"):
            await pool.run(PROMPTS[2])
        assert broken.played.count(2) + sound.played.count(2) == 3, "there may be a sound one soon"

    run(body())


def test_a_prompt_out_of_attempts_is_named():
    async def body():
        actors = [Actor("a"), Actor("b")]
        for actor in actors:
            actor.error = KeyError("x")
        with pytest.raises(RolloutFailed, match="3 attempts of prompt 5 failed"):
            await RolloutPool(actors, max_attempts=3).run(PROMPTS[5])

    run(body())


def test_the_dead_leave_and_the_last_death_ends_the_run():
    async def body():
        dying, other = Actor("dying"), Actor("other")
        pool, said = RolloutPool([dying, other], max_attempts=3), []
        pool.presence.emit = telling(said)
        await pool.update_weights(Learner())
        assert [dying.joined, other.joined] == [[(3, 1)], [(3, 2)]]
        dying.error = ActorDied("gone:\n\tpid 7\n" + "and more " * 100)
        dying.update_error = dying.error
        assert [group.prompt for group in await pool.evaluate(PROMPTS)] == PROMPTS
        assert pool.actors == [other]
        (line,) = said
        assert line.startswith("alarm: dying died: gone: pid 7 and more")
        assert line.endswith(" ...; nobody takes its place")
        assert len(line) < 400
        await pool.update_weights(Learner())
        assert other.joined[-1] == (2, 1), "the survivors form a group of their own"
        other.error = ActorDied("gone too")
        with pytest.raises(RolloutFailed, match="the last rollout actor, other, died"):
            await pool.run(PROMPTS[0])

    run(body())


def test_a_newcomer_gets_prompts_only_after_its_weights():
    async def body():
        old, new = Actor("old"), Actor("new")
        pool = RolloutPool([old], max_attempts=1)
        await pool.update_weights(Learner())
        pool.add(new)
        for prompt in PROMPTS[:3]:
            await pool.run(prompt)
        assert new.played == []
        measured = await pool.update_weights(Learner())
        assert measured["rollout/num_actors"] == 2
        assert [old.joined[-1], new.joined] == [(3, 1), [(3, 2)]]
        for actor in (old, new):
            actor.gate.clear()
        plays = [asyncio.ensure_future(pool.run(prompt)) for prompt in PROMPTS[:4]]
        await asyncio.sleep(0)
        assert len(new.played) == 2
        for actor in (old, new):
            actor.gate.set()
        await asyncio.gather(*plays)

    run(body())


def test_a_newcomer_with_other_weights_ends_the_run():
    async def body():
        pool = RolloutPool([Actor("old")], max_attempts=1)
        new = Actor("new")
        new.digest = "wrong"
        pool.add(new)
        with pytest.raises(RuntimeError, match="new holds other weights"):
            await pool.update_weights(Learner())

    run(body())


def test_a_retired_actor_finishes_its_prompts_and_is_closed():
    async def body():
        busy, idle = Actor("busy"), Actor("idle")
        for actor in (busy, idle):
            actor.gate.clear()
        pool = RolloutPool([busy, idle], max_attempts=1)
        plays = [asyncio.ensure_future(pool.run(prompt)) for prompt in PROMPTS[:3]]
        await asyncio.sleep(0)
        assert pool.retire() is idle
        assert pool.actors == [busy]
        assert not idle.closed.is_set()
        idle.gate.set()
        await idle.closed.wait()
        busy.gate.set()
        assert [group.prompt for group in await asyncio.gather(*plays)] == PROMPTS[:3]
        assert (await pool.update_weights(Learner()))["rollout/num_actors"] == 1

    run(body())


def test_the_dead_are_replaced_prompts_wait_and_too_many_deaths_end_the_run(tmp_path):
    async def body():
        first = Actor("rollout 0")
        first.error = first.update_error = ActorDied("gone")
        started = []

        async def start(number):
            started.append(Actor(f"rollout {number}"))
            return started[-1]

        pool = RolloutPool([first], max_attempts=3)
        watch = supervised(pool, start, tmp_path, target=1, first_number=1, max_replacements=1)
        assert (await pool.run(PROMPTS[0])).prompt == PROMPTS[0]
        (second,) = started
        assert second.played == [0]
        assert pool.published == {3: "right"}
        second.error = ActorDied("gone too")
        with pytest.raises(AllActorsDied):
            await pool.run(PROMPTS[1])
        watch.cancel()

    run(body())


def test_the_number_of_actors_follows_what_is_asked(tmp_path):
    async def body():
        async def start(number):
            return Actor(f"rollout {number}")

        pool = RolloutPool([Actor("rollout 0"), Actor("rollout 1")], max_attempts=1)
        await pool.update_weights(Learner())
        watch = supervised(pool, start, tmp_path, target=2, first_number=2, max_replacements=0)
        (tmp_path / "config.json").touch()
        with closing(Journal(tmp_path / "journal.bin")):
            for wanted in (4, 1):
                request(tmp_path, wanted)
                while len(pool.actors) != wanted:
                    await asyncio.sleep(0.01)
        watch.cancel()
        assert not (tmp_path / "control.json").exists()

    run(body())
    with pytest.raises(ValueError, match="at least 1 rollout actor, got 0"):
        request(tmp_path, 0)
    with pytest.raises(ValueError, match="no run folder"):
        request(tmp_path / "elsewhere", 2)
    with pytest.raises(ValueError, match=r"has ended: go on with launch/run\.py --resume"):
        request(tmp_path, 2)


def test_starts_under_way_are_stopped_before_an_actor_is_retired(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.01)
    lines: list[str] = []

    async def body():
        gate, stopped = asyncio.Event(), []

        async def start(number):
            try:
                await gate.wait()
            except asyncio.CancelledError:
                stopped.append(number)
                raise
            return Actor(f"rollout {number}")

        def check_number(wanted):
            if wanted > 4:
                raise ValueError(f"no room for {wanted}")

        pool = RolloutPool([Actor("rollout 0"), Actor("rollout 1")], max_attempts=1)
        await pool.update_weights(Learner())
        options = {"target": 2, "first_number": 2, "max_replacements": 0, "check_number": check_number}
        watch = supervised(pool, start, tmp_path, telling(lines), **options)
        await ask(tmp_path, 5)
        await asyncio.sleep(0)  # they start
        await ask(tmp_path, 3)
        await asyncio.sleep(0)
        assert stopped == [4, 3]
        gate.set()
        for wanted in (3, 4):
            await ask(tmp_path, wanted)
            while len(pool.actors) < wanted:
                await asyncio.sleep(0.01)
        assert [actor.name for actor in pool.actors] == [f"rollout {number}" for number in (0, 1, 2, 5)]
        assert not pool.failures
        assert not pool._expects_more, "a start that was stopped leaves no replacement behind"
        watch.cancel()

    run(body())
    assert [line for line in lines if "alarm" in line] == ["alarm: no room for 5"]
    assert [line.split()[2] for line in lines if "its start is stopped" in line] == ["4", "3"]


def test_used_up_replacements_are_told_once_and_asking_again_starts_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.01)
    lines: list[str] = []

    async def body():
        async def start(number):
            return Actor(f"rollout {number}")

        pool = RolloutPool([Actor("rollout 0"), Actor("rollout 1"), Actor("rollout 2")], max_attempts=3)
        await pool.update_weights(Learner())
        watch = supervised(pool, start, tmp_path, telling(lines), target=3, first_number=3, max_replacements=0)
        for number in range(3):
            dying = pool.actors[0]
            dying.error = dying.update_error = ActorDied("gone")
            await pool.evaluate(PROMPTS)
            await asyncio.sleep(0.05)  # several looks
            if number == 1:
                await ask(tmp_path, 3)
                while len(pool.actors) < 3:
                    await asyncio.sleep(0.01)
        watch.cancel()
        assert [actor.name for actor in pool.actors] == ["rollout 3", "rollout 4"]

    run(body())
    alarms = [line for line in lines if "alarm" in line and "died" not in line]
    remedy = f"rollout.max_replacements are used up: launch/scale.py {tmp_path} 3 allows as many starts as are missing"
    assert alarms == [f"alarm: 2 of 3 rollout actors are left and {remedy}"] * 2, "again after somebody asked"


@pytest.mark.parametrize("what", ["evaluate", "update"])
def test_a_retired_actor_is_closed_only_once_its_evaluation_or_update_is_through(what):
    async def body():
        actors = [Actor("a"), Actor("b")]
        pool = RolloutPool(actors, max_attempts=1)
        await pool.update_weights(Learner())
        for actor in actors:
            actor.gate.clear()
            actor.updating.clear()
        doing = asyncio.ensure_future(pool.evaluate(PROMPTS) if what == "evaluate" else pool.update_weights(Learner()))
        await asyncio.sleep(0.01)
        retired = pool.retire()
        await asyncio.sleep(0.01)
        assert not retired.closed.is_set()
        for actor in actors:
            actor.gate.set()
            actor.updating.set()
        await doing
        await retired.closed.wait()
        assert (await pool.update_weights(Learner()))["rollout/num_actors"] == 1

    run(body())


def test_a_retired_actor_with_prompts_gives_its_memory_back_and_takes_weights():
    async def body():
        actors = [Actor("a"), Actor("b")]
        released = []
        for actor in actors:
            actor.release = lambda name=actor.name: asyncio.sleep(0, released.append(name))
            actor.gate.clear()
        pool = RolloutPool(actors, max_attempts=1)
        await pool.update_weights(Learner())
        plays = [asyncio.ensure_future(pool.run(prompt)) for prompt in PROMPTS[:2]]
        await asyncio.sleep(0)
        pool.retire()
        await pool.release()
        assert sorted(released) == ["a", "b"]
        assert (await pool.update_weights(Learner()))["rollout/num_actors"] == 2
        for actor in actors:
            actor.gate.set()
        await asyncio.gather(*plays)
        assert (await pool.update_weights(Learner()))["rollout/num_actors"] == 1

    run(body())


def test_nothing_of_the_dead_is_kept_and_their_processes_are_ended():
    async def body():
        dying, other = Actor("dying"), Actor("other")
        pool = RolloutPool([dying, other], max_attempts=2)
        await pool.update_weights(Learner())
        dying.gate.clear()
        plays = [asyncio.ensure_future(pool.run(prompt)) for prompt in PROMPTS]
        await asyncio.sleep(0)
        dying.error = ActorDied("gone")
        dying.gate.set()
        assert [group.prompt for group in await asyncio.gather(*plays)] == PROMPTS
        await dying.closed.wait()
        held = [value for value in vars(pool).values() if isinstance(value, dict | set | list)]
        assert not any(dying in value for value in held)
        assert pool._group is None
        assert pool.failures == {"actor died": 1}

    run(body())


def test_a_newcomer_that_dies_in_its_first_update_is_replaced_too(tmp_path):
    """The update waits for somebody to come, and whoever starts them must not wait for the update."""

    async def body():
        first = Actor("rollout 0")
        first.error = first.update_error = ActorDied("gone")

        async def start(number):
            started = Actor(f"rollout {number}")
            started.join_error = ActorDied("gone at once") if number == 1 else None
            return started

        pool = RolloutPool([first], max_attempts=3)
        watch = supervised(pool, start, tmp_path, target=1, first_number=1, max_replacements=2)
        await pool.run(PROMPTS[0])
        assert [actor.name for actor in pool.actors] == ["rollout 2"]
        watch.cancel()

    run(body())


def test_what_waits_for_an_actor_ends_when_the_supervisor_does(tmp_path):
    async def body():
        pool = RolloutPool([], max_attempts=3)

        async def never(_number):
            await asyncio.Event().wait()

        watch = supervised(pool, never, tmp_path, target=1, first_number=1, max_replacements=1)
        play = asyncio.ensure_future(pool.run(PROMPTS[0]))
        await asyncio.sleep(0.05)
        assert not play.done()
        watch.cancel()
        with pytest.raises(AllActorsDied):
            await play

    run(body())


def test_fewer_are_asked_for_while_the_last_replacement_starts(tmp_path):
    async def body():
        first, gate = Actor("rollout 0"), asyncio.Event()
        first.error = first.update_error = ActorDied("gone")

        async def start(number):
            await gate.wait()
            return Actor(f"rollout {number}")

        pool = RolloutPool([first], max_attempts=3)
        watch = supervised(pool, start, tmp_path, target=2, first_number=1, max_replacements=1)
        play = asyncio.ensure_future(pool.run(PROMPTS[0]))
        await asyncio.sleep(0.05)
        await ask(tmp_path, 1)
        gate.set()
        assert (await play).prompt == PROMPTS[0]
        watch.cancel()

    run(body())


class Worn(Actor):
    """An actor that yields at random, dies when it is told to, and notes what must never happen."""

    def __init__(self, name, random, broken):
        super().__init__(name)
        self.random, self.broken = random, broken
        self.version, self.dead, self.num_calls = None, False, 0

    async def _some_time(self):
        if self.closed.is_set():
            self.broken.append(f"{self.name} is called after it was closed")
        self.num_calls += 1
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)
        self.num_calls -= 1
        if self.dead:
            raise ActorDied(self.name)

    async def run(self, prompt):
        if self.version is None:
            self.broken.append(f"{self.name} plays without weights")
        await self._some_time()
        return make_group(prompt, [trajectory(2, 3, seed=prompt.id)])

    async def join(self, _where, _first_rank):
        await self._some_time()

    async def update_weights(self, _buckets, version):
        await self._some_time()
        self.version = version
        return UpdateReport("right", 0.002, 0.005, 0.01, 1.0, 0.5, 0.1, 10)

    async def close(self):
        if self.closed.is_set() or self.num_calls:
            self.broken.append(f"{self.name} is closed twice, or with {self.num_calls} calls under way")
        self.closed.set()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["run", "run", "update", "add", "retire", "die"]), max_size=25), st.randoms())
def test_whatever_happens_to_actors_no_prompt_is_lost_and_all_that_play_have_the_newest_weights(happenings, random):
    async def body():
        broken, learner = [], Learner()
        actors = [Worn(str(number), random, broken) for number in range(3)]
        pool = RolloutPool(actors, max_attempts=3)
        pool.expect(True)
        await pool.update_weights(learner)
        plays, updating = [], None
        for number, happening in enumerate(happenings):
            alive = [actor for actor in pool.actors if not actor.dead]
            if happening == "run":
                plays.append(asyncio.ensure_future(pool.run(Prompt(number, (1, 2), ""))))
            elif happening == "add":
                actors.append(Worn(f"{number}", random, broken))
                pool.add(actors[-1])
            elif happening == "retire" and len(alive) > 1:
                pool.retire()
            elif happening == "die" and len(alive) > 1:
                random.choice(alive).dead = True
            elif happening == "update" and (updating is None or updating.done()):
                learner.version += 1
                updating = asyncio.ensure_future(pool.update_weights(learner))
            for _ in range(random.randrange(3)):
                await asyncio.sleep(0)
        if updating is not None:
            await updating
        groups = await asyncio.gather(*plays, return_exceptions=True)
        await pool.update_weights(learner)
        assert not broken
        assert pool.actors
        assert {actor.version for actor in pool.actors} == {learner.version}
        assert not any(actor.dead for actor in pool.actors)
        wanted = [number for number, happening in enumerate(happenings) if happening == "run"]
        for number, group in zip(wanted, groups, strict=True):
            assert isinstance(group, RolloutFailed) or group.prompt.id == number
        assert [actor.name for actor in actors if actor not in pool.actors and not actor.closed.is_set()] == []

    run(body())
