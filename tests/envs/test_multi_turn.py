"""Environments of several turns, against a policy that says what it is told to: columns, budgets, tools and scores."""

import asyncio
import base64
import json
import pickle
import zlib
from itertools import chain, islice

import numpy as np
import pytest
import torch
from helpers import run

from asyncrl.config.schema import TINY_BYTES
from asyncrl.engines.embedded.engine import EmbeddedEngine
from asyncrl.envs.base import load_env
from asyncrl.envs.chat import ChatFormat
from asyncrl.envs.code import UnitTest, matches, programs_in, read_tests
from asyncrl.envs.data import read_rows
from asyncrl.envs.dataset import DatasetEnv
from asyncrl.envs.multi_turn import SHIPPED
from asyncrl.envs.sandbox import Sandbox
from asyncrl.envs.swe import _RepairEpisode
from asyncrl.envs.tools import ToolError, calculator, same_answer
from asyncrl.models.loading import load_model, load_tokenizer
from asyncrl.models.tiny import build_tiny
from asyncrl.runtime.rollout_worker import Rollout
from asyncrl.types import Completion, Sampling

TASKS = {name: f"asyncrl.envs.{name}" for name in ("tools:ToolUse", "sql:TextToSQL", "code:CodeTask", "swe:RepairTask")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tiny(folder, name=TINY_BYTES, seed=0)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


class Script:
    """A policy that gives one reply after the other, and remembers the contexts that it saw."""

    def __init__(self, tokenizer, *replies, cut=False):
        self.tokenizer, self.replies, self.cut = tokenizer, list(replies), cut
        self.contexts, self.written = [], []

    async def __call__(self, token_ids):
        self.contexts.append(list(token_ids))
        reply = self.tokenizer.encode(self.replies[len(self.contexts) - 1])
        self.written.append(reply if self.cut else [*reply, self.tokenizer.eos_token_id])
        ids = np.array(self.written[-1], np.int32)
        turn = len(self.contexts)
        columns = np.full(len(ids), -turn, np.float32), np.full(len(ids), turn, np.int32)
        return Completion(ids, *columns, "length" if self.cut else "stop", {turn: f"digest {turn}"})


def play(env, tokenizer, *replies, split="train", number=0, **options):
    """The trajectory of row `number` of the shipped data, and the policy that played it."""
    policy = Script(tokenizer, *replies, **options)
    prompt = next(prompt for prompt in env.prompts(split, 0) if prompt.target == str(number))
    return run(env.play(prompt, policy)), policy


def heard(policy, turn):
    """What the model read between its replies `turn` and `turn + 1`."""
    seen = len(policy.contexts[turn]) + len(policy.written[turn])
    return policy.tokenizer.decode(policy.contexts[turn + 1][seen:])


def test_contexts_grow_token_by_token_and_columns_stay_aligned(tokenizer):
    env = load_env(TASKS["tools:ToolUse"], tokenizer, {})
    replies = ("<calculator>2*21</calculator>", "<python>print('é')</python>", "<answer>7</answer>")
    attempt, policy = play(env, tokenizer, *replies)
    for turn in range(2):
        assert policy.contexts[turn + 1][: len(policy.contexts[turn])] == policy.contexts[turn]
        before = len(policy.contexts[turn])
        assert policy.contexts[turn + 1][before:][: len(policy.written[turn])] == policy.written[turn]
    assert heard(policy, 0) == "user:42<eos>assistant:"
    assert heard(policy, 1) == "user:é<eos>assistant:"
    assert attempt.token_ids.tolist() == policy.contexts[2] + policy.written[2]
    assert attempt.token_ids[attempt.mask].tolist() == list(chain(*policy.written))
    assert (attempt.versions == -attempt.logprobs).all()
    assert set(attempt.versions[attempt.mask]) == {1, 2, 3}
    assert not attempt.versions[~attempt.mask].any()
    assert attempt.digests == {turn: f"digest {turn}" for turn in (1, 2, 3)}
    assert attempt.metrics == {"turns": 3, "out_of_turns": 0, "tool_calls": 2, "bad_calls": 0}


def test_an_answer_may_end_its_turn_with_another_stop_token(tokenizer):
    env = load_env(TASKS["tools:ToolUse"], tokenizer, {})
    other = tokenizer.pad_token_id

    async def play_it():
        policy = Script(tokenizer, "x", "<answer>1</answer>")

        async def generate(token_ids):
            completion = await policy(token_ids)
            completion.token_ids[-1] = other
            return completion

        await env.play(next(env.prompts("train", 0)), generate)
        after = policy.contexts[1][len(policy.contexts[0]) + 1 :]
        assert after[:2] == [other, tokenizer.eos_token_id]

    run(play_it())


def test_the_log_probs_of_all_turns_are_those_of_the_whole_row(folder, tokenizer):
    """On a real engine: every token ends a turn, so a reply is one token; then one forward pass over the attempt."""

    async def body():
        env = load_env(TASKS["tools:ToolUse"], tokenizer, {})
        model = load_model(folder, dtype=torch.float32, device="cpu")
        engine = EmbeddedEngine(model, max_running=4, max_length=env.max_prompt_tokens + 4)
        sampling = Sampling(4, stop_token_ids=tuple(range(len(tokenizer))))
        group = await Rollout(engine, env, sampling, group_size=2, seed=0).run(next(env.prompts("train", 0)))
        await engine.close()
        return model, group

    model, group = run(body())
    assert group.lengths == (4, 4)
    assert group.metrics["bad_calls"] == group.metrics["turns"] == 4
    for attempt in group.trajectories:
        with torch.no_grad():
            logits = model(torch.tensor(attempt.token_ids[None]).long()).logits[0, :-1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(attempt.token_ids[1:, None]).long())[:, 0].numpy()
        mask = attempt.mask[1:]
        np.testing.assert_allclose(attempt.logprobs[1:][mask], logprobs[mask], atol=1e-4)


def test_garbage_is_answered_and_counted(tokenizer):
    env = load_env(TASKS["tools:ToolUse"], tokenizer, {})
    replies = ["hm", "<calculator>import os</calculator>", "<python>1/0</python>", "<calculator>1"]
    attempt, policy = play(env, tokenizer, *replies)
    assert "error: no call and no answer" in heard(policy, 0)
    assert "error: cannot compute 'import os'" in heard(policy, 1)
    assert "error: ZeroDivisionError: division by zero" in heard(policy, 2)
    assert attempt.reward == 0
    assert attempt.metrics == {"turns": 4, "out_of_turns": 1, "tool_calls": 2, "bad_calls": 4}
    assert attempt.finish == "stop"


def test_a_reply_that_was_cut_off_is_not_acted_upon(tokenizer):
    row = read_rows(str(SHIPPED / "tools.jsonl"), "train")[0]
    env = load_env(TASKS["tools:ToolUse"], tokenizer, {})
    right = f"<answer>{row['answer']}</answer>"
    assert play(env, tokenizer, right)[0].reward == 1
    attempt, _ = play(env, tokenizer, right, cut=True)
    assert (attempt.reward, attempt.finish, attempt.metrics["turns"]) == (0, "length", 1)


def test_the_token_budget_ends_an_attempt(tokenizer):
    env = load_env(TASKS["tools:ToolUse"], tokenizer, {"max_context_tokens": 700})
    attempt, policy = play(env, tokenizer, *["<python>print('x' * 400)</python>"] * 4)
    assert attempt.finish == "length"
    assert len(policy.contexts) < 4
    assert max(map(len, policy.contexts)) <= 700


@pytest.mark.parametrize("task", TASKS.values())
def test_prompts_are_repeatable_split_and_within_the_budget(tokenizer, task):
    env = load_env(task, tokenizer, {})
    train, heldout = (list(islice(env.prompts(split, 0), 40)) for split in ("train", "heldout"))
    assert train == list(islice(load_env(task, tokenizer, {}).prompts("train", 0), 40))
    assert [prompt.id for prompt in train] == list(range(40))
    assert not {prompt.target for prompt in train} & {prompt.target for prompt in heldout}
    assert max(len(prompt.token_ids) for prompt in train + heldout) <= env.max_prompt_tokens
    with pytest.raises(ValueError, match="max_context_tokens is 20: raise it"):
        load_env(task, tokenizer, {"max_context_tokens": 20})


def test_every_shipped_question_on_sql_has_its_answer(tokenizer):
    env = load_env(TASKS["sql:TextToSQL"], tokenizer, {})
    for number, row in enumerate(read_rows(str(SHIPPED / "sql.jsonl"), "train")):
        attempt, _ = play(env, tokenizer, f"<answer>{row['sql']}</answer>", split=row["split"], number=number)
        assert attempt.reward == 1, row["question"]


@pytest.mark.parametrize(
    ("query", "reward"),
    [
        ("SELECT name FROM singer WHERE country = 'Chile' ORDER BY name DESC", 1),
        ("SELECT name FROM singer", 0),
        ("SELECT 'Ana'", 0),
        ("DELETE FROM singer", 0),
    ],
)
def test_sql_is_scored_by_its_rows(tokenizer, query, reward):
    env = load_env(TASKS["sql:TextToSQL"], tokenizer, {})
    assert play(env, tokenizer, f"<answer>{query}</answer>", number=1)[0].reward == reward


@pytest.mark.parametrize("order", ["", " ORDER BY 1"])
def test_sql_compares_numbers_by_their_value(tokenizer, tmp_path, order):
    schema = "CREATE TABLE t(x); INSERT INTO t VALUES (10), (20);"
    row = {"schema": schema, "question": "?", "sql": f"SELECT avg(x) FROM t{order}", "split": "train"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    env = load_env(TASKS["sql:TextToSQL"], tokenizer, {"data": str(tmp_path / "rows.jsonl")})
    assert play(env, tokenizer, "<answer>SELECT 15</answer>")[0].reward == 1


@pytest.mark.parametrize(
    ("right", "reward"),
    [
        ("SELECT x FROM t ORDER  BY x", 0),
        ("select x from t order\n\tby x", 0),
        ("SELECT x FROM (SELECT x FROM t ORDER BY x)", 1),
        ("WITH s AS (SELECT x FROM t ORDER BY x LIMIT 9) SELECT x FROM s", 1),
        ("SELECT x FROM t WHERE 'order by' <> '' -- ORDER BY x", 1),
        ("SELECT sum(x) OVER (ORDER BY x) - sum(x) OVER (ORDER BY x) + x FROM t", 1),
        ("SELECT x FROM t UNION ALL SELECT x FROM t WHERE 0 ORDER BY 1", 0),
    ],
)
def test_order_counts_where_the_outermost_query_sorts(tokenizer, tmp_path, right, reward):
    schema = "CREATE TABLE t(x); INSERT INTO t VALUES (20), (10);"
    row = {"schema": schema, "question": "?", "sql": right, "split": "train"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    env = load_env(TASKS["sql:TextToSQL"], tokenizer, {"data": str(tmp_path / "rows.jsonl")})
    assert play(env, tokenizer, "<answer>SELECT x FROM t ORDER BY x DESC</answer>")[0].reward == reward


@pytest.mark.parametrize(("query", "reward"), [("SELECT x'6162'", 1), ("SELECT '6162'", 0), ("SELECT 'ab'", 0)])
def test_a_blob_is_no_text(tokenizer, tmp_path, query, reward):
    row = {"schema": "CREATE TABLE t(x);", "question": "?", "sql": "SELECT x'6162'", "split": "train"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    env = load_env(TASKS["sql:TextToSQL"], tokenizer, {"data": str(tmp_path / "rows.jsonl")})
    attempt, policy = play(env, tokenizer, f"<sql>{query}</sql>", f"<answer>{query}</answer>")
    assert attempt.reward == reward
    assert ("x'6162'" in heard(policy, 0)) == reward


@pytest.mark.parametrize("language", ["", "py", "Python", "python3", "python title=a.py"])
def test_fences_that_hold_programs(language):
    assert programs_in(f"```text\n1\n```\nso\n```{language}\nprint(1)\n```\nand\n```cpp\nint x;```") == ["print(1)\n"]
    assert programs_in(f"```{language}\nprint(1)") == []


def test_queries_may_be_tried_on_a_database_that_cannot_change(tokenizer):
    env = load_env(TASKS["sql:TextToSQL"], tokenizer, {"max_turns": 5, "time_limit_s": 1.5})
    forever = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
    queries = ["SELECT count(*) FROM singer", "DROP TABLE singer", "ATTACH '/etc/passwd' AS x", forever]
    attempt, policy = play(env, tokenizer, *[f"<sql>{query}</sql>" for query in queries], "<answer>x</answer>")
    assert heard(policy, 0) == "user:[[5]]<eos>assistant:"
    assert "attempt to write a readonly database" in heard(policy, 1)
    assert "error: OperationalError" in heard(policy, 2)
    assert "error: timed out" in heard(policy, 3)
    assert attempt.metrics["bad_calls"] == 3


PROGRAMS = {
    0: "print(sum(map(int, input().split())))",
    4: "class Solution:\n    def countVowels(self, text):\n        return sum(c in 'aeiou' for c in text)",
}


@pytest.mark.parametrize("number", PROGRAMS)
def test_programs_are_run_against_every_test(tokenizer, number):
    env = load_env(TASKS["code:CodeTask"], tokenizer, {})
    right = PROGRAMS[number]
    assert play(env, tokenizer, f"```python\n{right}\n```", number=number)[0].reward == 1
    only_public = "print(3)" if number == 0 else "def countVowels(text): return 2"
    attempt, _ = play(env, tokenizer, f"```python\n{only_public}\n```", number=number)
    assert attempt.reward == 0
    assert attempt.metrics["tests_passed"] == pytest.approx(1 / 3)
    assert play(env, tokenizer, "no program", number=number)[0].metrics["no_program"] == 1


@pytest.mark.parametrize(
    "program",
    [
        "import os\nprint('passed', flush=True)\nos._exit(0)",
        "class All:\n    def __eq__(self, other): return True\ndef countVowels(text): return All()",
        "import json\njson.dumps = lambda value: 'true'\ndef countVowels(text): return 1",
        "def countVowels(text): raise SystemExit(0)",
    ],
)
def test_a_program_cannot_say_that_it_is_right(tokenizer, program):
    """What a test expects stays outside the sandbox: only the very result passes."""
    env = load_env(TASKS["code:CodeTask"], tokenizer, {})
    attempt, _ = play(env, tokenizer, f"```python\n{program}\n```", number=4)
    assert (attempt.reward, attempt.metrics["tests_passed"]) == (0, 0)


def test_a_program_that_fails_a_public_test_may_be_replaced(tokenizer):
    env = load_env(TASKS["code:CodeTask"], tokenizer, {"max_turns": 2})
    attempt, policy = play(env, tokenizer, "```\nprint(4)\n```", f"```python\n{PROGRAMS[0]}\n```")
    assert "Expected:\n3\n\nBut it printed:\n4" in heard(policy, 0)
    assert attempt.reward == 1


@pytest.mark.parametrize(
    ("printed", "expected", "functional", "same"),
    [
        ("1 2 \n", "1 2", False, True),
        ("1.50", "1.5", False, True),
        ("5000000000000000000", "5000000000000000001", False, False),
        ("1\n2", "1 2", False, False),
        ("", "0", False, False),
        ("debug\n[1, 2]", "[1,2]", True, True),
        ("12", "[1,2]", True, False),
        ("nothing", "1", True, False),
        ("9" * 5000, "1", True, False),
        ("[" * 60000, "1", True, False),
        ("[" * 60000 + "]" * 60000, "1", True, False),
        ("1e" + "9" * 30, "1", False, False),
        ("sNaN", "nan", False, False),
    ],
)
def test_outputs_are_compared_as_the_benchmark_does(printed, expected, functional, same):
    assert matches(printed, UnitTest("", expected, functional)) == same


LONG = "for number in range(20000): print(number)"
SHORT_NAMES = (
    "depth = lambda n: n and 1 + depth(n - 1)\n"
    "print(len(deque([gcd(4, 6)])), heappop([2]), depth(3000), sorted(accumulate([1, 2])), pow(2, 3, 5))\n"
    "print(bisect.bisect([1], 1), copy.copy(1), random.Random, date.min)"
)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (LONG, "\n".join(map(str, range(20000)))),
        (SHORT_NAMES, "1 2 3000 [1, 3] 3\n1 1 <class 'random.Random'> 0001-01-01"),
    ],
    ids=["long output", "short names"],
)
def test_programs_may_print_and_call_what_the_benchmark_lets_them(tokenizer, tmp_path, program, expected):
    case = json.dumps([{"input": "", "output": expected, "testtype": "stdin"}])
    row = {"question_content": "?", "public_test_cases": case, "split": "train"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    env = load_env(TASKS["code:CodeTask"], tokenizer, {"data": str(tmp_path / "rows.jsonl")})
    assert play(env, tokenizer, f"```python\n{program}\n```")[0].reward == 1


def test_packed_private_tests_are_read_and_cannot_run_anything():
    cases = json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(cases))).decode()
    assert read_tests(packed) == read_tests(cases) == [UnitTest("1", "2", False)]
    harmful = base64.b64encode(zlib.compress(pickle.dumps(asyncio.run))).decode()
    with pytest.raises(ValueError, match="the tests name asyncio"):
        read_tests(harmful)


EDIT = '<edit path="stats.py"><old>{}</old><new>    return sum(values) / len(values) if values else 0.0</new></edit>'


def test_a_repository_is_repaired_in_turns(tokenizer):
    env = load_env(TASKS["swe:RepairTask"], tokenizer, {})
    replies = ["<test></test>", "<view>stats.py</view>", EDIT.format("    return sum(values) / len(values)")]
    attempt, policy = play(env, tokenizer, *replies, "<test></test>", "<done></done>")
    assert "ZeroDivisionError" in heard(policy, 0)
    assert "def mean(values):" in heard(policy, 1)
    assert "edited stats.py" in heard(policy, 2)
    assert "passed 1" in heard(policy, 3)
    assert attempt.reward == 1
    assert attempt.metrics == {"turns": 5, "out_of_turns": 0, "edits": 1, "test_runs": 2, "bad_calls": 0}


def test_changing_the_tests_repairs_nothing(tokenizer):
    env = load_env(TASKS["swe:RepairTask"], tokenizer, {})
    cheat = '<edit path="test_stats.py"><old>self.assertEqual(mean([]), 0.0)</old><new>pass</new></edit>'
    attempt, policy = play(env, tokenizer, cheat, "<test></test>", EDIT.format("nowhere"), "<done></done>")
    assert "passed 1" in heard(policy, 1)
    assert "must occur once in stats.py, it occurs 0 times" in heard(policy, 2)
    assert attempt.reward == 0


FORGERIES = {
    "skips": "import unittest\ndef mean(values): raise unittest.SkipTest",
    "skips the file": "import unittest\nraise unittest.SkipTest",
    "prints a result": "def mean(values):\n    import os\n    print('passed 1', flush=True)\n    os._exit(0)",
    "exits": "raise SystemExit(0)",
    "exits in a test": "def mean(values): raise SystemExit(0)",
    "interrupts": "def mean(values): raise KeyboardInterrupt",
    "equals all": "class All:\n    def __eq__(self, other): return True\ndef mean(values): return All()",
    "equals all numbers": (
        "class All(float):\n    def __eq__(self, other): return isinstance(other, float | int)\n"
        "def mean(values): return All()"
    ),
    "is ANY": "from unittest import mock\ndef mean(values): return mock.ANY",
    "asserts nothing": ("import unittest\nunittest.TestCase.assertEqual = lambda *_: None\ndef mean(values): return 7"),
    "asserts nothing later": (
        "def mean(values):\n    import unittest\n    unittest.TestCase.assertEqual = lambda *_: None\n"
    ),
    "another run": (
        "import unittest\ndef run(self, result): result.addSuccess(self)\nunittest.TestCase.run = run\nmean = 1"
    ),
    "another test": (
        "import sys\ndef mean(values):\n    for module in list(sys.modules.values()):\n"
        "        if hasattr(module, 'Test'): module.Test.test = lambda self: None\n    return 7"
    ),
    "reads the key": "import sys\nprint(sys.stdin.read(), 'passed 1')\nmean = 1",
    "loads no tests": (
        "import unittest as u\nu.defaultTestLoader.loadTestsFromModule = lambda _: u.TestSuite()\nmean = 1"
    ),
    "equals all by another object": (
        "class Yes:\n    def __call__(self, *_): return True\nclass All: __eq__ = Yes()\ndef mean(values): return All()"
    ),
}
HONEST = "def mean(values):\n    return sum(values) / len(values) if values else 0.0\n"
TEST = read_rows(str(SHIPPED / "swe.jsonl"), "train")[0]["tests"]["test_stats.py"]


def repaired(files, tests):
    return run(_RepairEpisode(Sandbox(), files, tests).score())


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_result_earns_nothing(forgery):
    assert repaired({"stats.py": FORGERIES[forgery]}, {"test_stats.py": TEST}) == 0


ASSERTS = "from stats import mean\nimport unittest\nclass Test(unittest.TestCase):\n    def test(self):\n        "


@pytest.mark.parametrize(
    "line", ["assert mean([]) == 0", "self.assertTrue(mean([]) == 0)", "self.assertIn(mean([]), [0])"]
)
def test_what_equals_all_is_no_right_answer_however_it_is_compared(line):
    tests = {"test_stats.py": ASSERTS + line}
    assert repaired({"stats.py": HONEST}, tests) == 1
    assert repaired({"stats.py": FORGERIES["equals all"]}, tests) == 0


@pytest.mark.parametrize(
    "files",
    [
        {"main.py": "raise SystemExit('the program of the repository')"},
        {"json.py": "", "ast.py": "", "traceback.py": ""},
        {"conftest.py": "", "setup.py": "raise SystemExit"},
    ],
)
def test_an_honest_repair_passes_whatever_else_the_repository_has(files):
    assert repaired({"stats.py": HONEST, **files}, {"test_stats.py": TEST}) == 1


def test_tests_in_folders_without_init_run():
    helper = "WANTED = 1.5\n"
    test = (
        "import unittest\nfrom unittest import mock\nfrom stats import mean\nfrom helper import WANTED\n"
        "class Point:\n    def __eq__(self, other): return self.x == other.x\n    x = 1\n"
        "class Test(unittest.TestCase):\n"
        "    def test(self): self.assertEqual([mean([1, 2]), 3], [WANTED, mock.ANY])\n"
        "    def test_points(self): self.assertEqual(Point(), Point())\n"
        "    @unittest.skip('not now')\n    def test_later(self): pass\n"
    )
    relative = test.replace("from helper", "from .helper")
    files = {"stats.py": HONEST, "tests/unit/helper.py": helper}
    for tests in ({"tests/unit/test_a.py": test}, {"tests/unit/test_a.py": relative, "test_b.py": TEST}):
        assert repaired(files, tests) == 1
        assert repaired({**files, "stats.py": "def mean(values): return 2"}, tests) == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("\n<old> a</old>\n\n<new> b</new>\n", "edited f.py"),
        ("<old> a</old><new><old> b</old><new></new>", "edited f.py"),
        ("<old>a</old> <new></new>", "edited f.py"),
        ("<old>x</old><new>y</new>", "occurs 0 times"),
        ("<old></old><new>y</new>", "occurs"),
        ("<old>a</old>and<new>y</new>", "an edit needs"),
        ("<old>a</old>", "an edit needs"),
        ("<old>a</new>", "an edit needs"),
        ("<new>a</new>", "an edit needs"),
        ("", "an edit needs"),
    ],
)
def test_what_an_edit_is(change, told):
    episode = _RepairEpisode(None, {"f.py": " a"}, {})
    assert told in run(episode.respond(f'so <edit path="f.py">{change}</edit>'))


