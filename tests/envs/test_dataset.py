"""Any data set as an environment: files and columns, reward functions in TRL's signature, and everything that can be
wrong with either: an error that says what to do, or a counted skip."""

import asyncio
import itertools
import json
import time
import warnings
from collections import Counter
from datetime import datetime

import pyarrow
import pytest
from helpers import TextTokenizer, attempt
from pyarrow import parquet

from asyncrl.envs.base import load_env
from asyncrl.envs.data import read_rows
from asyncrl.envs.dataset import DatasetEnv, _dumped

ROWS = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "level": n % 3} for n in range(60)]


def length_reward(completions, **_kwargs):
    return [len(completion) / 10 for completion in completions]


def level_reward(prompts, completions, answer, level, **kwargs):
    assert len(prompts) == len(completions) == len(kwargs["completion_ids"]) == 1
    return [float(text == right) * (1 + stars) for text, right, stars in zip(completions, answer, level, strict=True)]


async def slow_reward(completions, **_kwargs):
    await asyncio.sleep(30)
    return [0.0] * len(completions)


def blocking_reward(completions, **_kwargs):
    time.sleep(0.5)
    return [0.0] * len(completions)


def impatient_reward(**_kwargs):
    raise TimeoutError("a judge of its own")


async def async_impatient_reward(**kwargs):
    impatient_reward(**kwargs)


def halving_reward(completions, **_kwargs):
    return [0.5] * len(completions)


halving_reward.pass_reward = 0.5


def last_role_reward(prompts, completions, **_kwargs):
    return [
        float(p[-1]["role"] == "user" and c[0] == {"role": "assistant", "content": "yes"})
        for p, c in zip(prompts, completions, strict=True)
    ]


def make(path, rows=ROWS, tokenizer=None, **args):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"source": str(path), "prompt": "question", "reward": "test_dataset:level_reward"}
    return load_env("asyncrl.envs.dataset:DatasetEnv", tokenizer or TextTokenizer(), settings | args)


def test_an_epoch_has_every_training_row_once_and_no_heldout_row(tmp_path):
    env = make(tmp_path / "data.jsonl")
    heldout = list(env.prompts("heldout", 0))
    size = len(ROWS) - len(heldout)
    two_epochs = list(itertools.islice(env.prompts("train", 0), 2 * size))
    assert 0 < len(heldout) < 20
    assert [prompt.id for prompt in two_epochs] == list(range(2 * size))
    first, second = ([p.token_ids for p in two_epochs[part]] for part in (slice(size), slice(size, None)))
    assert first != second
    assert sorted(first) == sorted(second)
    assert not set(first) & {prompt.token_ids for prompt in heldout}
    assert len(set(first)) == size
    again = make(tmp_path / "data.jsonl")
    assert list(itertools.islice(again.prompts("train", 0), 2 * size)) == two_epochs


def test_parquet_folders_and_named_splits(tmp_path):
    for split, rows in (("train", ROWS[:50]), ("dev", ROWS[50:])):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    env = DatasetEnv(TextTokenizer(), str(tmp_path), level_reward, prompt="question", target="answer", heldout="dev")
    assert len(list(env.prompts("heldout", 0))) == 10
    assert len({p.token_ids for p in itertools.islice(env.prompts("train", 0), 50)}) == 50


def test_reward_functions_see_prompt_completion_and_columns(tmp_path):
    env = make(tmp_path / "data.jsonl")
    for prompt in itertools.islice(env.prompts("train", 0), 20):
        number = int(TextTokenizer().decode(prompt.token_ids).split()[2])
        assert attempt(env, prompt, str(number + 1)).reward == 1 + number % 3
        assert attempt(env, prompt, str(number)).reward == 0


def test_a_column_may_name_the_source_of_prompts(tmp_path):
    env = make(tmp_path / "data.jsonl", source_column="level")
    for prompt in itertools.islice(env.prompts("train", 0), 30):
        assert prompt.source == str(json.loads(prompt.target)["columns"]["level"])
    with pytest.raises(ValueError, match="has no column 'grade'"):
        next(make(tmp_path / "data.jsonl", source_column="grade").prompts("train", 0))


@pytest.mark.parametrize(
    ("args", "mark"),
    [
        ({}, None),
        ({"reward": "asyncrl.envs.rewards:exact_match"}, 1.0),
        ({"reward": "test_dataset:halving_reward", "weights": [3.0]}, 1.5),
        ({"reward": ["test_dataset:halving_reward", "test_dataset:length_reward"]}, None),
    ],
)
def test_the_reward_function_says_which_replies_pass(tmp_path, args, mark):
    assert make(tmp_path / "rows.jsonl", **args).pass_reward == mark


