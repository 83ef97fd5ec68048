"""Who is alive is told when it changes: in events, at the endpoint, in the view, in the verdict."""

import asyncio
import io
import time

import pytest
import ray
from helpers import run
from rich.console import Console
from test_rollout_pool import PROMPTS, Actor, Learner, supervised
from test_timeline import row

from asyncrl.driver import supervisor
from asyncrl.driver.rollout_pool import RolloutPool
from asyncrl.engines.base import EngineDied
from asyncrl.monitor import events, view
from asyncrl.monitor.bottleneck import ALIVE, OUTAGE, blame, waits
from asyncrl.monitor.course import Course
from asyncrl.monitor.events import Events
from asyncrl.monitor.news import Silence
from asyncrl.monitor.sinks import Prometheus
from asyncrl.monitor.timeline import Span, Timeline
from asyncrl.runtime.handles import ActorDied
from asyncrl.runtime.ray_handles import cause_of_death


def text_of(renderable):
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    return console.file.getvalue()


def shown(folder):
    course = Course(view.NAMES, view.NUM_STEPS)
    return text_of(view.screen("run", {"num_steps": 9}, course, news=events.read(folder)))


def died_of(text):
    return ray.exceptions.RayActorError("ab12", f"The actor died unexpectedly.\n\tpid: 7\n{text}")


def test_the_death_of_all_is_told_at_once_everywhere_until_a_replacement_plays(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.01)

    async def body():
        arrived, timeline = asyncio.Event(), Timeline()
        told = Events(tmp_path, timeline.now)

        async def start(number):
            await arrived.wait()
            return Actor(f"rollout {number}")

        async def until(done):
            while not any(map(done, events.read(tmp_path))):
                await asyncio.sleep(0.01)

        pool = RolloutPool([Actor("rollout 0"), Actor("rollout 1")], max_attempts=9, timeline=timeline)
        pool.presence.emit = told.emit
        endpoint = Prometheus("127.0.0.1", 0, {})
        endpoint.write(1, {"rollout/num_actors": 2.0})
        endpoint.gauges = pool.gauges
        await pool.update_weights(Learner())
        watch = supervised(pool, start, tmp_path, told.emit, target=2, first_number=2, max_replacements=3)
        await asyncio.sleep(0)
        for actor in pool.actors:
            actor.error = actor.update_error = ActorDied("its process was killed", "a page of Ray")
        playing = asyncio.ensure_future(pool.run(PROMPTS[0]))
        await until(lambda event: event.subject == "rollout 3")
        first, second, outage, *starts = events.read(tmp_path)
        assert first.message == "rollout 0 died: its process was killed; replacement 1 of 3 is started"
        assert second.message == "rollout 1 died: its process was killed; replacement 2 of 3 is started"
        assert (second.facts["raw"], second.facts["alive"]) == ("a page of Ray", 0)
        assert outage.line == "alarm: no rollout actor is alive: waiting for replacement 1 of 3"
        assert [event.subject for event in starts] == ["rollout 2", "rollout 3"]
        page = endpoint.page({})
        assert "asyncrl_rollout_num_actors 0\n" in page
        assert 'asyncrl_rollout_failures_by_kind{kind="actor died"} 2' in page
        assert "no rollout actor alive for 0 s, waiting for replacement 1 of 3" in shown(tmp_path)
        assert "time left unknown" in shown(tmp_path)
        assert "rollout 1 died: its process was killed" in shown(tmp_path)
        monkeypatch.setattr(pool.presence, "_reminder_s", 0.0)
        await until(lambda event: "no rollout actor has been alive for" in event.message)
        arrived.set()
        await playing
        assert pool.gauges()["rollout/outage_s"] == 0
        (over,) = [event for event in events.read(tmp_path) if event.facts.get("over")]
        assert (over.alarm, over.kind) == (False, "outage")
        assert "no rollout actor alive" not in shown(tmp_path)
        watch.cancel()
        endpoint.close()
        assert OUTAGE in {span.lane for span in timeline.since(0.0)}

    run(body())


def test_an_outage_is_no_wait_for_groups_or_slots():
    """Window 0..100. One actor plays 0..10, dies; another comes at 90 and is without a prompt for 5 s."""
    spans = [
        Span("rollout 0", ALIVE, -50, 10),
        Span("rollout 0", "group", 0, 10),
        Span(OUTAGE, "no rollout actor alive", 10, 90),
        Span("rollout 1", ALIVE, 90, 100),
        Span("rollout 1", "group", 95, 100),
        Span("learner", "step", 0, 20),
        Span("learner", "wait for groups", 20, 95),
    ]
    found = waits(spans, 0, 100, num_actors=1)
    assert found["wait/outage_s"] == pytest.approx(70)
    assert found["wait/learner_for_groups_s"] == pytest.approx(5)
    assert found["wait/rollout_for_slots_s"] == pytest.approx(5)


def test_the_verdict_names_the_outage_and_judges_the_rest_without_it():
    usual = [row(groups=4.0, slots=3.0, idle=0.3)] * 9
    out = usual[-1] | {"wait/window_s": 210.0, "wait/outage_s": 200.0}
    found = blame([*usual, out])
    assert found.sentence.startswith(
        "no rollout actor was alive for 200 s in which the learner waited, 67% of the time"
    )
    assert found.sentence.endswith(blame(usual).sentence)
    assert found.shares["wait/outage_s"] == pytest.approx(200 / 300)
    assert found.shares["wait/learner_for_groups_s"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (died_of("its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: ..."), "signal"),
        (died_of("Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: ..."), "out of memory"),
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\n"), "out of memory"),
        (died_of("The actor died because its node has died. Node Id: ab"), "node was lost"),
        (died_of("The actor is dead because it was killed by `ray.kill`."), "on purpose"),
        (EngineDied("the SGLang process 7 ended with exit code -9"), "its engine ended: the SGLang process 7"),
        (died_of("of something new"), "The actor died unexpectedly."),
    ],
)
def test_a_cause_of_death_is_one_line_in_our_words(error, cause):
    told = cause_of_death(error)
    assert cause in told
    assert "\n" not in told
    assert "pid" not in told


def test_a_silent_run_is_timed_by_the_clock_that_nobody_sets(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    silence = Silence(path)
    monkeypatch.setattr(time, "time", lambda: 5.0)  # 1970
    assert 0 <= silence.seconds() < 60
    monkeypatch.setattr(time, "time", lambda: 9e9)
    assert 0 <= silence.seconds() < 60
