"""SkyRL-Gym's own environments, played as they come, and what its classes may do that its own do not."""

import json
import signal
import sqlite3

import pytest
from helpers import TextTokenizer, run
from test_multi_turn import Script

from asyncrl.envs.base import load_env

skyrl_gym = pytest.importorskip("skyrl_gym")


def make(folder, row, **args):
    row = {"prompt": [{"role": "user", "content": "?"}], "split": "train", **row}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    given = {"data": str(folder / "rows.jsonl"), "max_context_tokens": 20_000, **args}
    return load_env("asyncrl.envs.gym:GymEnv", TextTokenizer(), given)


def play(env, *replies, cut=False):
    policy = Script(TextTokenizer(), *replies, cut=cut)
    return run(env.play(next(env.prompts("train", 0)), policy)), policy


@pytest.mark.parametrize(("reply", "reward"), [("so #### 18", 1.0), ("so 18", 0.0)])
@pytest.mark.parametrize("cut", [False, True])
def test_an_id_of_the_registry_is_played_and_a_cut_reply_is_scored(tmp_path, reply, reward, cut):
    env = make(tmp_path, {"reward_spec": {"ground_truth": "18"}}, env="gsm8k")
    attempt, _ = play(env, reply, cut=cut)
    assert attempt.reward == reward
    assert attempt.finish == ("length" if cut else "stop")


def test_its_metrics_are_metrics(tmp_path):
    env = make(tmp_path, {"reward_spec": {"ground_truth": "18"}}, env="gsm8k_multi_turn", max_turns=3)
    attempt, policy = play(env, "#### 17", "#### 18")
    assert attempt.metrics == {"turns": 2.0, "out_of_turns": 0.0, "steps": 2.0}
    assert attempt.reward == pytest.approx(1 + 0.2 / 3)
    assert "tentative numeric answer" in TextTokenizer().decode(policy.contexts[1])


def test_text2sql_reads_its_configuration_by_attributes_and_rambling_scores_as_a_wrong_format(tmp_path):
    folder = tmp_path / "sql" / "spider" / "database" / "d"
    folder.mkdir(parents=True)
    with sqlite3.connect(folder / "d.sqlite") as database:
        database.execute("create table t (a)")
        database.execute("insert into t values (7)")
    row = {"db_id": "d", "data": "spider", "reward_spec": {"ground_truth": "select a from t"}}
    env = make(tmp_path, row, env="text2sql", env_config={"db_path": str(tmp_path / "sql")}, max_turns=2)
    look, right = "<think>x</think><sql>select * from t</sql>", "<think>y</think><solution>select a from t</solution>"
    attempt, policy = play(env, look, right)
    assert "7" in TextTokenizer().decode(policy.contexts[1])
    assert attempt.reward == 1.0
    assert play(env, "no", "no")[0].reward == play(env, "no", "no", cut=True)[0].reward == -1.0


def test_search_names_what_its_configuration_lacks(tmp_path):
    row = {"reward_spec": {"ground_truth": {"target": ["x"]}}}
    config = {"search_url": "http://127.0.0.1:9", "topk": 3, "timeout": 1, "log_requests": False}
    attempt, _ = play(make(tmp_path, row, env="search", env_config=config), "<answer>x</answer>")
    assert attempt.reward == 1.0
    with pytest.raises(ValueError, match="env_config has no 'search_url'"):
        make(tmp_path, row, env="search")
    with pytest.raises(ValueError, match=r"'serch' is no .*Class.*which has aime, gsm8k.*text2sql"):
        make(tmp_path, row, env="serch")


class Cutting:
    """Takes a reply for what stands before the bar, or for something else."""

    def __init__(self, **_given):
        self.turns = 0

    def init(self, prompt):
        return prompt, {}

    def step(self, action):
        signal.signal(signal.SIGUSR2, signal.SIG_DFL) if action == "signal" else None
        said = "other" if action == "rewrite" else action.partition("|")[0]
        self.turns += 1
        answer = [{"role": "user", "content": "go on"}]
        done = self.turns == 2
        return {"observations": answer, "reward": 0, "done": done, "metadata": {}, "postprocessed_action": said}


def test_a_postprocessed_reply_is_cut_where_it_ends(tmp_path):
    env = make(tmp_path, {}, env="test_gym:Cutting")
    attempt, policy = play(env, "ab|cd", "x")
    text = TextTokenizer().decode(policy.contexts[1])
    assert text.endswith("<assistant>ab<user>go on<assistant>")
    trained = attempt.token_ids[attempt.mask]
    assert TextTokenizer().decode(trained) == "abx\0"
    with pytest.raises(ValueError, match="taken for 'other', which is no beginning of it"):
        play(env, "rewrite")
    with pytest.raises(ValueError, match="for nothing at all"):
        play(env, "|rest")


def test_a_class_that_sets_signal_handlers_is_told_of(tmp_path):
    env = make(tmp_path, {}, env="test_gym:Cutting")
    with pytest.warns(UserWarning, match="sets a signal handler"), pytest.raises(ValueError, match="main thread"):
        play(env, "signal")
