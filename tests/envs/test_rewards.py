"""Where reward functions run, and what they are called with: TRL's contract, and functions that set signal handlers."""

import json
import math
import os
from functools import partial

import numpy as np
import pytest
from helpers import TextTokenizer, run
from reward_functions import CALLS, Alarmed, alarmed, math_graded, strict

from asyncrl.envs.dataset import DatasetEnv
from asyncrl.envs.mixture import Mixture
from asyncrl.envs.rewards import Rewards
from asyncrl.recovery import group_files as groups
from asyncrl.runtime.rollout_worker import Rollout
from asyncrl.types import UNSCORED, Completion, Sampling


def score(given, *completions, prompt="p", timeout_s=30.0, columns=None, weights=None):
    rewards = given if isinstance(given, Rewards) else Rewards(given, weights, timeout_s)
    ids = [[1] * len(text) for text in completions]
    return run(rewards.score(prompt, completions, ids, columns or {}, 7))


@pytest.mark.parametrize("given", ["reward_functions:alarmed", alarmed, "reward_functions:alarmed_object"])
def test_a_function_with_a_limit_by_alarm_scores_right_though_others_run_in_threads(given):
    scores = score(given, "right", "wrong", "loop")
    assert [reward for reward, _ in scores] == [1.0, 0.0, -1.0]


def test_a_moved_function_runs_in_the_main_thread_of_a_process_that_is_used_again():
    rewards = Rewards("reward_functions:where", None, 30.0)
    first, second = (score(rewards, "x")[0] for _ in range(2))
    assert first == second
    assert first[0] == 1.0
    assert first[1]["pid"] != os.getpid()


def test_other_functions_stay_where_they_are():
    CALLS.clear()
    score("reward_functions:plain", "ab")
    assert set(CALLS) == {os.getpid()}


def test_what_a_moved_function_does_wrong_is_told_and_costs_one_process_at_most():
    rewards = Rewards(strict, None, 2.0)
    assert score(rewards, "x") == [(1.0, {})]
    with pytest.raises(ValueError, match=r"'strict' raised KeyError\('x'\), \S*reward_functions.py line \d+"):
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


def test_an_object_with_an_async_call_is_awaited():
    assert score("reward_functions:judge", "x", "y") == [(0.25, {}), (0.25, {})]


def test_math_verify_inside_try_and_except_scores_right():
    """In a thread each of its calls fails, as its time limit is an alarm."""

    def graded(completions, target):
        return math_graded(completions, target)

    replies = r"so $\frac{1}{2}$", "it is $3$"
    with pytest.raises(ValueError, match="math_verify: parsing_timeout=None"):
        score(graded, *replies, columns={"target": "$0.5$"})  # a closure: refused, not scored 0
    assert [one for one, _ in score("reward_functions:math_graded", *replies, columns={"target": "$0.5$"})] == [
        1.0,
        0.0,
    ]


def test_functions_of_trl_are_played_unchanged():
    """`completion_ids` have a token a character here."""
    conversation = [{"role": "user", "content": "1/3?"}]
    right, wrong = r"<think>\nsum\n</think>\nI say $\boxed{\frac{1}{3}}$", r"It is $\boxed{7}$"
    from trl import rewards as theirs

    functions = [
        "trl.rewards:accuracy_reward",
        "trl.rewards:think_format_reward",
        theirs.get_soft_overlong_punishment(max_completion_len=40, soft_punish_cache=20),
        theirs.get_cosine_scaled_reward(max_len=100),
    ]
    names = ["accuracy_reward", "think_format_reward", "soft_overlong_punishment_reward", "cosine_scaled_reward"]
    scores = score(functions, right, wrong, prompt=conversation, columns={"solution": r"$\frac{1}{3}$"})
    direct = [
        function(
            completions=[[{"role": "assistant", "content": one}]],
            completion_ids=[[1] * len(one)],
            solution=[r"$\frac{1}{3}$"],
        )[0]
        for one in (right, wrong)
        for function in (theirs.accuracy_reward, theirs.think_format_reward, *functions[2:])
    ]
    assert [each[name] for _, each in scores for name in names] == pytest.approx(direct)
    assert [reward for reward, _ in scores] == pytest.approx([sum(direct[:4]), sum(direct[4:])])


