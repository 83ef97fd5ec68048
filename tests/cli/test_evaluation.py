"""Evaluation: pass@k against its definition, intervals against their coverage, and what the loop reports."""

import asyncio
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TextTokenizer, run, trajectory

from asyncrl.cli import evaluate
from asyncrl.config import loading as configuration
from asyncrl.driver import run as job
from asyncrl.driver import system
from asyncrl.driver.batch_metrics import Generated, of_batch
from asyncrl.driver.watchdog import Watchdog
from asyncrl.envs.base import pass_mark
from asyncrl.envs.dataset import DatasetEnv
from asyncrl.envs.digits import LargestDigit, split_of
from asyncrl.models.tiny import build_tiny
from asyncrl.monitor import metrics
from asyncrl.monitor.scores import interval, ks, pass_at_k, summarize
from asyncrl.recovery import checkpoint
from asyncrl.runtime.handles import ActorDied
from asyncrl.runtime.rollout_worker import Attempts, Rollout, make_group
from asyncrl.types import Completion, Prompt, Sampling, reaches, same_reward


@pytest.mark.parametrize("num_samples", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(num_samples):
    for passed in range(num_samples + 1):
        samples = [1] * passed + [0] * (num_samples - passed)
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(samples, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(num_samples, passed, k) == pytest.approx(share)


def test_pass_at_more_than_n_is_refused():
    with pytest.raises(ValueError, match=r"pass@5 needs at least 5 samples a prompt, got 4"):
        pass_at_k(4, 1, 5)


def test_the_ks_reported():
    assert [ks(n) for n in (1, 2, 4, 6, 16)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 16]]


def test_a_metric_is_the_mean_of_the_attempts_that_have_it():
    played = [trajectory(2, 3, seed=seed) for seed in range(4)]
    played[:2] = [replace(one, metrics={"judged": 1.0}) for one in played[:2]]
    assert make_group(Prompt(0, (1, 2), ""), played).metrics == {"judged": 1.0, "truncated": 0.0}


def test_attempts_without_a_reward_are_in_no_mean():
    def group(number, rewards):
        played = [trajectory(2, 3, seed=number, reward=reward) for reward in rewards]
        return make_group(Prompt(number, (1, 2), ""), played)

    nan = math.nan
    row = summarize([group(0, [1.0, nan]), group(1, [0.0, 0.0]), group(2, [nan, nan])], 0, 1.0)
    assert (row["eval/accuracy"], row["eval/unscored"], row["eval/pass@1"]) == (0.5, 1.0, 0.5)
    assert math.isnan(summarize([group(0, [nan])], 0, 1.0)["eval/accuracy"])
    batch = of_batch([group(0, [1.0, nan]), group(1, [0.0, 0.0]), group(2, [nan, nan])])
    assert (batch["reward/mean"], batch["reward/unscored"]) == (pytest.approx(1 / 3), 0.5)
    assert batch["reward/zero_variance"] == 1.0, "one reward alone is compared with nothing"
    generated = Generated()
    generated.add(group(0, [nan, nan]))
    assert generated.equal_in_a_row == 1
    assert math.isnan(generated.take()["reward/generated"])


def test_one_attempt_a_prompt_gives_wilsons_interval():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert interval([1.0] * 81 + [0.0] * 182) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert interval([0.0] * 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert interval([1.0] * 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    low, high = interval([1 / 3] * 200)
    assert high - low > 0.1, "equal values whose mean is rounded"


@pytest.mark.parametrize(("num_samples", "scale"), [(1, 1.0), (4, 1.0), (4, 5.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(num_samples, scale):
    """Prompts differ in difficulty, so attempts of one prompt agree more than attempts of two."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        difficulty = rng.beta(0.5, 1.5, 150)
        rewards = scale * rng.binomial(num_samples, difficulty) / num_samples
        low, high = interval(rewards.tolist())
        held += low <= scale * 0.25 <= high
    assert 0.92 < held / 400 < 0.98


def test_a_summary_of_groups():
    def group(number, rewards, source, version=3):
        played = [trajectory(2, 3, seed=n, reward=reward, version=version) for n, reward in enumerate(rewards)]
        return make_group(Prompt(number, (1, 2), "", source), played)

    groups = [group(0, [1, 0, 0, 0], "a"), group(1, [1, 1, 1, 1], "b"), group(2, [0.5, 0, 0, 0.5], "a", version=4)]
    row = summarize(groups, 3, pass_reward=1.0)
    assert row["eval/accuracy"] == pytest.approx((0.25 + 1 + 0.25) / 3)
    assert row["eval/pass@1"] == pytest.approx((0.25 + 1) / 3)
    assert row["eval/pass@4"] == pytest.approx(2 / 3)
    assert (row["eval/a"], row["eval/b"]) == (0.25, 1.0)
    assert row["eval/mixed_versions"] == pytest.approx(1 / 3)
    assert row["eval/mean_length"] == 3
    assert row["eval/low"] < row["eval/accuracy"] < row["eval/high"]


def test_without_a_pass_mark_there_are_no_pass_rates():
    """0 beside a mean of 0.98 would say that nothing is solved."""
    group = make_group(Prompt(0, (1, 2), ""), [trajectory(2, 3, seed=0, reward=0.98)])
    row = summarize([group], 3, pass_reward=None)
    assert row["eval/accuracy"] == pytest.approx(0.98)
    assert not [name for name in row if "pass@" in name]


@pytest.mark.parametrize(
    ("own", "asked", "mark"), [({}, None, None), ({"pass_reward": 2}, None, 2.0), ({"pass_reward": 2}, 0.5, 0.5)]
)
def test_the_pass_mark_is_the_environments_unless_it_is_set(own, asked, mark):
    assert pass_mark(SimpleNamespace(**own), asked) == mark


@pytest.mark.parametrize("own", ["1", float("nan"), [1.0]])
def test_a_pass_mark_is_a_finite_number(own):
    with pytest.raises(ValueError, match=r"SimpleNamespace\.pass_reward is .* a finite number, or None"):
        pass_mark(SimpleNamespace(pass_reward=own), None)


def test_parts_of_a_score_that_add_up_to_the_pass_mark_pass():
    """0.7 + 0.2 + 0.1 is 0.9999999999999999, and such a group, or one of it and 1.0, has no variance."""
    played = [trajectory(2, 3, seed=n, reward=reward) for n, reward in enumerate((0.7 + 0.2 + 0.1, 1.0))]
    group = make_group(Prompt(0, (1, 2), ""), played)
    row = summarize([group], 3, pass_reward=1.0)
    assert row["eval/pass@1"] == row["eval/accuracy"] == 1.0
    assert not group.has_variance
    assert [same_reward(1.0, other) for other in (0.9999, 1.0001)] == [False, False]
    assert not reaches(0.99999, 1.0)


class Engine:
    """Counts requests in flight; every completion is one token that tells its seed."""

    num_ranks, busy_s = 1, 0.0

    def __init__(self):
        self.running = self.most = 0
        self.calls = []

    async def generate(self, token_ids, sampling, seed):
        import asyncio

        self.calls.append((tuple(token_ids), sampling, seed))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        one = np.ones(1, np.int32)
        return Completion(one, -one.astype(np.float32), one, "stop", {1: "x"})


class First:
    """Pays for the prompt's first token."""

    max_prompt_tokens = 2

    async def play(self, prompt, generate):
        from asyncrl.envs.base import single_turn

        return single_turn(prompt, await generate(prompt.token_ids), float(prompt.token_ids[0]))


def test_evaluation_draws_n_samples_with_its_own_settings_and_leaves_room():
    engine = Engine()
    settings = Attempts(Sampling(7, temperature=0.5, top_p=0.9), num_samples=3, max_running=4)
    rollout = Rollout(engine, First(), Sampling(5), group_size=2, seed=0, evaluation=settings)
    prompts = [Prompt(number, (number, 2), "") for number in range(6)]
    groups = run(rollout.evaluate(prompts))
    assert [group.prompt for group in groups] == prompts
    assert [group.rewards for group in groups] == [(float(n),) * 3 for n in range(6)]
    assert all(group.trajectories is None for group in groups)
    assert {call[1] for call in engine.calls} == {settings.sampling}
    assert len({call[2] for call in engine.calls}) == 18, "samples of one seed would be equal"
    assert engine.most == 4


def test_a_run_reports_pass_at_k(tmp_path):
    words = ["runtime=local", "num_steps=2", "env.path=helpers:Sevens", "learner.groups_per_step=2", "eval.every=1"]
    sampled = ["eval.num_samples=4", "eval.temperature=1", "eval.num_prompts=6", "eval.pass_reward=0.5"]
    config = configuration.load(None, [*words, *sampled, "rollout.max_new_tokens=3", f"run_dir={tmp_path}"])
    result = run(job.train(config, quiet=True))
    rows = [row for row in metrics.read(result.folder) if "eval/accuracy" in row]
    assert {row["version"] for row in rows} == {0, 1, 2}
    for row in rows:
        assert 0 <= row["eval/pass@1"] <= row["eval/pass@2"] <= row["eval/pass@4"] <= 1
        assert row["eval/low"] <= row["eval/accuracy"] <= row["eval/high"]
        assert not math.isnan(row["eval/truncated"])


def test_a_run_is_evaluated_alone_and_scores_what_it_scored(tmp_path, capsys):
    words = ["runtime=local", "num_steps=1", "env.path=helpers:Sevens", "learner.groups_per_step=2", "eval.every=0"]
    words += ["rollout.max_new_tokens=8", "eval.num_prompts=20", "learner.learning_rate=1e-2"]
    config = configuration.load(None, [*words, f"run_dir={tmp_path}"])
    result = run(job.train(config, quiet=True))
    output = tmp_path / "result.json"
    assert evaluate.main([str(result.folder), "--output", str(output)]) == 0
    alone = json.loads(output.read_text())
    assert alone["metrics"]["eval/accuracy"] == pytest.approx(result.accuracy)
    assert alone["model"].endswith("step-000001")
    assert "20 prompts x 1, temperature 0" in capsys.readouterr().out


def test_a_model_is_evaluated_with_several_attempts(tmp_path, capsys):
    folder = tmp_path / "tiny"
    build_tiny(folder, seed=0)
    words = ["--env", "asyncrl.envs.digits:LargestDigit", "--n", "4", "eval.num_prompts=16", "eval.temperature=2"]
    words.append("rollout.max_new_tokens=2")
    assert evaluate.main([str(folder), *words]) == 0
    out = capsys.readouterr().out
    assert "16 prompts x 4, temperature 2" in out
    assert "pass@4" in out
    assert "no skill" in out
    output = tmp_path / "both.json"
    assert evaluate.main([str(folder), *words, "--n", "1,4", "--output", str(output)]) == 0
    both = [(one["num_samples"], one["temperature"]) for one in json.loads(output.read_text())]
    assert both == [(1, 0), (4, 2)], "one greedy attempt, and the samples that were asked for"
    assert "16 prompts x 1, temperature 0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main([str(folder), "--n", "0,4"])
    assert "argument --n: at least 1 attempt at each prompt, got 0,4" in capsys.readouterr().err
    assert evaluate.main([str(folder), "eval.num_samples=4"]) == 2
    assert "greedy samples of a prompt are all equal" in capsys.readouterr().err
    assert evaluate.main([str(tmp_path / "nothing")]) == 2
    assert evaluate.main([str(folder), "--output", str(tmp_path / "no" / "result.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert evaluate.main([str(folder), "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path} is a folder: name a file" in capsys.readouterr().err


def settings(*words):
    config = evaluate.resolve(evaluate.parse(["tiny", *words]))
    return config.eval.num_samples, config.eval.temperature


def test_one_attempt_is_greedy_and_more_are_sampled():
    assert settings() == (1, 0)
    assert settings("eval.temperature=0.7") == (1, 0.7)
    assert settings("--n", "1", "eval.temperature=0.0", "eval.num_samples=1") == (1, 0)
    assert settings("--n", "4") == (4, 1)
    assert settings("--n", "1,4", "eval.temperature=0.7") == (4, 0.7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "4", "eval.num_samples=2"], "--n 4 is short for eval.num_samples=4, and eval.num_samples=2 is given"),
        (["--n", "1", "eval.temperature=0.7"], "--n 1 is short for eval.temperature=0, and eval.temperature=0.7 is"),
        (["--env", "a:B", "env.path=a:C"], "--env a:B is short for env.path=a:B, and env.path=a:C is given: keep one"),
    ],
)
def test_a_flag_and_a_word_that_contradict_each_other_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        settings(*words)


def test_a_checkpoint_that_the_run_took_away_gives_way_to_the_newest(tmp_path, monkeypatch, capsys):
    run_configuration = configuration.to_tree(configuration.load(None, []))
    (tmp_path / "config.json").write_text(json.dumps(run_configuration))
    (tmp_path / "metrics.jsonl").touch()
    chosen = [tmp_path / "checkpoints" / f"step-{number:06d}" for number in (1, 2)]
    chosen[1].mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "latest", lambda _: chosen.pop(0))

    async def reading(config, _numbers):
        if not Path(config.model.path).exists():
            raise ValueError("there is no folder")
        return [config.model.path]

    monkeypatch.setattr(evaluate, "evaluate", reading)
    assert evaluate.evaluate_newest(evaluate.parse([str(tmp_path)])) == [str(tmp_path / "checkpoints" / "step-000002")]
    assert re.search("took .*step-000001 away meanwhile: .*step-000002 is", capsys.readouterr().err)
    with pytest.raises(ValueError, match="there is no folder"):
        evaluate.evaluate_newest(evaluate.parse(["tiny"]))


def test_a_path_without_a_model_is_told_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 0}')  # as a run's
    (tmp_path / "some.toml").touch()

    def told(name, message):
        with pytest.raises(ValueError, match=message):
            evaluate.resolve(evaluate.parse([str(name)]))

    for name in (tmp_path, "some.toml"):
        told(name, r"is neither a model \(its config.json has model_type\) nor a run")
    for name in (tmp_path / "nothing", "./nothing", "models/some/nothing", "runs/nothing"):
        told(name, "there is no folder .*nothing, seen .*: name that of a model or of a run, or an id of the hub; runs")
    (tmp_path / "runs" / "some").mkdir(parents=True)
    (tmp_path / "runs" / "some" / "run.json").touch()
    told("runs/nothing", "there is no folder runs/nothing, .*; the newest run in runs is runs/some$")
    told("tinyy", "did you mean model.path=tiny,")
    assert evaluate.resolve(evaluate.parse(["some/model"])).model.path == "some/model"
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert evaluate.resolve(evaluate.parse([str(tmp_path)])).model.path == str(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    told(tmp_path, rf"no checkpoint in .*: .* go on with launch/run.py --resume {tmp_path}$")


ROWS = [{"prompt": f"What is {number}?", "reply": "so much"} for number in range(4)]


@pytest.mark.parametrize(
    ("rows", "args", "split", "message"),
    [
        (ROWS, {}, "heldout", "a hash .* of 4 it took none; add rows, or name a split in env.args.heldout"),
        (ROWS, {"num_shots": 4}, "train", r"all are worked examples; lower env.args.num_shots \(4\)"),
        (ROWS, {"max_prompt_tokens": 3}, "train", r"all were skipped, .*raise env.args.max_prompt_tokens \(3\)"),
        ([{"prompt": "", "reply": None}], {}, "train", r"all were skipped, \{'unusable row': 1\}; mend them"),
    ],
)
def test_a_split_without_rows_is_told_with_its_cause(tmp_path, rows, args, split, message):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"reply": "reply", "bad_rows": "skip"} | args
    env = DatasetEnv(TextTokenizer(), str(tmp_path), "asyncrl.envs.rewards:exact_match", **settings)
    with pytest.raises(ValueError, match=f"has no rows for '{split}': .*{message}"):
        next(env.prompts(split, 0))


def test_without_a_configuration_a_completion_has_room():
    assert evaluate.resolve(evaluate.parse(["tiny"])).rollout.max_new_tokens == 512
    assert evaluate.resolve(evaluate.parse(["tiny", "rollout.max_new_tokens=9"])).rollout.max_new_tokens == 9
    assert evaluate.resolve(evaluate.parse(["tiny", "configs/sort_digits.toml"])).rollout.max_new_tokens < 512


def test_rules_of_training_alone_do_not_stop_an_evaluation(tmp_path):
    config = {"algorithm": {"preset": "gspo"}, "rollout": {"top_k": 50}, "eval": {"top_p": 0.9}}
    (tmp_path / "old.json").write_text(json.dumps(config))
    resolved = evaluate.resolve(evaluate.parse(["tiny", str(tmp_path / "old.json")]))
    assert (resolved.rollout.top_k, resolved.eval.top_p) == (0, 0.9)


class Broken(LargestDigit):
    async def play(self, prompt, generate):
        await generate(prompt.token_ids)
        raise ValueError("no such scorer")


def test_what_spoils_an_evaluation_is_told_in_one_line(tmp_path, capsys):
    words = ["tiny", "--env", "test_evaluation:Broken", "eval.num_prompts=2", f"run_dir={tmp_path}"]
    assert evaluate.main([*words, "rollout.max_new_tokens=2"]) == 2
    assert capsys.readouterr().err.startswith("error: Broken raised ValueError('no such scorer')")


class Flaky(LargestDigit):
    """Spoils the first two attempts at its second held-out prompt."""

    spoilt = 0

    async def play(self, prompt, generate):
        played = await super().play(prompt, generate)
        if prompt.id == 1 and split_of(self._question(prompt)) == "heldout" and self.spoilt < 2:
            self.spoilt += 1
            raise ValueError("once more")
        return played


def test_an_attempt_that_the_environment_spoils_is_made_again(tmp_path, capsys):
    words = ["tiny", "eval.num_prompts=4", f"run_dir={tmp_path}", "rollout.max_new_tokens=2"]
    results = []
    for env in ("asyncrl.envs.digits:LargestDigit", "test_evaluation:Flaky"):
        assert evaluate.main([*words, "--env", env, "--output", str(tmp_path / "result.json")]) == 0
        results.append(json.loads((tmp_path / "result.json").read_text()))
    assert [result["metrics"]["eval/failures"] for result in results] == [0, 2]
    assert results[0]["prompts"] == results[1]["prompts"], "the same completions"
    assert "failures     2 attempts were spoilt by the environment and made again" in capsys.readouterr().out
    flaky = ["--env", "test_evaluation:Flaky"]
    assert evaluate.main([*words, *flaky, "rollout.max_attempts=2"]) == 0
    told = capsys.readouterr().out
    assert "left out     1 prompts without a score; the first: Flaky raised" in told
    assert re.search(r"Flaky raised ValueError\('once more'\), \S*test_evaluation.py line \d+, on prompt", told)


def test_a_spoilt_evaluation_does_not_end_a_run(tmp_path):
    words = ["runtime=local", "env.path=test_evaluation:Flaky", "learner.groups_per_step=2", "num_steps=2"]
    words.append("rollout.max_new_tokens=2")
    config = configuration.load(None, [*words, "eval.num_prompts=8", "eval.every=1", f"run_dir={tmp_path}"])
    result = run(job.train(config, quiet=True))
    assert sum(row.get("eval/failures", 0) for row in metrics.read(result.folder)) == 2


def test_attempts_that_all_ran_out_of_tokens_are_pointed_out(tmp_path, capsys):
    words = ["tiny", "eval.num_prompts=2", f"run_dir={tmp_path}"]
    assert evaluate.main([*words, "rollout.max_new_tokens=1"]) == 0
    assert "1.0000  every attempt ran out of tokens: raise rollout.max_new_tokens" in capsys.readouterr().out


@pytest.mark.parametrize("num_actors", [0, 1])
def test_evaluators_hold_a_version_still_and_rollout_actors_do_not(tmp_path, num_actors):
    words = ["runtime=local", "env.path=helpers:Sevens", "learner.groups_per_step=2", "rollout.num_actors=1"]
    # Twelve attempts one after the other outlast several steps.
    words += ["num_steps=8", "eval.every=2", "eval.num_prompts=24", "eval.max_running=1", "rollout.max_new_tokens=8"]
    config = configuration.load(None, [*words, f"eval.num_actors={num_actors}", f"run_dir={tmp_path}"])
    result = run(job.train(config, quiet=True))
    rows = metrics.read(result.folder)
    evals = {row["version"]: row["eval/mixed_versions"] for row in rows if "eval/accuracy" in row}
    assert {0, 8} <= set(evals) <= {0, 2, 4, 6, 8}
    assert (max(evals.values()) == 0) == (num_actors == 1)
    written = [(row["version"], "eval/accuracy" in row) for row in rows]
    if num_actors:
        assert written.index((1, False)) < written.index((0, True)), "the first step did not wait for the evaluation"


@pytest.mark.parametrize("method", ["evaluate", "update_weights"])
def test_a_run_goes_on_without_evaluators_that_died(tmp_path, monkeypatch, capsys, method):
    works, calls, wait, waited = getattr(Rollout, method), [], Watchdog.wait, []

    async def dies(rollout, *arguments):
        if rollout.name.startswith("evaluator"):
            calls.append(rollout.name)
            if len(calls) > 1:
                rollout._engine._group.leave()  # as the end of a process closes its connections
                raise ActorDied("gone")
        return await works(rollout, *arguments)

    def noted(watchdog, stage, waits_for, actor=None):
        waited.append(waits_for)
        return wait(watchdog, stage, waits_for, actor)

    monkeypatch.setattr(Rollout, method, dies)
    monkeypatch.setattr(Watchdog, "wait", noted)
    words = ["runtime=local", "env.path=helpers:Sevens", "learner.groups_per_step=2", "rollout.num_actors=1"]
    words += ["num_steps=6", "eval.every=2", "eval.num_prompts=2", "eval.num_actors=1", "rollout.max_new_tokens=4"]
    result = run(job.train(configuration.load(None, [*words, f"run_dir={tmp_path}"]), quiet=False))
    assert len(calls) == 2
    assert "evaluator 0 to take version 0" in waited
    assert {0, 6} <= {row["version"] for row in metrics.read(result.folder) if "eval/accuracy" in row}
    assert "evaluator 0, died: gone: rollout actors evaluate from now on" in capsys.readouterr().out


class OneHopeless(LargestDigit):
    """No attempt at one held-out prompt can be scored."""

    async def play(self, prompt, generate):
        if prompt.id == 1 and split_of(self._question(prompt)) == "heldout":
            raise ValueError("unheard of")
        return await super().play(prompt, generate)


def test_a_held_out_prompt_that_cannot_be_scored_is_left_out_and_told(tmp_path, capsys):
    words = ["runtime=local", "env.path=test_evaluation:OneHopeless", "learner.groups_per_step=2", "num_steps=1"]
    words.append("rollout.max_new_tokens=2")
    config = configuration.load(None, [*words, "eval.num_prompts=8", "eval.every=1", f"run_dir={tmp_path}"])
    result = run(job.train(config))
    rows = [row for row in metrics.read(result.folder) if "eval/accuracy" in row]
    assert [row["eval/unscored"] for row in rows] == [1, 1]
    assert "1 of 8 held-out prompts could not be scored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "changes", "again"),
    [
        (2, [], False),
        (2, ["num_steps 4 -> 8"], False),
        (2, ["eval.num_samples 1 -> 4"], True),
        (4, [], True),  # its evaluation was under way when the run stopped
        (6, [], True),  # nothing could be scored
    ],
)
def test_a_resumed_run_does_not_evaluate_its_version_again(tmp_path, version, changes, again):
    lines = [{"version": 2, "eval/accuracy": 0.5}, {"version": 4, "reward/mean": 1.0}, {"version": 6}]
    lines[2]["eval/accuracy"] = None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sink = SimpleNamespace(folder=tmp_path, last_accuracy=None)
    resumed = SimpleNamespace(learner=SimpleNamespace(version=version), metrics=sink, evaluated=set())
    job.keep_evaluation(resumed, changes)
    assert (version not in resumed.evaluated) == again
    assert sink.last_accuracy == (None if again else 0.5)
    if not again:
        asyncio.run(system.evaluate(resumed))  # plays nothing, as there is nothing to play with