def test_several_reward_functions_are_weighted_and_reported(tmp_path):
    both = ["test_dataset:level_reward", "test_dataset:length_reward"]
    env = make(tmp_path / "data.jsonl", reward=both, weights=[1.0, 0.5])
    played = attempt(env, next(env.prompts("train", 0)), "wrong")
    assert played.reward == pytest.approx(0.25)
    assert played.metrics == {"level_reward": 0.0, "length_reward": 0.5}


def same_name(**_kwargs):
    return [0.25]


def reward(**_kwargs):
    return [0.5]


def test_reward_functions_of_one_name_or_of_a_name_of_the_run_are_told_apart(tmp_path):
    given = ["test_dataset:same_name", "test_dataset:reward", lambda **_kwargs: [1.0]]
    given[2].__name__, given[2].__module__ = "same_name", "another"
    played = attempt(env := make(tmp_path / "data.jsonl", reward=given), next(env.prompts("train", 0)), "x")
    assert played.metrics == {"test_dataset.same_name": 0.25, "test_dataset.reward": 0.5, "another.same_name": 1.0}
    with pytest.raises(ValueError, match=r"names 'test_dataset\.same_name' more than once: name it once"):
        make(tmp_path / "data.jsonl", reward=["test_dataset:same_name"] * 2)


def test_all_of_the_weights_together_are_a_whole_reward(tmp_path):
    def full(**_kwargs):
        return [1.0]

    given, weights = [full, reward, same_name], [0.7, 0.4, 0.4]  # of 1, 0.5 and 0.25
    env = make(tmp_path / "data.jsonl", reward=given, weights=weights)
    assert attempt(env, next(env.prompts("train", 0)), "x").reward == 1.0, "0.7 + 0.2 + 0.1 is below 1"


def test_conversations_reach_the_template_and_the_reward(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
    rows = [{"prompt": messages, "number": n} for n in range(30)]
    env = make(tmp_path / "d.jsonl", rows, prompt="prompt", reward="test_dataset:last_role_reward", heldout="")
    prompt = next(itertools.chain(env.prompts("train", 0)))
    assert TextTokenizer().decode(prompt.token_ids) == "<system>Be brief.<user>Is it?<assistant>"
    assert attempt(env, prompt, "yes").reward == 1.0
    assert attempt(env, prompt, "no").reward == 0.0


def test_the_no_skill_score_is_that_of_the_most_frequent_target(tmp_path):
    rows = [{"question": f"{n}?", "answer": "b" if n % 4 else "a"} for n in range(400)]
    env = make(tmp_path / "d.jsonl", rows, reward="asyncrl.envs.rewards:exact_match", target="answer")
    heldout = list(env.prompts("heldout", 0))
    share = sum(json.loads(prompt.target)["columns"]["answer"] == "b" for prompt in heldout) / len(heldout)
    assert env.baselines(heldout) == {"always 'b'": share}


def test_the_reply_without_skill_is_one_with_tokens_and_what_fails_on_it_is_told_so(tmp_path):
    def ends(completions, completion_ids, **_kwargs):
        if completions[0] == "error":
            raise KeyError("judge")
        return [float(completion_ids[0] == [*map(ord, completions[0]), 0])]

    for answer in ("yes", "error"):
        rows = [{"question": f"{n}?", "answer": answer} for n in range(100)]
        env = make(tmp_path / "d.jsonl", rows, reward=ends, target="answer")
        heldout = list(env.prompts("heldout", 0))
        if answer == "yes":
            assert env.baselines(heldout) == {"always 'yes'": 1.0}
            continue
        with pytest.raises(ValueError, match=r"the score without skill \(always 'error'\): reward function 'ends'"):
            env.baselines(heldout)


@pytest.mark.parametrize(("bad", "tries"), [(1, 1), (1, 3), (30, 3)])
def test_the_score_without_skill_outlasts_a_scorer_that_fails_now_and_then(tmp_path, bad, tries):
    """One that fails on a few prompts: at first (1 try), whenever it is called (3), on too many prompts."""
    calls = Counter()

    def flaky(prompts, **_kwargs):
        calls[prompts[0]] += 1
        if prompts[0] in failing and calls[prompts[0]] <= tries:
            raise ConnectionError("the judge is busy")
        return [0.5]

    env = make(tmp_path / "d.jsonl", [{"question": f"{n}?"} for n in range(400)], reward=flaky)
    heldout = list(env.prompts("heldout", 0))
    failing = {json.loads(prompt.target)["prompt"] for prompt in heldout[:bad]}
    if bad > 1:
        with pytest.raises(ValueError, match=r"without skill .*ConnectionError.*eval\.baseline=false"):
            env.baselines(heldout)
        assert calls.total() <= 3 * 10, "a scorer that never answers is not asked for every prompt"
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert env.baselines(heldout) == {"empty reply": 0.5}
    assert [f"leaves out 1 of {len(heldout)} prompts" in str(one.message) for one in told] == [True] * (tries // 3)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train", "heldout", None], None),
        (["main"], None),
        (
            ["train", "test"],
            "rows have the split 'test', others 'train' or 'heldout': write one of these two",
        ),
        (
            ["train"],
            "has no rows for 'heldout': a hash .*, unless a row has a 'split', and of 60 it took none",
        ),
    ],
)
def test_a_split_that_rows_name_wins_over_the_hash(tmp_path, splits, message):
    rows = [row | {"split": splits[n % len(splits)]} for n, row in enumerate(ROWS)]
    env = make(tmp_path / "d.jsonl", rows)
    if message:
        with pytest.raises(ValueError, match=message):
            next(env.prompts("heldout", 0))
        return
    drawn = {split: list(itertools.islice(env.prompts(split, 0), 60)) for split in ("train", "heldout")}
    named = {split: {json.loads(p.target)["columns"]["split"] for p in found} for split, found in drawn.items()}
    assert named == {split: {split, None} if "heldout" in splits else set(splits) for split in drawn}