def test_a_solution_that_trl_cannot_read_leaves_the_attempt_out():
    conversation = [{"role": "user", "content": "?"}]
    given = "trl.rewards:accuracy_reward"
    ((reward, _),) = score(given, r"\boxed{1}", prompt=conversation, columns={"solution": "no number"})
    assert reward is UNSCORED
    both = [given, lambda **_: [0.5]]
    ((reward, _),) = score(both, r"\boxed{1}", prompt=conversation, columns={"solution": "no number"})
    assert reward == 0.5, "one function is enough"


def test_what_a_function_logs_is_a_metric_and_the_step_is_told():
    def logged(completions, trainer_state, log_metric, log_extra, **_columns):
        log_metric("progress", trainer_state.global_step)
        log_metric("progress", 9)
        log_extra("text", list(completions))
        return [1.0] * len(completions)

    assert score(logged, "x", "y") == [(1.0, {"progress": 8.0})] * 2
    with pytest.raises(ValueError, match="takes 'environments', those of TRL"):
        score(lambda completions, environments: [len(environments + completions)], "x")


def longest(completions):
    most = max(map(len, completions))
    return [float(len(one) == most and most > 1) for one in completions]


def test_a_group_is_scored_in_one_call_where_that_was_asked_for(tmp_path):
    calls = []

    def compared(completions, **_columns):
        calls.append(list(completions))
        if len(calls) == 1:
            raise ConnectionError("busy")
        return longest(completions)

    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(60)))
    args = {"source": str(tmp_path / "d.jsonl"), "reward": compared, "score_by": "group"}
    env = Mixture(TextTokenizer(), {"one": {"path": "asyncrl.envs.dataset:DatasetEnv", "args": args}})
    engine = Said(["a", "bbb", "cc"])
    rollout = Rollout(engine, env, Sampling(max_new_tokens=4), group_size=3, seed=0, max_attempts=2)
    group = run(rollout.run(next(env.prompts("train", 0))))
    assert group.rewards == (0.0, 1.0, 0.0)
    assert [played.reward for played in group.trajectories] == [0.0, 1.0, 0.0]
    assert calls == [["a", "bbb", "cc"]] * 2, "scored again, and not played again"
    assert [failure.kind for failure in group.failures] == ["env exception"]
    assert len(engine.asked) == 3


class Said:
    """An engine that replies with these texts, one after the other."""

    num_ranks = 1

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    async def generate(self, token_ids, _sampling, _seed):
        ids = np.array([*map(ord, self.texts[len(self.asked)]), 0], np.int32)
        self.asked.append(token_ids)
        return Completion(ids, np.full(len(ids), -1, np.float32), np.zeros(len(ids), np.int32), "stop")


def test_an_attempt_that_every_function_left_out_has_no_reward_and_is_no_fault(tmp_path):
    def some(completions, **_columns):
        return [None if text == "b" else float(text == "a") for text in completions]

    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(60)))
    env = DatasetEnv(TextTokenizer(), str(tmp_path / "d.jsonl"), some)
    rollout = Rollout(Said(["a", "b", "c"]), env, Sampling(max_new_tokens=4), group_size=3, seed=0)
    group = run(rollout.run(next(env.prompts("train", 0))))
    assert group.scored == (1.0, 0.0)
    assert math.isnan(group.rewards[1])
    assert group.has_variance
    assert not group.failures
    groups.write(tmp_path, group)
    assert groups.read_any(tmp_path, 0).scored == (1.0, 0.0)
    with pytest.warns(UserWarning, match="is 0, as every reward function said None"):
        assert DatasetEnv(TextTokenizer(), str(tmp_path / "d.jsonl"), lambda **_: [None]).baselines(
            list(env.prompts("heldout", 0))
        ) == {"empty reply": 0.0}
