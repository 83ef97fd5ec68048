"""Environments that are slow, raise or give garbage: each counted under its own name, none a silent reward of 0."""

import asyncio
import contextlib
import math
import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import run, trajectory

from asyncrl.envs import attempt as faults
from asyncrl.envs.attempt import Bounds, EnvFault, Patience, attempt
from asyncrl.envs.sandbox import Starved, waiting
from asyncrl.runtime.rollout_worker import Rollout
from asyncrl.types import Completion, Prompt, Sampling

PROMPT = Prompt(4, (1, 2), "")


BOUNDS = Bounds(vocabulary=26, length=20)


class Engine:
    num_ranks, busy_s = 1, 0.0

    def __init__(self, delay_s=0.0, error=None):
        self.delay_s, self.error = delay_s, error

    async def generate(self, _token_ids, _sampling, _seed):
        await asyncio.sleep(self.delay_s)
        if self.error:
            raise self.error
        return Completion(np.full(3, 3, np.int32), np.zeros(3, np.float32), np.zeros(3, np.int32), "stop")


class Env:
    max_prompt_tokens = 2

    def __init__(self, after):
        self.after = after

    async def play(self, prompt, generate):
        await generate(prompt.token_ids)
        return await self.after()


def play(after, engine=None, timeout_s=5.0):
    rollout = Rollout(
        engine or Engine(), Env(after), Sampling(4), group_size=1, seed=0, timeout_s=timeout_s, bounds=BOUNDS
    )
    return run(rollout.run(PROMPT), seconds=20)


async def good():
    return trajectory(2, 3, seed=0, reward=np.float32(0.5))


async def raises():
    raise TimeoutError("of its own")


async def starves():
    raise Starved("no time")


async def never():
    await asyncio.Event().wait()


async def cancels_a_helper():
    helper = asyncio.create_task(asyncio.Event().wait())
    helper.cancel()
    await helper


async def exits():
    sys.exit("graded")


def gives(value):
    async def after():
        return value

    return after


GOOD = trajectory(2, 3, seed=0)


@pytest.mark.parametrize(
    ("after", "kind", "text"),
    [
        (raises, "env exception", r"Env raised TimeoutError.*of its own.*, \S*test_attempt\.py line \d+, on prompt 4"),
        (cancels_a_helper, "env exception", r"raised CancelledError\(\), \S*test_attempt\.py line \d+, on prompt 4"),
        (starves, "env starved", r"raised Starved\('no time'\), .* on prompt 4"),
        (exits, "env exception", r"raised SystemExit\('graded'\), \S*test_attempt\.py line \d+, on prompt 4"),
        (never, "env timeout", r"took more than 0.1 s beside generation \(env.timeout_s\) on prompt 4"),
        (lambda: 3, "env exception", r"can't be used in 'await' expression.*test_attempt\.py line \d+, on prompt 4"),
        (gives(trajectory(2, 4, seed=0)), "env garbage", r"trains 4 tokens and 3 were sampled \(the mask is True for"),
        (gives(None), "env garbage", "gave a NoneType, not a Trajectory"),
        (gives(replace(GOOD, reward=math.nan)), "env garbage", "gave reward nan"),
        (gives(replace(GOOD, reward="1")), "env garbage", "gave reward '1'"),
        (gives(replace(GOOD, metrics={"score": math.inf})), "env garbage", "gave score inf"),
        (
            gives(replace(GOOD, reward=math.nan, metrics={"reward": 1.0})),
            "env garbage",
            "gave a metric 'reward', which the run itself counts: give it another name",
        ),
        (gives(replace(GOOD, metrics={3: 1.0})), "env garbage", "gave a metric 3, whose name is no text"),
        (gives(replace(GOOD, metrics=[1.0])), "env garbage", "gave metrics of list"),
        (gives(replace(GOOD, reward=3e38)), "env garbage", r"gave the reward 3e\+38, above 1e\+16 .*: scale it"),
        (gives(replace(GOOD, reward=10**5000)), "env garbage", r"gave reward of 16610 bits, not a finite number"),
        (
            gives(replace(GOOD, token_ids=GOOD.token_ids * 0 - 1)),
            "env garbage",
            "gave the token id -1, which the model",
        ),
        (
            gives(replace(GOOD, token_ids=GOOD.token_ids + 99)),
            "env garbage",
            r"gave the token id \d+, .* are 0 to 25\)",
        ),
        (gives(replace(GOOD, logprobs=GOOD.logprobs * np.nan)), "env garbage", "gave the log-probability nan"),
        (gives(replace(GOOD, versions=GOOD.versions + 7)), "env garbage", "gave the version 7 for a sampled token"),
        (gives(trajectory(30, 3, seed=0)), "env garbage", "gave a trajectory of 33 tokens .*raise learner.row_tokens"),
    ],
)
def test_each_fault_has_its_kind(after, kind, text):
    with pytest.raises(EnvFault, match=text) as caught:
        play(after, timeout_s=0.1)
    assert caught.value.kind == kind
    assert pickle.loads(pickle.dumps(caught.value)).kind == kind, "it travels between processes"


