"""Tasks of reasoning-gym: every task plays, right answers score, prompts repeat and splits are disjoint."""

import itertools

import pytest
from helpers import TextTokenizer, attempt

from asyncrl.envs.base import load_env

gym = pytest.importorskip("reasoning_gym")


def make(task, **args):
    return load_env("asyncrl.envs.reasoning_gym:ReasoningGym", TextTokenizer(), {"task": task, **args})


def right(env, prompt):
    return env._tasks[int(prompt.target)]["answer"]


@pytest.mark.parametrize("task", ["gcd", "chain_sum", "basic_arithmetic", "spell_backward", "number_sorting"])
def test_the_right_answer_scores_and_others_do_not(task):
    env = make(task, max_prompt_tokens=2000)
    for prompt in itertools.islice(env.prompts("train", 0), 10):
        assert attempt(env, prompt, f"so <answer>{right(env, prompt)}</answer>").reward == 1.0
        assert attempt(env, prompt, f"<answer>{right(env, prompt)}</answer>", finish="length").reward == 0.0
        assert attempt(env, prompt, right(env, prompt)).reward == 0.0, "no tag"
        assert attempt(env, prompt, "<answer>no idea</answer>").reward < 0.5


def test_prompts_repeat_and_splits_share_nothing():
    def draw(split, seed):
        return list(itertools.islice(make("chain_sum").prompts(split, seed), 200))

    train = draw("train", 0)
    assert train == draw("train", 0)
    assert train != draw("train", 1)
    assert [prompt.id for prompt in train] == list(range(200))
    assert not {p.token_ids for p in train} & {p.token_ids for p in draw("heldout", 0)}


def test_the_last_number_may_count():
    env = make("gcd", answer="last_number", style="plain")
    prompt = next(env.prompts("train", 0))
    assert attempt(env, prompt, f"12 and 18, so {right(env, prompt)}.").reward == 1.0
    assert attempt(env, prompt, "none").metrics["answered"] == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The sum is 1,234.", "1234"),
        ("2,000,000", "2000000"),
        ("= \N{MINUS SIGN}57", "-57"),
        ("10-3", "3"),
        ("a half, 1/2", "1/2"),
    ],
)
def test_the_last_number_is_read_as_it_is_meant(text, answer):
    assert make("gcd", answer="last_number")._extract(text) == answer


def test_a_scorer_that_raises_gives_nothing_and_is_counted():
    env = make("gcd")

    def raising(_answer, _entry):
        raise ArithmeticError("cannot parse")

    env._tasks.score_answer = raising
    played = attempt(env, next(env.prompts("train", 0)), "<answer>x</answer>")
    assert (played.reward, played.metrics["scorer_raised"]) == (0.0, 1.0)


def test_constant_answers_are_the_no_skill_scores():
    env = make("gcd")
    prompts = list(itertools.islice(env.prompts("heldout", 0), 100))
    answers = [right(env, prompt) for prompt in prompts]
    scores = env.baselines(prompts)
    most = max(answers.count(answer) for answer in answers) / 100
    assert max(scores.values()) >= most > 0.2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"task": "gdc"}, "env.args.task 'gdc' is no task of reasoning-gym: it has .*gcd"),
        ({"task": "gcd", "config": {"colour": 1}}, r"env.args.config \{'colour': 1\} does not fit the task 'gcd'"),
        ({"task": "gcd", "max_prompt_tokens": 5}, "1000 prompts of 'gcd' in a row are longer"),
    ],
)
def test_a_mistake_in_the_settings_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        next(make(**args).prompts("train", 0))
