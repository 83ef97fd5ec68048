"""Where reward functions run, and what they are called with: TRL's contract, and functions that set signal handlers."""

import asyncio
import math
import os
import signal
import threading
from functools import partial

import pytest
from helpers import run

from asyncrl.envs.rewards import Rewards

CALLS: list[int] = []


def alarmed(completions, **_columns):
    """As graders do it that have a time limit: by an alarm, inside try and except."""
    scores = []
    for text in completions:
        try:
            before = signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
            signal.alarm(1 if text == "loop" else 60)
            try:
                while text == "loop":
                    pass
                scores.append(float(text == "right"))
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)
        except Exception:
            scores.append(-1.0)
    return scores


def where(log_metric, **_columns):
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    log_metric("pid", os.getpid())
    return [float(threading.current_thread() is threading.main_thread())]


def strict(completions):
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    if completions == ["raise"]:
        raise KeyError("x")
    if completions == ["die"]:
        os._exit(3)
    if completions == ["hang"]:
        while True:
            pass
    return [1.0]


def plain(completions, **_columns):
    CALLS.append(os.getpid())
    return [float(len(text)) for text in completions]


class Judge:
    """An object, such as a judge's client."""

    def __init__(self, reward):
        self.reward = reward

    async def __call__(self, completions, **_columns):
        await asyncio.sleep(0)
        return [self.reward] * len(completions)


class Alarmed:
    def __call__(self, completions, **_columns):
        return alarmed(completions)


judge, alarmed_object = Judge(0.25), Alarmed()


def score(given, *completions, prompt="p", timeout_s=30.0, columns=None, weights=None):
    rewards = given if isinstance(given, Rewards) else Rewards(given, weights, timeout_s)
    ids = [[1] * len(text) for text in completions]
    return run(rewards.score(prompt, completions, ids, columns or {}, 7))


@pytest.mark.parametrize("given", ["test_rewards:alarmed", alarmed, "test_rewards:alarmed_object"])
def test_a_function_with_a_limit_by_alarm_scores_right_though_others_run_in_threads(given):
    scores = score(given, "right", "wrong", "loop")
    assert [reward for reward, _ in scores] == [1.0, 0.0, -1.0]


def test_a_moved_function_runs_in_the_main_thread_of_a_process_that_is_used_again():
    rewards = Rewards("test_rewards:where", None, 30.0)
    first, second = (score(rewards, "x")[0] for _ in range(2))
    assert first == second
    assert first[0] == 1.0
    assert first[1]["pid"] != os.getpid()


def test_other_functions_stay_where_they_are():
    CALLS.clear()
    score("test_rewards:plain", "ab")
    assert set(CALLS) == {os.getpid()}


def test_what_a_moved_function_does_wrong_is_told_and_costs_one_process_at_most():
    rewards = Rewards(strict, None, 2.0)
    assert score(rewards, "x") == [(1.0, {})]
    with pytest.raises(ValueError, match=r"'strict' raised KeyError\('x'\), \S*test_rewards.py line \d+"):
        score(rewards, "raise")
    with pytest.raises(ValueError, match="'strict' ended its process, with code 3"):
        score(rewards, "die")
    with pytest.raises(TimeoutError, match=r"'strict' took longer than 2 s"):
        score(rewards, "hang")
    assert score(rewards, "x") == [(1.0, {})]


def test_a_function_that_no_process_can_import_is_refused_with_the_remedy():
    def local(completions):
        return alarmed(completions)

    for given in (local, partial(alarmed, extra=1), Alarmed()):
        with pytest.raises(ValueError, match=r"sets a signal handler.*import path .*parsing_timeout=None"):
            score(given, "right")
    assert score(lambda **_: [1.0], "right")[0][0] == 1.0
    assert not math.isnan(score(judge, "x")[0][0])
