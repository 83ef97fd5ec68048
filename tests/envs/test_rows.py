"""Rows for the environments of several turns: what cannot be used, or cannot be solved, is refused by name."""

import json
from itertools import islice

import pytest
from helpers import TextTokenizer

from asyncrl.config.schema import TINY_BYTES
from asyncrl.envs.base import load_env
from asyncrl.models.loading import load_tokenizer
from asyncrl.models.tiny import build_tiny

TASKS = {name: f"asyncrl.envs.{name}" for name in ("tools:ToolUse", "sql:TextToSQL", "code:CodeTask", "swe:RepairTask")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tiny(folder, name=TINY_BYTES, seed=0)
    return load_tokenizer(folder)


TEST = {"input": "1", "output": "2", "testtype": "functional"}


def code_row(tests, **columns):
    return {"question_content": "?", "public_test_cases": json.dumps(tests), **columns}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("tools:ToolUse", {"question": "?", "answer": None}, "has nothing in the column 'answer'"),
        ("tools:ToolUse", {"question": "?", "answer": "1", "split": "dev"}, "has the split 'dev': write 'train' or"),
        (
            "sql:TextToSQL",
            {"schema": "create table t (x)", "question": "?", "sql": "select y from t"},
            "no such column: y",
        ),
        ("sql:TextToSQL", {"schema": "create tab", "question": "?", "sql": "select 1"}, "schema does not run"),
        ("code:CodeTask", code_row([TEST]), "metadata has no func_name"),
        ("code:CodeTask", code_row([TEST], metadata="[]"), "metadata is no JSON object"),
        (
            "code:CodeTask",
            code_row([TEST | {"output": "{"}], metadata='{"func_name": "f"}'),
            "which is JSON for a function",
        ),
        ("code:CodeTask", code_row([{"input": "1"}]), "a test needs input and output"),
        ("code:CodeTask", code_row([]), "a row has no tests"),
        (
            "swe:RepairTask",
            {"issue": "?", "files": {"../a.py": ""}, "tests": {"test_a.py": "x"}},
            "paths inside the repo",
        ),
        ("swe:RepairTask", {"issue": "?", "files": {"a.py": 3}, "tests": {"test_a.py": "x"}}, "files are texts"),
        ("swe:RepairTask", {"issue": "?", "files": {"a.py": ""}, "tests": {"a_test.py": "x"}}, "named test_"),
    ],
)
def test_a_row_that_nobody_could_solve_is_refused(tokenizer, tmp_path, task, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        load_env(TASKS[task], tokenizer, {"data": str(path)})


def test_held_out_rows_come_once(tokenizer, tmp_path):
    rows = [{"question": f"{n}?", "answer": str(n), "split": "train" if n else "heldout"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"answer": "9"}])))
    env = load_env(TASKS["tools:ToolUse"], tokenizer, {"data": str(tmp_path / "rows.jsonl")})
    assert sorted(prompt.target for prompt in env.prompts("heldout", 0)) == ["0", "3"]
    assert sorted(prompt.target for prompt in islice(env.prompts("train", 0), 4)) == ["1", "1", "2", "2"]


def test_turns_need_a_chat_template():
    bare = TextTokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template, which .* environments of several turns need"):
        load_env(TASKS["tools:ToolUse"], bare, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("{", "line 1 is no JSON"),
        ("[1]", "a row is an object with columns"),
        ('{"question": "?"}', r"row 0 of .*jsonl: a row lacks the column 'answer'; it has question: rename"),
    ],
)
def test_bad_data_is_refused_by_name(tokenizer, tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_env(TASKS["tools:ToolUse"], tokenizer, {"data": str(path)})
