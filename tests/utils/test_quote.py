"""Messages are short, however large what they speak of is."""

import asyncio
import json

import pytest
from helpers import TextTokenizer, attempt

from asyncrl.envs.base import Prompt, checked_prompts, load_env
from asyncrl.envs.chat import check_messages
from asyncrl.envs.data import read_rows
from asyncrl.envs.dataset import DatasetEnv
from asyncrl.envs.multi_turn import field
from asyncrl.envs.rewards import Rewards
from asyncrl.utils.quote import cut, quote
from asyncrl.utils.settings_text import check_value

LARGE = "lorem " * 800_000  # 5 MB


class Silent:
    def __repr__(self):
        raise RuntimeError("no repr")


def test_a_quoted_value_is_short_and_says_how_long_it_was():
    assert quote("short") == "'short'"
    assert quote("x" * 100, 10) == "'xxxxxxxxxx'... [100 characters]"
    assert quote([1] * 100, 10) == "[1, 1, 1, ... [300 characters]"
    assert quote(10**5000) == "<int, whose repr raised ValueError>"
    assert quote(Silent()) == "<Silent, whose repr raised RuntimeError>"
    assert cut("x" * 5, 4) == "xxxx... [5 characters]"


def raises(prompts, **_columns):
    raise KeyError(prompts[0])


def env_of(tmp_path, row, **args):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    settings = {"source": str(path), "prompt": "prompt", "reward": "test_quote:raises"} | args
    return load_env("asyncrl.envs.dataset:DatasetEnv", TextTokenizer(), settings)


class Wrong:
    max_prompt_tokens = 4

    def prompts(self, *_args):
        yield Prompt(0, (1,), {"row": LARGE})


def draw(env):
    next(checked_prompts(env, "train", 0))


def bad_json(tmp_path):
    (tmp_path / "bad.jsonl").write_text(LARGE)
    read_rows(str(tmp_path / "bad.jsonl"), "train")


def call(returned):
    rewards = Rewards(lambda **_columns: returned, None, 5.0)
    asyncio.run(rewards.score("?", ["a"], [[1]], {}))


def score(tmp_path):
    env = env_of(tmp_path, {"prompt": LARGE, "split": "train"}, max_prompt_tokens=10**8)
    attempt(env, next(env.prompts("train", 0)), "x")


@pytest.mark.parametrize(
    "fault",
    [
        lambda path: draw(env_of(path, {"prompt": LARGE, "split": "train"})),
        lambda path: draw(env_of(path, {"prompt": [LARGE], "split": "train"})),
        lambda path: draw(env_of(path, {"prompt": {"role": LARGE}, "split": "train"})),
        lambda path: draw(env_of(path, {"prompt": "?", LARGE: 1, "split": "train"}, target="none")),
        score,
        bad_json,
        lambda _path: draw(Wrong()),
        lambda _path: check_messages([{"role": LARGE}], "a test"),
        lambda _path: field({"text": LARGE, "answer": None}, "answer"),
        lambda _path: field({LARGE: 1}, "answer"),
        lambda _path: call([LARGE]),
        lambda _path: call(LARGE),
        lambda _path: check_value([LARGE], int, "env.args.timeout_s"),
        lambda _path: DatasetEnv(TextTokenizer(), "data.jsonl", [LARGE]),
    ],
)
def test_no_error_carries_its_whole_object(tmp_path, fault):
    with pytest.raises(ValueError, match=r"\w") as caught:
        fault(tmp_path)
    assert len(str(caught.value)) < 3000
