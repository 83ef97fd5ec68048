"""The configuration: every shipped file loads, and every rule says what is wrong and what to do."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from asyncrl.cli import train as run
from asyncrl.config import loading as configuration
from asyncrl.config import warnings as cautions
from asyncrl.config.schema import BufferConfig, Config
from asyncrl.recovery import run_folder

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
GROUPED = ["algorithm.loss.scale=none", "algorithm.drop_zero_variance=true"]
PPO = ["algorithm.preset=ppo"]
GSPO = ["algorithm.preset=gspo"]


def test_there_are_configs():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    assert configuration.load(path) != Config(), "a file that changes nothing"


def test_words_override_the_file_and_the_defaults(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text("num_steps = 7\n[rollout]\ngroup_size = 4\n")
    config = configuration.load(path, ["rollout.group_size=16", "model.path=[some]/folder", "learner.reshard=step"])
    assert (config.num_steps, config.rollout.group_size) == (7, 16)
    assert (config.model.path, config.learner.reshard) == ("[some]/folder", "step"), "no list"


def test_a_resolved_config_reads_back_the_same():
    config = configuration.load(None, ["algorithm.loss.entropy_bonus=0.5", "learner.betas=[0.8, 0.9]"])
    assert configuration.from_tree(msgspec.json.decode(msgspec.json.encode(configuration.to_tree(config)))) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.group_sise=4"], "unknown key 'rollout.group_sise'.*did you mean 'rollout.group_size'"),
        (["group_size=4"], "unknown key 'group_size'.*did you mean 'rollout.group_size'"),
        (["learning_rate=1"], "'warmup.learning_rate' or 'learner.learning_rate' or 'critic.learning_rate'"),
        (["rolout.group_size=4"], "unknown key 'rolout'.*did you mean 'rollout'"),
        (["rollout=4"], "'rollout' is a table"),
        (["num_steps=3", "num_steps.x=4"], "num_steps.x.*is a value, not a table"),
        (["rollout.group_size=many"], "rollout.group_size must be a whole number, got 'many'"),
        (["learner.betas=[0.9]"], r"learner.betas must be a list of 2 \(a number, a number\), got \[0.9\]"),
        (["lora.targets=q"], r"lora.targets must be a list \(of a text each\) or 'all-linear', got 'q'"),
        (["env.args=5"], "env.args must be a table, got 5"),
        (['rollout.stop=[""]'], "rollout.stop has an empty text, which would end every reply"),
        (
            ["env.args.reward=[a:f,b:g]"],
            r"texts in a list .* have quotes, .* as in 'env.args.reward=\[\"first\", .*=\"\[one",
        ),
        (["buffer.max_staleness=high"], "buffer.max_staleness must be a whole number, got 'high'"),
        (["seed=99999999999999999999"], r"seed must be a whole number of 64 bits, .* got 99999999999999999999"),
        (["rollout.group_size"], "write section.key=value"),
        (["rollout.num_actors=0"], "rollout.num_actors must be at least 1, got 0"),
        (["rollout.top_p=1.5"], "rollout.top_p must be above 0 and at most 1, got 1.5"),
        (["rollout.temperature=0"], "greedy samples of a group are all equal"),
        (["rollout.group_size=1"], "rollout.group_size is 1.*raise rollout.group_size"),
        (
            ["algorithm.preset=reinforce_pp", "rollout.group_size=1", "learner.groups_per_step=1"],
            "a batch baseline needs at least two samples: .* are 1 .* raise one of them, or set .*center=none",
        ),
        (["rollout.release_memory=true"], "rollout.engine is 'embedded' and placement is 'disaggregated'"),
        (
            ["rollout.release_memory=true", "rollout.engine=sglang", "placement=colocated"],
            "set rollout.on_update=recompute",
        ),
        (["curriculum.skip=1"], "curriculum.skip must be at least 0 and below 1, got 1.*never come back"),
        (["curriculum.bounds=[0.9, 0.1]"], "0 <= hard < easy <= 1, got 0.9 and 0.1"),
        (["curriculum.by=level"], "curriculum.by must be 'off' or 'prompt' or 'source', got 'level'"),
        (["buffer.window=0"], "buffer.window must be at least 1"),
        (["learner.max_grad_norm=0"], "learner.max_grad_norm must be above 0 and finite, got 0"),
        (["critic.max_grad_norm=nan"], "critic.max_grad_norm must be above 0 and finite, got nan"),
        (["learner.betas=[0.9, 1]"], r"learner.betas must each be at least 0 and below 1, got \[0.9, 1.0\]"),
        (["learner.betas=[nan, 0.9]"], r"learner.betas must each be at least 0 and below 1, got \[nan, 0.9\]"),
        (["learner.weight_decay=-0.1"], "learner.weight_decay must be at least 0, got -0.1"),
        (
            ["watchdog.action=restart", "watchdog.timeout_s=120"],
            r"watchdog.timeout_s must be above weights.timeout_s \(120\), .* got 120; raise",
        ),
        (["watchdog.action=restart", "runtime=local"], "'local' has them in one process.* set watchdog.action=stop"),
        (["learner.learning_rate=nan"], "learner.learning_rate must be at least 0, got nan"),
        (["learner.learning_rate=inf"], "learner.learning_rate must be finite, got inf"),
        (["algorithm.loss.center=none", "algorithm.loss.scale=group_std"], 'center = "none" with scale = "group_std"'),
        (
            ["algorithm.preset=reinforce_pp", "rollout.group_size=1", "algorithm.drop_zero_variance=true"],
            "drop_zero_variance drops groups of equal rewards.*rollout.group_size=1",
        ),
        (["algorithm.preset=async_defautl"], "async_default"),
        (["algorithm.loss.entropi_bonus=1"], "entropy_bonus"),
        (
            ["algorithm.preset=reinforce"],
            "staleness is 1.*'reinforce' has no importance correction.*uncorrected=true, or train with buffer.max_stal",
        ),
        (
            ["algorithm.preset=reinforce", "buffer.max_staleness=0", "buffer.reuse=2"],
            "buffer.reuse is 2 .*, or train with buffer.reuse=1$",
        ),
        (["algorithm.preset=reinforce", "buffer.reuse=2"], "train with buffer.max_staleness=0 and buffer.reuse=1$"),
        (
            ["algorithm.preset=reinforce", "buffer.max_staleness=0", "rollout.top_p=0.9"],
            "truncated sampling needs a corrected loss: rollout.top_p is 0.9.*; set rollout.top_p=1 .* such as tis2",
        ),
        (
            ["algorithm.preset=gspo", "rollout.top_p=0.95"],
            "rollout.top_p is 0.95 .* as low as 0.95, and preset 'gspo' .* by trust_low = 0.0003; set rollout.top_p=1",
        ),
        (
            ["algorithm.preset=grpo", "rollout.top_k=50"],
            "rollout.top_k is 50, so it may be as low as 0, .* trust_low = 0.2",
        ),
    ],
)
def test_a_mistake_gets_its_rule_value_and_remedy(words, message):
    with pytest.raises(ValueError, match=message):
        configuration.load(None, words)


@pytest.mark.parametrize(
    "words", [["buffer.max_staleness=0"], ["algorithm.allow_uncorrected=true"]], ids=["synchronous", "told otherwise"]
)
def test_an_uncorrected_loss_is_accepted_where_it_is_sound_or_asked_for(words):
    assert configuration.load(None, ["algorithm.preset=reinforce", *words])


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the configuration.*nowhere\.toml"):
        configuration.load(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("a = = 3")
    with pytest.raises(ValueError, match="cannot be parsed"):
        configuration.load(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes('run_dir = "Läufe"'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.toml cannot be parsed: 'utf-8' codec"):
        configuration.load(tmp_path / "latin.toml")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"list\.json is no table of settings, got \[1\]"):
        configuration.load(tmp_path / "list.json")


def test_words_may_stand_before_and_after_options():
    options = run.parse([str(FILES[0]), "seed=3", "--num-rollout-actors", "3", "num_steps=5"])
    config = run.resolve(options)
    assert (config.seed, config.rollout.num_actors, config.num_steps) == (3, 3, 5)


def test_the_short_form_and_its_setting_agree():
    same = run.parse(["--num-rollout-actors", "3", "rollout.num_actors=3"])
    assert run.resolve(same).rollout.num_actors == 3
    with pytest.raises(ValueError, match=r"--num-rollout-actors 3 .*, and rollout.num_actors=4 is given: keep one"):
        run.resolve(run.parse(["--num-rollout-actors", "3", "rollout.num_actors=4"]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_shipped_config_is_warned_of(path):
    assert cautions.warnings(configuration.load(path)) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["critic.lam=0.9", "critic.clip=0"], "no effect .* of critic.clip=0.0, critic.lam=0.9: .* center critic"),
        (["buffer.window=4", "buffer.max_staleness=0"], "buffer.window=4: that needs buffer.max_staleness above 0"),
        ([*PPO, "critic.num_updates=1", "critic.clip=0.5"], "critic.clip=0.5: that needs critic.num_updates above 1"),
        (["curriculum.skip=0.5"], "that needs curriculum.by"),
        (["lora.alpha=8"], "that needs lora.rank"),
        (["warmup.batch_size=8"], "that needs warmup.num_steps"),
        (["model.path=some/folder", "model.num_layers=4"], "that needs model.path tiny"),
        (["rollout.gpu_memory_utilization=0.5"], "that needs rollout.engine sglang"),
        (["eval.top_p=0.9"], "that needs eval.temperature"),
        (["learner.reshard=step"], "that needs learner.num_gpus"),
        (["runtime=local", "cluster.address=auto"], "cluster.address=auto: that needs runtime cluster"),
        (["runtime=local", "rollout.num_threads=4"], "rollout.num_threads=4: that needs runtime cluster"),
        (["metrics.prometheus_host=0.0.0.0"], "that needs metrics.prometheus_port"),
        (["learner.learning_rate=0"], "learner.learning_rate is 0: the policy stays as it is"),
        (
            ["watchdog.action=stop", "watchdog.timeout_s=900"],
            "max_attempts x env.timeout_s is 900 s, beside generation",
        ),
        (
            ["rollout.top_p=0.9"],
            "scored over all of it.*like staleness; trust tv may remove probable ones; rollout.top_p=1",
        ),
        (["rollout.top_k=9", "algorithm.preset=tis2"], "rollout.top_k is 9: .*like staleness; rollout.top_p=1"),
        (["rollout.top_p=0.9", "algorithm.preset=topr"], "; the weight of a sequence falls with every token"),
        (["rollout.top_p=0.9", "algorithm.preset=tis_seq"], "; the weight of a sequence falls with every token"),
        (GSPO, "trust_low is 0.0003 .*, and buffer.max_staleness is 1: .* many sequences .* widen both"),
        (
            [*GSPO, "buffer.max_staleness=0", "rollout.dtype=bfloat16", "algorithm.loss.trust_high=0.1"],
            "trust_high is 0.1 on .*, and rollout.dtype is bfloat16: rounding",
        ),
        (
            [*GSPO, "buffer.max_staleness=0", "learner.dtype=bfloat16", "buffer.reuse=2"],
            "reuse is 2 and learner.dtype is",
        ),
        (["rollout.top_p=0.9", "algorithm.preset=kimi_k15"], "; the penalty pulls"),
        ([*PPO, "critic.learning_rate=0"], "critic.learning_rate is 0: the critic stays as it is"),
        (
            [*PPO, "critic.warmup_steps=7", "num_steps=7"],
            "critic.warmup_steps is 7 and num_steps is 7.*raise num_steps",
        ),
    ],
)
def test_a_setting_that_does_nothing_is_warned_of(words, told):
    [line] = cautions.warnings(configuration.load(None, words))
    assert re.search(told, line), line


@pytest.mark.parametrize(
    "words",
    [
        [*PPO, "critic.lam=0.9", "critic.warmup_steps=6", "num_steps=7"],
        [*GSPO, "buffer.max_staleness=0"],
        [*GSPO, "algorithm.loss.trust_low=0.03", "algorithm.loss.trust_high=0.04"],
        ["algorithm.preset=gmpo", "algorithm.loss.trust_low=0.0001"],
        ["buffer.window=4"],
        ["algorithm.loss.advantage=a:b", "algorithm.preset=reinforce_pp", *GROUPED],
        ["lora.rank=4", "lora.alpha=8"],
        ["cluster.address=auto"],
    ],
)
def test_a_setting_that_is_used_is_not(words):
    assert cautions.warnings(configuration.load(None, words)) == []


def test_warnings_go_beside_what_is_printed(capsys):
    assert run.main(["--dry-run", "learner.learning_rate=0"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["learner"]["learning_rate"] == 0
    assert printed.err.startswith("warning: learner.learning_rate is 0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-steps", "10"], "--num-steps: a setting is written without dashes, num_steps=VALUE"),
        (["--learner.learning-rate=1e-3"], "written without dashes, learner.learning_rate=1e-3"),
        (["--dryrun"], "--dryrun: did you mean --dry-run?"),
        (["--resume"], "argument --resume: expected one argument"),
    ],
)
def test_a_flag_that_does_not_exist_is_told_its_form(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.parse(words)
    assert capsys.readouterr().err.endswith(message + "\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_steps", "10"], "at most, got num_steps, 10; a setting is one word, such as num_steps=10"),
        (
            ["--resume", "old"],
            "old is no run folder: it is not there, seen .*; the newest run in runs is runs/2$",
        ),
        (["--resume", "runs"], "runs is no run folder: it has no config.json; the newest run in runs is runs/2$"),
        (["--resume", "other/1"], r"other/1 is no run folder: .*; the newest run in other is other/3$"),
    ],
)
def test_what_is_neither_a_file_nor_a_run_is_told_what_is(words, message, tmp_path, monkeypatch, capsys):
    for name in ("runs/1", "runs/2", "other/3"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").touch()
    monkeypatch.chdir(tmp_path)
    assert run.main(words) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture
def old_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(configuration.to_tree(Config())))
    return str(tmp_path)


@pytest.mark.parametrize("words", [["--dry-run"], []])
def test_a_change_that_a_resume_refuses_is_refused_at_once(old_run, words, capsys):
    assert run.main(["--resume", old_run, "model.num_layers=3", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: model.num_layers 2 -> 3: the checkpoints of ")
    assert not printed.out


def test_a_dry_run_of_a_resume_shows_what_would_change(old_run, capsys):
    assert run.main(["--resume", old_run, "num_steps=7", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "the resume would change num_steps 100 -> 7\n"
    assert json.loads(printed.out)["num_steps"] == 7


def test_a_run_keeps_the_standard_deviation_that_it_began_with(tmp_path):
    old, new = tmp_path / "old", run_folder.create(Config(run_dir=str(tmp_path / "runs")), {})
    old.mkdir()
    (old / "config.json").write_text(json.dumps(configuration.to_tree(Config())))  # as 0.1 wrote it
    for folder, correction in ((old, 0), (new, 1)):
        resumed = configuration.from_words([], Path(), resume=folder)
        assert resumed.loss.std_correction == correction
        assert run_folder.differences(folder, resumed) == []
    run_folder.keep(old, configuration.from_words([], Path(), resume=old), 3)
    assert configuration.from_words([], Path(), resume=old).loss.std_correction == 0
    changed = configuration.from_words(["algorithm.loss.std_correction=1"], Path(), resume=old)
    assert run_folder.differences(old, changed) == ["algorithm.loss.std_correction 0 -> 1"]


class Importing:
    """A module that a signal meets while it is being imported."""

    def __init__(self, number):
        self._number = number

    @property
    def train(self):
        os.kill(os.getpid(), self._number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_the_start_ends_it_in_one_line(monkeypatch, capsys, number, code):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(sys.modules, "asyncrl.driver.run", Importing(number))
    assert run.main(["runtime=local"]) == code
    told = capsys.readouterr().err
    assert told.startswith("interrupted: ")
    assert told.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_ends_what_never_waits_and_leaves_no_run(monkeypatch, tmp_path, capsys):
    went_on = []

    def warm_up(*_arguments, **_options):
        signal.raise_signal(signal.SIGINT)
        went_on.append("with the warm-up")

    monkeypatch.setattr("asyncrl.driver.run.load_task", warm_up)
    assert run.main(["runtime=local", f"run_dir={tmp_path / 'runs'}"]) == 130
    assert not went_on
    assert capsys.readouterr().err == "interrupted: SIGINT\n"
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_interrupted_says_how_to_go_on(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), run_folder.error_kept(tmp_path):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.endswith(f"launch/run.py --resume {tmp_path}\n")
    assert not (tmp_path / "error.txt").exists()


def test_mistakes_that_several_tasks_were_told_are_one_line(monkeypatch, capsys):
    async def failing(*_arguments, **_options):
        raise ExceptionGroup("of the producers", [ValueError("no source"), ValueError("no source")])

    monkeypatch.setattr("asyncrl.driver.run.train", failing)
    assert run.main(["runtime=local"]) == 2
    assert capsys.readouterr().err == "error: no source\n"


def test_what_ended_a_run_is_kept_until_it_goes_on(tmp_path, capsys):
    with pytest.raises(ValueError, match="shapes"), run_folder.error_kept(tmp_path):
        np.zeros(2) + np.zeros(3)
    assert str(tmp_path / "error.txt") in capsys.readouterr().err
    told = (tmp_path / "error.txt").read_text()
    assert "np.zeros(2) + np.zeros(3)" in told
    with run_folder.error_kept(tmp_path):
        assert not (tmp_path / "error.txt").exists()


def test_settings_of_earlier_versions_are_rewritten():
    """Run folders have every setting of their time."""
    old = {"buffer": {"max_staleness": 2, "staleness_bounds": [1, 8], "order": "fifo", "window": None}}
    assert configuration.from_tree(old).buffer == BufferConfig(max_staleness=2, window=1)
    assert configuration.load(None, ["buffer.order=window"]).buffer.window is None


@pytest.mark.parametrize("word", ["buffer.order=freshest", "buffer.max_staleness=auto"])
def test_a_feature_that_is_gone_is_named_with_its_remedy(word):
    with pytest.raises(ValueError, match=rf"{re.escape(word)} was removed in 0\.2: .*buffer\.\w+=\d"):
        configuration.load(None, [word])


def test_only_the_toy_has_the_budget_of_the_toy():
    assert configuration.load(None, []).rollout.max_new_tokens == 2
    assert configuration.load(None, ["rollout.max_new_tokens=7"]).rollout.max_new_tokens == 7
    toy = run.DEFAULT
    assert configuration.from_words([], toy).rollout.max_new_tokens == 2
    own = configuration.from_words(["env.path=asyncrl.envs.dataset:DatasetEnv"], toy)
    assert own.rollout.max_new_tokens == 512, "as a command line without a file has it"
    assert configuration.from_tree(configuration.to_tree(own)) == own, "a stored configuration has every value"