@pytest.mark.parametrize(
    ("context", "text"),
    [
        ("s12=", r"generate takes the token ids .* got 's12=' \(str\): tokenizer.encode\(text"),
        ([[1, 2]], r"generate takes .* got \[\[1, 2\]\] \(list\)"),
        ([], r"generate takes .* got \[\] \(list\)"),
        ({"input_ids": [1]}, r"generate takes .* \(dict\)"),
        ([1, 26], r"generate got the token id 26 and those of the model are 0 to 25"),
        ([-1], r"generate got the token id -1"),
        ([1, 2, 3], r"a context of 3 tokens and max_prompt_tokens of the environment is 2, .*args.max_context_tokens"),
    ],
)
def test_a_context_that_no_engine_takes_is_the_environments_fault_on_its_line(context, text):
    class Wrong(Env):
        async def play(self, _prompt, generate):
            await generate(context)

    rollout = Rollout(Engine(), Wrong(good), Sampling(4), group_size=1, seed=0, bounds=BOUNDS)
    with pytest.raises(EnvFault, match=f"Wrong raised .*{text}.*test_attempt\\.py line \\d+, on prompt 4") as caught:
        run(rollout.run(PROMPT))
    assert caught.value.kind == "env exception"


@pytest.mark.parametrize("kind", [tuple, list, np.array])
def test_a_context_may_be_any_sequence_of_integers(kind):
    class Own(Env):
        async def play(self, _prompt, generate):
            await generate(kind([1, 2]))
            return GOOD

    assert run(Rollout(Engine(), Own(good), Sampling(4), group_size=1, seed=0).run(PROMPT)).lengths == (3,)


def test_an_attempt_that_is_spoilt_is_made_again_alone_with_the_samples_that_it_had():
    class Flaky:
        max_prompt_tokens = 2

        def __init__(self, times):
            self.left, self.seeds = times, []

        async def play(self, prompt, generate):
            await generate(prompt.token_ids)
            if self.left:
                self.left -= 1
                raise ConnectionError("the judge is away")
            return GOOD

    class Seeds(Engine):
        def __init__(self):
            super().__init__()
            self.seeds = []

        async def generate(self, token_ids, sampling, seed):
            self.seeds.append(seed)
            return await super().generate(token_ids, sampling, seed)

    def played(times):
        engine = Seeds()
        rollout = Rollout(engine, Flaky(times), Sampling(4), group_size=4, seed=0, max_attempts=3)
        return run(rollout.run(PROMPT)), engine.seeds

    group, seeds = played(2)
    assert [(failure.kind, "the judge is away" in failure.text) for failure in group.failures] == [
        ("env exception", True)
    ] * 2
    assert len(group.rewards) == 4
    assert len(seeds) == 6, "only what was spoilt"
    assert len(set(seeds)) == 4, "the same samples"
    with pytest.raises(EnvFault, match="the judge is away") as caught:
        played(12)
    fault = pickle.loads(pickle.dumps(caught.value))
    assert len(fault.failures) == 12


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"token_ids": [1, 2, 3, 4, 5]}, "token_ids of a trajectory is .* array of integers, got <class 'list'>"),
        ({"mask": np.array([0, 0, 1, 1, 1])}, "mask of .* booleans, got one of int64 and shape"),
        ({"logprobs": np.zeros((5, 1), np.float32)}, r"logprobs of .* floats, got one of float32 and shape \(5, 1\)"),
        ({"versions": np.zeros(4, np.int32)}, "columns of a trajectory differ in length"),
        ({"mask": np.zeros(5, np.bool_)}, "holds at least one sampled token"),
    ],
)
def test_a_trajectory_whose_columns_are_not_what_they_should_be_is_a_fault(column, message):
    """A mask of integers would pick tokens 0 and 1 over and over."""

    async def makes():
        return replace(GOOD, **column)

    with pytest.raises(EnvFault, match=message) as caught:
        play(makes)
    assert caught.value.kind == "env exception"


def test_an_attempt_that_is_cancelled_from_outside_is_no_fault():
    async def body():
        patience = Patience(5.0)
        playing = attempt(Env(never), PROMPT, lambda tokens: Engine().generate(tokens, None, 0), patience)
        task = asyncio.ensure_future(playing)
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        return task.cancelled()

    assert run(body())


def test_generation_does_not_count_against_the_time_limit():
    group = play(good, Engine(delay_s=0.5), timeout_s=0.2)
    assert group.rewards == (0.5,)
    assert type(group.rewards[0]) is float


def test_the_engines_errors_are_not_blamed_on_the_environment():
    with pytest.raises(KeyError):
        play(good, Engine(error=KeyError("engine")))


def test_the_time_that_the_environment_holds_the_thread_is_counted_and_its_waits_are_not(monkeypatch):
    now = [0.0]

    def pass_time(seconds):
        now[0] += seconds

    async def holds():
        pass_time(3)
        asyncio.get_running_loop().call_soon(pass_time, 100)  # while it waits
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        pass_time(1)
        await asyncio.sleep(0)
        pass_time(0.005)  # too short to be more than its work
        return GOOD

    monkeypatch.setattr(faults, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    patience = Patience(5.0)

    async def body():
        return await attempt(Env(holds), PROMPT, lambda tokens: Engine().generate(tokens, None, 0), patience)

    assert run(body()).reward == GOOD.reward
    assert patience.held.seconds == 4


def test_the_clock_stands_still_while_a_program_waits_for_its_place():
    async def waits():
        with waiting.get()():
            await asyncio.sleep(0.3)
        return await good()

    assert play(waits, timeout_s=0.2).trajectories[0].reward == 0.5