def test_what_a_row_lacks_is_none_and_times_are_text(tmp_path):
    def seen(level, **_kwargs):
        return [float(level[0] is None)]

    rows = [{"question": f"{n}?", "answer": "a"} | ({"level": 1} if n % 2 else {}) for n in range(60)]
    env = make(tmp_path / "d.jsonl", rows, reward=seen)
    played = [attempt(env, prompt, "").reward for prompt in itertools.islice(env.prompts("train", 0), 40)]
    assert 0 < sum(played) < 40
    table = pyarrow.table({"prompt": ["a"], "at": [datetime(2026, 1, 2, 3)], "raw": [b"x"]})
    parquet.write_table(table.drop_columns("raw"), tmp_path / "times.parquet")
    (row,) = read_rows(str(tmp_path / "times.parquet"), "train")
    assert json.loads(_dumped({"columns": row}, "d"))["columns"]["at"] == "2026-01-02T03:00:00"
    parquet.write_table(table, tmp_path / "bytes.parquet")
    with pytest.raises(ValueError, match=r"bytes.parquet: column 'raw' holds bytes, .*: remove the column"):
        next(DatasetEnv(TextTokenizer(), str(tmp_path / "bytes.parquet"), seen).prompts("train", 0))


def test_plain_prompts_begin_as_texts_do_and_replies_end_where_the_next_question_begins(tmp_path):
    class Base(TextTokenizer):
        chat_template = None

        def encode(self, text, *, add_special_tokens=True):
            return [1] * add_special_tokens + super().encode(text)

    env = make(tmp_path / "d.jsonl", [row | {"answer": "4"} for row in ROWS], tokenizer=Base(), target="answer")
    prompt = next(env.prompts("train", 0))
    assert prompt.token_ids[:10] == (1, *map(ord, "Question:"))
    env = make(tmp_path / "d.jsonl", tokenizer=Base(), reward=lambda completions, **_: [completions[0] == " 4"])
    assert attempt(env, prompt, " 4\n\nQuestion: 5? Answer: 7").reward == 1.0


