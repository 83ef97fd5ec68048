"""The command that says what a run added: its stages, that it goes on where it stopped, and its table."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import before_after

from asyncrl.cli import evaluate
from asyncrl.cli import train as launch_run

CONFIG = str(Path(__file__).parents[2] / "configs" / "sort_digits.toml")
WORDS = [
    "runtime=local",
    "eval.every=0",
    "num_steps=2",
    "warmup.num_steps=2",
    "learner.groups_per_step=2",
    "eval.num_prompts=12",
]


def test_each_stage_is_done_once_and_the_table_has_both(tmp_path, monkeypatch, capsys):
    called = []

    def call(script, words, minutes=None):
        called.append((script, words, minutes))
        main = {"evaluate.py": evaluate.main, "run.py": launch_run.main}[script]
        assert main(words) == 0

    monkeypatch.setattr(before_after, "call", call)
    monkeypatch.setattr(before_after, "warmed_up", before_after._prepare)
    command = [CONFIG, "--folder", str(tmp_path), "--minutes", "3", "--eval", "eval.num_prompts=8", *WORDS]
    assert before_after.main(command) == 0
    assert [script for script, _, _ in called] == ["evaluate.py", "run.py", "evaluate.py"]
    assert [minutes for _, _, minutes in called] == [None, 3, None]
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    for both in results.values():
        assert [(one["num_prompts"], one["num_samples"]) for one in both] == [(8, 1), (8, 4)]
    assert results["before"][0]["model"].startswith(str(tmp_path / "cache"))
    assert results["after"][0]["model"].endswith("step-000002")
    table = before_after.table(tmp_path)
    assert "greedy, 8 x 1: mean reward" in table
    assert "sampled, 8 x 4: pass@4" in table
    before_after.main(command)
    assert len(called) == 3, "all of it was there"
    (tmp_path / "trained.txt").unlink()
    monkeypatch.setattr(before_after, "call", lambda *given: called.append(given))
    before_after.main(command)
    ((script, words, _),) = called[3:]
    assert (script, words[0]) == ("run.py", "--resume"), "a run that was not complete is gone on with"
    capsys.readouterr()


def test_differences_are_of_the_same_prompts():
    def prompts(*rewards):
        return [{"id": number, "rewards": rewards[number % len(rewards)]} for number in range(100)]

    before = {"env_args": {}, "num_prompts": 100, "prompts": prompts([1, 1], [0, 1])}
    after = before | {"prompts": prompts([0, 1])}
    # 50 changes of -0.5 and 50 of 0: mean -0.25, standard error 0.025.
    assert before_after._difference(before, after) == "-0.250 (-0.298 to -0.200)"
    assert before_after._difference(after, before) == "+0.250 (+0.200 to +0.298)"
    assert before_after._difference(before, before) == "+0.000 (-0.192 to +0.192)"
    unscored = after | {"prompts": after["prompts"][1:]}
    assert before_after._difference(before, unscored).startswith("-0.247 "), "49 of 99: pairs are of one prompt"
    with pytest.raises(ValueError, match="other prompts"):
        before_after._difference(before, after | {"env_args": {"heldout": "test"}})


def test_a_process_that_should_end_is_told_and_one_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(before_after, "LAUNCH", tmp_path)
    (tmp_path / "waits.py").write_text(
        "import pathlib, signal, sys\n"
        "signal.signal(signal.SIGINT, lambda *_: (pathlib.Path(sys.argv[1]).write_text('told'), sys.exit(75)))\n"
        "signal.pause()\n"
    )
    before_after.call("waits.py", [str(tmp_path / "told")], minutes=1 / 60)
    assert (tmp_path / "told").read_text() == "told"
    for code, minutes in ((3, None), (3, 1), (75, None)):
        (tmp_path / "fails.py").write_text(f"raise SystemExit({code})")
        with pytest.raises(Exception, match=f"exit status {code}"):
            before_after.call("fails.py", [], minutes)


def test_too_few_minutes_are_told_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(before_after, "LAUNCH", tmp_path)
    monkeypatch.setattr(before_after, "warmed_up", lambda *_: "tiny")
    (tmp_path / "evaluate.py").touch()
    # A shell: interrupted while it starts, Python may end with 1. The status is that of launch/run.py.
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    (tmp_path / "run.py").write_text("trap 'exit 130' INT\nwhile :; do sleep 0.01; done")
    assert before_after.main([CONFIG, "--folder", str(tmp_path), "--minutes", "0.01"]) == 2
    assert capfd.readouterr().err == "error: after --minutes 0.01 launch/run.py was not training yet: raise --minutes\n"
    (tmp_path / "run.py").write_text("exit 3")
    assert before_after.main([CONFIG, "--folder", str(tmp_path), "--minutes", "1"]) == 2
    assert "returned non-zero exit status 3" in capfd.readouterr().err
