"""Replies that are made to break or hold up a grader: each gets a score, from every environment that is shipped."""

import math

import pytest
from helpers import run

from asyncrl.envs import swe
from asyncrl.envs.base import load_env
from asyncrl.envs.sandbox import Sandbox
from bench import graders

NAMES = [
    "GSM8K",
    "exact_match",
    "LargestOfThree",
    "LargestDigit",
    "SortDigits",
    "ToolUse",
    "TextToSQL",
    "CodeTask",
    "CodeTask, a function",
    "RepairTask",
]
TURNS = ("ToolUse", "TextToSQL", "CodeTask", "RepairTask")
SIZE = 16384
"""Of a reply. A parser that looks again from each mark takes a second over some, one of two such loops minutes, which
the test's time limit ends."""


@pytest.fixture
def sandbox_once(monkeypatch):
    """A program that was run before is not run again: most replies change nothing in what is run."""
    known, run_program = {}, Sandbox.run

    async def run_once(self, code, *, stdin="", files=None):
        key = code, stdin, repr(files)
        if key not in known:
            known[key] = await run_program(self, code, stdin=stdin, files=files)
        return known[key]

    monkeypatch.setattr(Sandbox, "run", run_once)
    monkeypatch.setattr(swe.secrets, "token_hex", lambda num_bytes: "0" * 2 * num_bytes)  # a part of what is run


def make(folder, name, **args):
    path, given, target = graders.environments(folder)[name]
    return load_env(path, graders.Characters(), given | args), target


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("sandbox_once")
@pytest.mark.parametrize("name", NAMES)
def test_every_reply_gets_a_score(tmp_path, name):
    env, target = make(tmp_path, name, **({"max_turns": 1} if name.startswith(TURNS) else {}))
    for told, reply in graders.replies(SIZE).items():
        trajectory = run(graders.play(env, target, reply))
        assert math.isfinite(trajectory.reward), told
        assert trajectory.reward <= 1, told


@pytest.mark.parametrize("name", ["CodeTask", "CodeTask, a function"])
def test_every_program_gets_a_score(tmp_path, name):
    env, target = make(tmp_path, name, time_limit_s=2)
    for told, reply in graders.programs().items():
        assert run(graders.play(env, target, reply)).reward == 0, told


def test_every_environment_is_tried(tmp_path):
    assert set(NAMES) == set(graders.environments(tmp_path))