@pytest.mark.parametrize(("given", "text"), [(42, "42"), (42.0, "42"), (0.5, "0.5"), ("1.0", "1.0"), ([1], [1])])
def test_a_target_that_is_a_number_is_text_and_its_column_stays(tmp_path, given, text):
    def seen(target, answer):
        return [float((target, answer) == ([text], [given]))]

    rows = [{"question": f"{n}?", "answer": given} for n in range(9)]
    env = make(tmp_path / "d.jsonl", rows, reward=seen, target="answer")
    assert attempt(env, next(env.prompts("train", 0)), "").reward == 1.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"prompt": "text"}, "has no column 'text': name one that it has, which are answer, level, question"),
        ({"target": "solution"}, "has no column 'solution'"),
        ({"reward": "test_dataset:nothing"}, r"env\.args\.reward 'test_dataset:nothing'.*has no 'nothing'"),
        ({"reward": "math:pi"}, r"env\.args\.reward 'math:pi' is 3\.14.*name a function"),
        ({"reward": "nowhere:f"}, r"env\.args\.reward 'nowhere:f': no module 'nowhere'"),
        ({"weights": [1, 2]}, "weights has 2 entries for 1 reward function"),
        ({"max_prompt_tokens": 20}, r"prompt longer than 20 tokens: it has \d+ tokens: raise env.args.max_prompt_tok"),
        ({"heldout": "test"}, "is one file, which has no split 'test'"),
        ({"source": "nowhere.csv"}, r"there is no file 'nowhere.csv', seen from .*\.jsonl and \.parquet are read"),
        ({"source": __file__}, r"from \.jsonl .* and \.parquet files, got .*test_dataset\.py': convert it$"),
        ({"source": "nowhere.jsonl"}, "there is no data file 'nowhere.jsonl'"),
        (
            {"source": "data/nowhere"},
            "there is no folder 'data/nowhere', seen from .*launch/prepare_gsm8k.py`, or name",
        ),
        ({"num_shots": 2}, "worked examples need the column named by reply"),
        ({"colour": "blue"}, "env.args does not fit.*unexpected keyword argument 'colour'; it takes source, reward"),
    ],
)
def test_a_mistake_in_the_settings_is_named(tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        list(itertools.islice(make(tmp_path / "data.jsonl", **args).prompts("train", 0), 1))


def test_data_of_another_kind_are_told_how_to_convert_them(tmp_path):
    (tmp_path / "d.csv").write_text("question,answer\n1,2\n")
    with pytest.raises(ValueError, match=r"from \.jsonl .* and \.parquet files, .*from_csv\('.*d.csv'\)\.to_json"):
        next(DatasetEnv(TextTokenizer(), str(tmp_path / "d.csv"), level_reward).prompts("train", 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows in split 'train'"),
        ('{"question": "a"}\nbroken\n', "line 2 is no JSON"),
        ("[1, 2]\n", "line 1: a row is an object with columns"),
        (
            '{"question": null}\n{"question": "a"}\n',
            "row 0: unusable row: nothing in column 'question'; or set",
        ),
        (
            '{"question": "a"}\n{"quesiton": "b", "answer": 1}\n',
            "row 1: unusable row: nothing in column 'question', only in answer, quesiton; or set",
        ),
        (
            '{"question": 4}\n',
            "row 0: unusable row: 4 in column 'question', where a text or a list of messages belongs",
        ),
        ('{"question": []}\n', "row 0: unusable row: .* where a text or a list of messages belongs"),
        (
            '{"question": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}\n'
            '{"question": [{"role": "user", "text": "a"}]}\n',
            "row 1: unusable row: message 0 of column 'question' is .*: a message has a role and a content, as in",
        ),
        ('{"question": ["a"]}\n', "row 0: unusable row: message 0 of column 'question' is 'a': a message has"),
    ],
)
def test_a_mistake_in_the_data_is_named(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    env = DatasetEnv(TextTokenizer(), str(path), level_reward, prompt="question")
    with pytest.raises(ValueError, match=message):
        next(env.prompts("train", 0))


def test_a_folder_without_the_split_says_what_it_holds(tmp_path):
    (tmp_path / "dev.jsonl").write_text("{}\n")
    env = DatasetEnv(TextTokenizer(), str(tmp_path), level_reward)
    with pytest.raises(ValueError, match=r"no train\.jsonl or train\.parquet in the folder.*holds dev\.jsonl"):
        next(env.prompts("train", 0))


def test_bad_rows_are_skipped_and_counted_where_asked_for(tmp_path):
    rows = [*ROWS, {"question": "x" * 100}, {"question": [{"content": "z"}]}, {"question": "y" * 100}]
    env = make(tmp_path / "data.jsonl", rows, bad_rows="skip", max_prompt_tokens=50, style="raw")
    drawn = {p.token_ids for p in itertools.islice(env.prompts("train", 0), 200)}
    drawn |= {p.token_ids for p in env.prompts("heldout", 0)}
    assert len(drawn) == len(ROWS)
    assert env.skipped == {"prompt longer than 50 tokens": 2, "unusable row": 1}


def test_skipping_everything_is_an_error(tmp_path):
    env = make(tmp_path / "data.jsonl", bad_rows="skip", max_prompt_tokens=5)
    with pytest.raises(ValueError, match=r"no rows for 'train'.*longer than 5 tokens"):
        next(env.prompts("train", 0))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([float("nan")], "finite number.*got nan"),
        ([float("inf")], "finite number.*got inf"),
        (["high"], "finite number.*got 'high'"),
        ([1.0, 2.0], r"got \[1\.0, 2\.0\] for 1 completion$"),
        (3.0, r"got 3\.0$"),
    ],
)
def test_a_reward_that_is_no_finite_number_is_refused(tmp_path, returned, message):
    def broken(**_kwargs):
        return returned

    env = make(tmp_path / "data.jsonl", reward=broken)
    with pytest.raises(ValueError, match=message):
        attempt(env, next(env.prompts("train", 0)), "1")


