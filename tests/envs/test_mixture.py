"""Mixtures: shares by weight, scoring by the right environment, metrics by name, mistakes named."""

import itertools
import json
from collections import Counter

import pytest
from helpers import TextTokenizer, attempt, run

from asyncrl.config import loading as configuration
from asyncrl.driver import run as job
from asyncrl.envs.base import load_env
from asyncrl.monitor import metrics

PATH = "asyncrl.envs.mixture:Mixture"
DIGITS = {
    "largest": {"path": "asyncrl.envs.digits:LargestDigit", "weight": 3.0},
    "sort": {"path": "asyncrl.envs.digits:SortDigits"},
}


def make(envs):
    return load_env(PATH, TextTokenizer(), {"envs": envs})


def test_prompts_come_by_weight_and_are_scored_where_they_come_from():
    env = make(DIGITS)
    prompts = list(itertools.islice(env.prompts("train", 0), 2000))
    assert [prompt.id for prompt in prompts] == list(range(2000))
    assert prompts == list(itertools.islice(make(DIGITS).prompts("train", 0), 2000))
    shares = Counter(prompt.source for prompt in prompts)
    assert 0.71 < shares["largest"] / 2000 < 0.79
    assert (env.max_prompt_tokens, env.pass_reward) == (8, 1.0)
    for prompt in prompts[:20]:
        question = TextTokenizer().decode(prompt.token_ids)
        assert question[0] == {"largest": "m", "sort": "s"}[prompt.source]
        assert attempt(env, prompt, prompt.target).reward == 1.0
    both = env.baselines(prompts)
    (score,) = both.values()
    alone = {name: load_env(given["path"], TextTokenizer(), {}) for name, given in DIGITS.items()}
    parts = {name: [prompt for prompt in prompts if prompt.source == name] for name in alone}
    expected = sum(max(alone[name].baselines(part).values()) * len(part) for name, part in parts.items()) / 2000
    assert score == pytest.approx(expected)


def test_held_out_prompts_end_with_the_last_environment(tmp_path):
    for name, count in (("few", 30), ("many", 90)):
        rows = [{"prompt": f"{name} {n}", "answer": "x"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"reward": "asyncrl.envs.rewards:exact_match", "target": "answer", "bad_rows": "skip"}
    envs = {
        name: {
            "path": "asyncrl.envs.dataset:DatasetEnv",
            "args": {"source": str(tmp_path / f"{name}.jsonl"), **common, "style": "raw", "max_prompt_tokens": 6},
        }
        for name in ("few", "many")
    }
    env = make(envs)
    with pytest.raises(ValueError, match="no rows for"):
        list(env.prompts("heldout", 0))
    for given in envs.values():
        given["args"]["max_prompt_tokens"] = 7
    env = make(envs)
    heldout = list(env.prompts("heldout", 0))
    assert len({prompt.token_ids for prompt in heldout}) == len(heldout) < 40
    assert {prompt.source for prompt in heldout} == {"few", "many"}
    assert env.skipped == {}


def test_a_run_reports_every_environment(tmp_path):
    words = ["runtime=local", "num_steps=2", f"env.path={PATH}", "learner.groups_per_step=8", "eval.every=1"]
    words += ["rollout.max_new_tokens=2"]
    config = configuration.load(None, [*words, f"run_dir={tmp_path}"])
    tree = configuration.to_tree(config)
    tree["env"]["args"] = {"envs": DIGITS}
    result = run(job.train(configuration.from_tree(tree), quiet=True))
    rows = metrics.read(result.folder)
    names = {name for row in rows for name in row}
    assert {"reward/largest", "reward/sort", "eval/largest", "eval/sort"} <= names


@pytest.mark.parametrize(
    ("envs", "message"),
    [
        ({}, "is empty"),
        ({"a": {"path": "asyncrl.envs.digits:LargestDigit", "weigth": 2}}, "takes path, args and weight, got weigth"),
        ({"a": {"path": "asyncrl.envs.digits:LargestDigit", "weight": 0}}, "weight must be above 0, got 0"),
        ({"a": {"path": PATH}}, "and no mixture"),
        ({"a": {"args": {}}}, "path must name an environment"),
        ({"a": {"path": "asyncrl.envs.nothing:X"}}, r"env\.args\.envs\.a\.path .* no module 'asyncrl.envs.nothing'"),
        ({"a": 3}, "env.args.envs must be a table, got"),
        ({"a": {"path": 3}}, "env.args.envs.a.path must be a text, got 3"),
        ({"a": {"path": "asyncrl.envs.digits:LargestDigit", "weight": "x"}}, "a.weight must be a number, got 'x'"),
        ({"a": {"path": "asyncrl.envs.digits:LargestDigit", "args": 5}}, "a.args must be a table, got 5"),
        (
            {"a": {"path": "asyncrl.envs.sql:TextToSQL", "args": {"max_turns": "x"}}},
            "env.args.envs.a.args.max_turns must be a whole number, got 'x'",
        ),
    ],
)
def test_a_mistake_is_named(envs, message):
    with pytest.raises(ValueError, match=message):
        make(envs)