class Guess:
    """As SkyRL-Gym has them: guess a number, told whether to go up or down."""

    opened = closed = 0

    def __init__(self, env_config, extras):
        Guess.opened += 1
        self.right, self.hint = int(extras["reward_spec"]["ground_truth"]), env_config["hint"]

    def init(self, prompt):
        return [*prompt, {"role": "user", "content": self.hint}], {}

    def step(self, action):
        done = int(action) == self.right
        word = "up" if int(action) < self.right else "down"
        observations = [] if done else [{"role": "user", "content": word}]
        return {"observations": observations, "reward": 1.0 if done else -0.25, "done": done, "metadata": {}}

    def close(self):
        Guess.closed += 1


def test_a_class_of_skyrl_gym_is_played_unchanged(tokenizer, tmp_path):
    row = {"prompt": [{"role": "user", "content": "guess"}], "reward_spec": {"ground_truth": "5"}, "split": "train"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    args = {"env": "test_multi_turn:Guess", "data": str(tmp_path / "rows.jsonl"), "env_config": {"hint": "1 to 9"}}
    env = load_env("asyncrl.envs.gym:GymEnv", tokenizer, args)
    assert Guess.closed == Guess.opened == 1, "for its prompt"
    attempt, policy = play(env, tokenizer, "2", "8", "5")
    assert tokenizer.decode(policy.contexts[0]) == "user:guess<eos>user:1 to 9<eos>assistant:"
    assert [heard(policy, turn) for turn in (0, 1)] == ["user:up<eos>assistant:", "user:down<eos>assistant:"]
    assert attempt.reward == 0.5
    assert Guess.closed == Guess.opened == 2
    with pytest.raises(ValueError, match="has no 'Gess'"):
        load_env("asyncrl.envs.gym:GymEnv", tokenizer, {**args, "env": "test_multi_turn:Gess"})


@pytest.mark.parametrize(
    ("text", "value"), [("2 * (3 + 4)", "14"), ("-7 // 2", "-4"), ("10 / 4", "2.5"), ("2**10 % 1000", "24")]
)
def test_the_calculator_computes(text, value):
    assert run(calculator(text)) == value


@pytest.mark.parametrize(
    "text",
    ["", "1 +", "1 / 0", "__import__('os')", "x", "True", "'a' * 3", "9**9**9", "1e999", "(-8) ** 0.5", "(" * 400],
)
def test_the_calculator_refuses_all_else(text):
    with pytest.raises(ToolError):
        run(calculator(text))


def test_answers_are_equal_as_numbers_or_as_texts():
    assert same_answer("1,234.0", "1234")
    assert same_answer(" Paris", "Paris")
    assert not same_answer("", "0")


def test_special_tokens_of_the_models_own_reach_scorers_and_ends_do_not(tmp_path):
    build_tiny(tmp_path / "model", name=TINY_BYTES, seed=0)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    chat = ChatFormat(tokenizer, "chat")
    ids = tokenizer.encode("<think>a</think>b", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert chat.text_of([*ids, tokenizer.eos_token_id]) == "<think>a</think>b"
    seen = []

    def reward(completions, **_columns):
        seen.extend(completions)
        return [1.0]

    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(40)))
    env = DatasetEnv(tokenizer, str(tmp_path / "d.jsonl"), reward, style="plain")
    run(env.play(next(env.prompts("train", 0)), Script(tokenizer, "<think>a</think>b")))
    assert seen == ["<think>a</think>b"]