def test_a_function_gets_the_arguments_that_it_names(tmp_path):
    def plain(completions, answer):
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    env = make(tmp_path / "data.jsonl", reward=plain)
    prompt = next(env.prompts("train", 0))
    right = json.loads(prompt.target)["columns"]["answer"]
    assert attempt(env, prompt, right).reward == 1.0
    missing = make(tmp_path / "data.jsonl", reward="asyncrl.envs.rewards:exact_match")
    with pytest.raises(
        ValueError, match=r"'exact_match' takes 'target', which is no column of the data.*env\.args\.target"
    ):
        attempt(missing, prompt, right)


@pytest.mark.parametrize("name", ["slow_reward", "blocking_reward"])
def test_a_reward_function_that_takes_too_long_is_named(tmp_path, name):
    env = make(tmp_path / "data.jsonl", reward=f"test_dataset:{name}", timeout_s=0.05)
    with pytest.raises(TimeoutError, match=rf"'{name}' took longer than 0\.05 s"):
        attempt(env, next(env.prompts("train", 0)), "1")


@pytest.mark.parametrize("name", ["impatient_reward", "async_impatient_reward"])
def test_a_timeout_that_a_reward_function_raises_is_told_as_its_own(tmp_path, name):
    env = make(tmp_path / "data.jsonl", reward=f"test_dataset:{name}")
    with pytest.raises(ValueError, match=rf"'{name}' raised TimeoutError\('a judge.*, \S*test_dataset\.py line \d+"):
        attempt(env, next(env.prompts("train", 0)), "1")


class PickyTokenizer(TextTokenizer):
    """Its template writes all fields out, and refuses a word."""

    def apply_chat_template(self, conversation, *, add_generation_prompt, tokenize, **options):
        assert not tokenize
        if "unsayable" in str(conversation):
            raise RuntimeError("the template refuses it")
        opened = "".join(f"<{message}>" for message in conversation)
        return f"{opened}{sorted(options.items())}{'<assistant>' if add_generation_prompt else ''}"


def test_the_same_conversations_are_the_same_prompts_from_any_file(tmp_path):
    """Parquet gives every message the fields of all, and an order of its own."""
    call = {"id": "1", "function": {"name": "add"}}
    talks = [
        [
            {"role": "user", "content": f"question {n}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3", "name": "add"},
            {"role": "user", "content": "so?"},
        ]
        for n in range(40)
    ]
    rows = [{"prompt": talk} for talk in talks]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [
        [
            {"content": [{"type": "text", "text": m["content"]}]}
            | {"role": m["role"]}
            | {k: v for k, v in m.items() if k not in ("role", "content")}
            for m in talk
        ]
        for talk in talks
    ]
    (tmp_path / "parts.jsonl").write_text("\n".join(json.dumps({"prompt": talk}) for talk in parts))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    envs = [
        DatasetEnv(PickyTokenizer(), str(tmp_path / name), length_reward, max_prompt_tokens=2000)
        for name in ("a.jsonl", "b.parquet", "parts.jsonl")
    ]
    first, *others = [
        [list(itertools.islice(env.prompts(split, 0), 20)) for split in ("train", "heldout")] for env in envs
    ]
    assert all(first == other for other in others)
    assert "None" not in envs[1]._tokenizer.decode(first[0][0].token_ids)


def test_arguments_reach_the_template_and_a_begun_reply_goes_on(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "It"}]} for n in range(40)
    ]
    env = make(
        tmp_path / "a.jsonl",
        rows,
        PickyTokenizer(),
        prompt="prompt",
        reward=length_reward,
        template_args={"enable_thinking": False},
    )
    text = env._tokenizer.decode(next(env.prompts("train", 0)).token_ids)
    assert text.endswith("[('continue_final_message', True), ('enable_thinking', False)]")


def test_worked_examples_keep_a_question_that_is_a_conversation(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}], "reply": "yes"} for n in range(40)]
    env = make(tmp_path / "a.jsonl", rows, prompt="prompt", reward=length_reward, reply="reply", num_shots=1)
    text = env._tokenizer.decode(next(env.prompts("train", 0)).token_ids)
    assert text.startswith("<user>0?<assistant>yes<user>")


def test_rows_that_the_template_refuses_are_bad_rows(tmp_path):
    rows = [{"prompt": "unsayable" if n == 7 else f"{n}?", "split": "train" if n else "heldout"} for n in range(20)]
    settings = {"prompt": "prompt", "reward": length_reward, "style": "chat"}
    env = make(tmp_path / "a.jsonl", rows, PickyTokenizer(), **settings)
    with pytest.raises(ValueError, match=r"row 7: .*the prompt 'unsayable': RuntimeError: the template refuses it"):
        next(env.prompts("train", 0))
    env = make(tmp_path / "a.jsonl", rows, PickyTokenizer(), bad_rows="skip", **settings)
    assert len(list(itertools.islice(env.prompts("train", 0), 18))) == 18
    assert env.skipped == {"not taken by template or tokenizer": 1}


def test_an_empty_prompt_has_a_message_of_its_own(tmp_path):
    env = make(
        tmp_path / "a.jsonl",
        [{"prompt": "", "split": split} for split in ("train", "heldout")],
        prompt="prompt",
        reward=length_reward,
        style="raw",
    )
    with pytest.raises(ValueError, match="prompt empty: it has no tokens: write a question in it"):
        next(env.prompts("train", 0))


def test_rows_of_a_large_data_set_are_made_ready_as_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncrl.envs.examples.FEW", 20)
    monkeypatch.setattr("asyncrl.envs.examples._SAMPLE", 5)
    rows = [{"question": "?" * (200 if n == 37 else 1) + str(n), "answer": "1", "split": "train"} for n in range(60)]
    rows[38]["answer"] = None
    made = []
    plain = DatasetEnv._example
    monkeypatch.setattr(DatasetEnv, "_example", lambda *args: made.append(args[3]) or plain(*args))
    env = make(tmp_path / "d.jsonl", rows, target="answer", max_prompt_tokens=60, bad_rows="skip")
    drawn = env.prompts("train", 0)
    with pytest.warns(UserWarning, match=r"d\.jsonl, split 'train', row 38 is skipped.*unusable row"):
        first = next(drawn)
    assert len(made) < 10, "a sample, and what was drawn"
    with pytest.warns(UserWarning, match=r"row 37 is skipped.*prompt longer than 60 tokens"):
        epochs = [first, *itertools.islice(drawn, 2 * 58 - 1)]
    assert len({prompt.token_ids for prompt in epochs[:58]}) == 58
    assert next(env.prompts("train", 0, first_id=70)) == epochs[70]
    assert {p.token_ids for p in epochs[:58]} == {p.token_ids for p in epochs[58:]}
    assert env.skipped == {"unusable row": 1, "prompt longer than 60 tokens": 1}, "each once, in two epochs"
    del rows[38]
    strict = make(tmp_path / "d.jsonl", rows, target="answer", max_prompt_tokens=60).prompts("train", 0)
    with pytest.raises(ValueError, match=r"row 37: prompt longer than 60 tokens.*bad_rows='skip'"):
        list(itertools.islice(strict, 59))


def test_a_large_data_set_of_which_no_row_can_be_used_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncrl.envs.examples.FEW", 20)
    rows = [{"question": "?" * 90, "split": "train"}] * 60
    env = make(tmp_path / "d.jsonl", rows, max_prompt_tokens=60, bad_rows="skip")
    with pytest.warns(UserWarning, match="row 0 is skipped"), pytest.raises(ValueError, match="all were skipped"):
        next(env.prompts("train", 0))


def test_a_large_file_is_told_of_while_it_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("asyncrl.envs.data._LARGE", 100)
    next(make(tmp_path / "d.jsonl").prompts("train", 0))
    assert "reading" in (told := capsys.readouterr().err)
    assert "d.jsonl" in told
