"""The built-in tasks: deterministic prompts, disjoint splits, exact scoring, honest no-skill scores."""

import itertools

import numpy as np
import pytest
from helpers import TextTokenizer, attempt, run

from asyncrl.envs.base import RESERVED_SOURCES, checked_prompts, heldout_prompts, load_env, no_skill
from asyncrl.envs.chat import ChatFormat
from asyncrl.models.loading import load_tokenizer
from asyncrl.models.tiny import build_tiny
from asyncrl.monitor.metrics import METRICS
from asyncrl.types import Completion, Prompt

TASKS = ["asyncrl.envs.digits:LargestDigit", "asyncrl.envs.digits:SortDigits"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tiny(folder, seed=0)
    return load_tokenizer(folder)


def draw(env, split, seed, count=400):
    return list(itertools.islice(env.prompts(split, seed), count))


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_numbered_repeatable_and_split(tokenizer, task):
    env = load_env(task, tokenizer, {})
    train = draw(env, "train", 0)
    assert [prompt.id for prompt in train] == list(range(400))
    assert train == draw(load_env(task, tokenizer, {}), "train", 0)
    assert train != draw(env, "train", 1)
    heldout = draw(env, "heldout", 0)
    assert not {p.token_ids for p in train} & {p.token_ids for p in heldout}
    assert max(len(p.token_ids) for p in train + heldout) == env.max_prompt_tokens


def right_answer(task, question):
    digits = [int(character) for character in question[1:-1]]
    assert len(set(digits)) == len(digits)
    return str(max(digits)) if "Largest" in task else "".join(map(str, sorted(digits)))


@pytest.mark.parametrize("task", TASKS)
def test_only_the_right_reply_with_its_end_token_scores(tokenizer, task):
    env = load_env(task, tokenizer, {})
    end = tokenizer.eos_token_id

    def score(prompt, reply, finish):
        ids = np.array(reply, np.int32)

        async def generate(token_ids):
            assert tuple(token_ids) == prompt.token_ids
            return Completion(ids, np.full(len(ids), -1, np.float32), np.full(len(ids), 3, np.int32), finish)

        trajectory = run(env.play(prompt, generate))
        assert trajectory.mask.sum() == len(ids)
        assert trajectory.token_ids[trajectory.mask].tolist() == reply
        assert set(trajectory.versions[trajectory.mask]) == {3}
        return trajectory.reward

    for prompt in draw(env, "train", 0, 20):
        right = tokenizer.encode(right_answer(task, tokenizer.decode(list(prompt.token_ids))))
        wrong = [token + 1 if token < 11 else token - 1 for token in right]
        assert score(prompt, [*right, end], "stop") == 1.0
        assert score(prompt, right, "length") == 0.0
        assert score(prompt, [*right, *right], "length") == 0.0
        assert score(prompt, [*wrong, end], "stop") == 0.0
        assert score(prompt, [end], "stop") == 0.0


def test_no_skill_scores_are_those_of_their_policies(tokenizer):
    env = load_env(TASKS[0], tokenizer, {})
    prompts = draw(env, "heldout", 0)
    scores = env.baselines(prompts)
    questions = [tokenizer.decode(list(prompt.token_ids)) for prompt in prompts]
    constants = [sum(max(q[1:-1]) == str(d) for q in questions) / len(questions) for d in range(10)]
    (best,) = (score for name, score in scores.items() if name.startswith("always"))
    assert best == max(constants)
    assert scores["first digit"] == sum(q[1] == max(q[1:-1]) for q in questions) / len(questions)


def test_demonstrations_are_of_mixed_quality_and_never_held_out(tokenizer):
    env = load_env(TASKS[1], tokenizer, {})
    heldout = {prompt.token_ids for prompt in draw(env, "heldout", 0, 2000)}
    right = falling = 0
    for prompt, reply in itertools.islice(env.demonstrations(0), 2000):
        assert tuple(prompt) not in heldout
        assert reply[-1] == tokenizer.eos_token_id
        answer = right_answer(TASKS[1], tokenizer.decode(prompt))
        text = tokenizer.decode(reply[:-1])
        right += text == answer
        falling += text == answer[::-1]
    assert 0.25 < right / 2000 < 0.33
    assert 0.40 < falling / 2000 < 0.50


def test_the_largest_of_three_counts_as_the_last_number_of_a_reply_that_ended():
    env = load_env("asyncrl.envs.numbers:LargestOfThree", TextTokenizer(), {})
    train, heldout = (draw(env, split, 0, 100) for split in ("train", "heldout"))
    assert not {p.token_ids for p in train} & {p.token_ids for p in heldout}
    assert max(len(p.token_ids) for p in train + heldout) == env.max_prompt_tokens
    for prompt in train[:20]:
        text = TextTokenizer().decode(prompt.token_ids)
        numbers = [int(number) for number in text.partition("largest: ")[2].partition("?")[0].split(", ")]
        assert prompt.target == str(max(numbers))
        assert attempt(env, prompt, f"Not {min(numbers)}, but {max(numbers)}.").reward == 1.0
        assert attempt(env, prompt, str(min(numbers))).reward == 0.0
        assert attempt(env, prompt, str(max(numbers)), finish="length").reward == 0.0
    firsts = [TextTokenizer().decode(p.token_ids).partition("largest: ")[2][:2] == p.target for p in heldout]
    assert env.baselines(heldout) == {"first number": sum(firsts) / len(firsts)}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("asyncrl.envs.nothing:X", "no module 'asyncrl.envs.nothing'"),
        ("asyncrl.envs.digits:Nothing", "has no 'Nothing'"),
        ("some/mine.py", r"'some/mine\.py' names a file: write 'mine:Name', .*export PYTHONPATH=/.*/some\)"),
        ("mine.py:Env", r"'mine\.py:Env' names a file: write 'mine:Env'"),
        ("asyncrl.envs.digits", "has no ':' with a name after it: write 'package.module:Name'"),
        ("asyncrl.envs.digits:random", "env.path 'asyncrl.envs.digits:random' is <module .*, which cannot be called"),
    ],
)
def test_a_wrong_path_says_which_half_is_wrong(tokenizer, path, message):
    with pytest.raises(ValueError, match=message):
        load_env(path, tokenizer, {})


def test_a_module_that_fails_says_where(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "broken_env.py").write_text("import json\n\nTABLE = json.loads('{')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"importing broken_env failed, .*broken_env\.py line 3: JSONDecodeError: "):
        load_env("broken_env:Env", tokenizer, {})


def test_a_module_that_a_module_lacks_is_not_said_to_be_the_environment(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "needy_env.py").write_text("import json\nimport not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = r"importing needy_env failed, .*needy_env\.py line 2: .* named 'not_installed'; install what is missing"
    with pytest.raises(ValueError, match=told):
        load_env("needy_env:Env", tokenizer, {})


def test_a_text_that_the_tokenizer_cannot_take_is_told_so(tokenizer):
    with pytest.raises(ValueError, match=r"cannot take the text 'Question: What\?.*of the built-in ones 'tiny' knows"):
        ChatFormat(tokenizer).encode("What?")


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        (
            "dataset:DatasetEnv",
            {"end_required": "False"},
            r"env\.args\.end_required must be true or false, got 'False'",
        ),
        ("dataset:DatasetEnv", {"bad_rows": "skp"}, r"env\.args\.bad_rows must be 'error' or 'skip', got 'skp'"),
        ("dataset:DatasetEnv", {"style": "rw"}, r"style must be 'auto' or 'chat' or 'plain' or 'raw', got 'rw'"),
        ("dataset:DatasetEnv", {"max_prompt_tokens": "many"}, "max_prompt_tokens must be a whole number, got 'many'"),
        ("dataset:DatasetEnv", {"num_shots": 1.5}, "num_shots must be a whole number, got 1.5"),
        ("dataset:DatasetEnv", {"timeout_s": "x"}, "timeout_s must be a number, got 'x'"),
        ("dataset:DatasetEnv", {"source": 3}, "source must be a text, got 3"),
        ("dataset:DatasetEnv", {"weights": 1}, r"weights must be a list \(of a number each\), got 1"),
        ("gsm8k:GSM8K", {"form": "marks"}, "form must be 'any' or 'marked', got 'marks'"),
        ("gym:GymEnv", {"env": "a:B", "data": "d.jsonl", "env_config": 3}, "env_config must be a table, got 3"),
        ("reasoning_gym:ReasoningGym", {"task": "gcd", "answer": "last"}, "answer must be 'tag' or 'last_number' or"),
        ("tools:ToolUse", {"tools": "python"}, r"tools must be a list \(of a text each\), got 'python'"),
        ("sql:TextToSQL", {"max_turns": True}, "max_turns must be a whole number, got True"),
        ("code:CodeTask", {"memory_mb": 0.5}, "memory_mb must be a whole number, got 0.5"),
        ("swe:RepairTask", {"time_limit_s": "1"}, "time_limit_s must be a number, got '1'"),
    ],
)
def test_an_argument_of_another_type_is_named_with_what_it_can_be(path, args, message):
    needed = {"source": "data.jsonl", "reward": "a:b"} if path == "dataset:DatasetEnv" else {}
    with pytest.raises(ValueError, match=message):
        load_env(f"asyncrl.envs.{path}", TextTokenizer(), needed | args)


ANNOTATED = """
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from asyncrl.envs.digits import LargestDigit

if TYPE_CHECKING:
    from nowhere import Unknown


class Env(LargestDigit):
    def __init__(
        self, tokenizer, bare=0, hidden: Unknown = 0, call: Callable[[int], int] = abs, path: Path = Path(),
        either: str | Path = "", levels: dict[int, int] = {}, share: float = 0.0, kind: Literal["a", "b"] | None = None,
        lists: list[str] | list[int] = [], **more: int,
    ):
        super().__init__(tokenizer)


class Maker:
    share: str = ""  # of the object, not of the call

    def __call__(self, tokenizer, share: float):
        return Env(tokenizer)


maker = Maker()
"""


def test_types_that_a_configuration_cannot_have_are_not_held_against_it(tmp_path, monkeypatch):
    (tmp_path / "annotated_env.py").write_text(ANNOTATED)
    monkeypatch.syspath_prepend(tmp_path)
    fine = {"bare": "x", "hidden": 1, "call": "math:sin", "path": "some/file", "either": "x", "levels": {"1": 2}}
    assert load_env("annotated_env:Env", TextTokenizer(), fine | {"share": 1, "kind": "b", "lists": ["x"], "also": "x"})
    assert load_env("annotated_env:maker", TextTokenizer(), {"share": 0.5})
    with pytest.raises(ValueError, match="kind must be 'a' or 'b', got 'c'"):
        load_env("annotated_env:Env", TextTokenizer(), fine | {"kind": "c"})


FAILING = """
from asyncrl.envs.base import split_of
from asyncrl.envs.dataset import DatasetEnv
from asyncrl.envs.digits import LargestDigit


class Started(LargestDigit):
    def __init__(self, tokenizer):
        {}["here"]


class Drawn(LargestDigit):
    def prompts(self, split, seed):
        yield from super().prompts(split, seed) if split == "train" else [int("seven")]


class Scored(LargestDigit):
    def baselines(self, prompts):
        return 1 / 0


class Nothing(LargestDigit):
    def prompts(self, split, seed):
        pass


class Explained(DatasetEnv):
    def __init__(self, tokenizer):
        super().__init__(tokenizer, "data.jsonl", "math:pi")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Started", r"^failing_env:Started\(\.\.\.\) raised KeyError\('here'\), /.*/failing_env\.py line 9$"),
        ("Drawn", r"^Drawn\.prompts\('heldout'\) raised ValueError\(.*'seven'\"\), /.*/failing_env\.py line 14$"),
        ("Scored", r"^Scored\.baselines\(\) raised ZeroDivisionError\(.*\), /.*/failing_env\.py line 19$"),
        ("Nothing", r"^Nothing\.prompts\('heldout'\) raised TypeError\(.*'NoneType' object is not iterable"),
        ("Explained", r"^env\.args\.reward 'math:pi' is 3\.14.*name a function$"),
    ],
)
def test_what_an_environment_raises_before_a_run_says_where(tokenizer, tmp_path, monkeypatch, name, message):
    (tmp_path / "failing_env.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)

    def start():
        env = load_env(f"failing_env:{name}", tokenizer, {})
        no_skill(env, heldout_prompts(env, 4))

    with pytest.raises(ValueError, match=message) as raised:
        start()
    assert (raised.value.__cause__ is None) == (name == "Explained")


def test_of_targets_as_frequent_the_same_one_is_named_in_every_process():
    env = load_env(TASKS[0], TextTokenizer(), {})
    prompts = [Prompt(number, tuple(map(ord, "m123=")), target) for number, target in enumerate("75389642")]
    assert "always 2" in env.baselines(prompts)


def test_a_class_that_is_no_environment_is_told_what_it_lacks(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "half_env.py").write_text("class Half:\n    prompts = 1\n    def __init__(self, tokenizer): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'half_env:Half' is no environment: it lacks max_prompt_tokens, play, base"):
        load_env("half_env:Half", tokenizer, {})


class Given:
    """An environment of whatever prompts and scores it was made with."""

    max_prompt_tokens = 3

    def __init__(self, prompts=(), scores=None, train=()):
        self._prompts, self._scores = {"train": train, "heldout": prompts}, scores

    def prompts(self, split, _seed):
        return iter(self._prompts[split])

    def baselines(self, _prompts):
        return self._scores


GOOD = Prompt(0, (1, 2, 3), "x")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Prompt(0, (1,), "x"), r"prompt 1 of Given.prompts\('train'\) has the id 0: ids count .* so give it 1"),
        (Prompt(1, (), "x"), r"prompt 1 .* has 0 tokens, and the environment's max_prompt_tokens is 3: raise it"),
        (Prompt(1, (1,) * 4, "x"), "has 4 tokens"),
        (Prompt(1, (1,), 7), r"has the target 7: a target is text, so write str\(\)"),
        ({"id": 1}, "is a dict: yield asyncrl.types.Prompt"),
        (Prompt(1, (1,), "x", "generated"), "has the source 'generated', under which the run reports something else"),
    ],
)
def test_a_prompt_that_breaks_the_protocol_is_named_when_it_is_drawn(bad, message):
    drawn = checked_prompts(Given(train=[GOOD, bad]), "train", 0)
    assert next(drawn) is GOOD
    with pytest.raises(ValueError, match=message):
        next(drawn)


def test_a_training_prompt_that_is_held_out_is_warned_of_once():
    train = [GOOD, Prompt(1, [4], "x"), Prompt(2, (4,), "x")]
    with pytest.warns(UserWarning, match=r"prompt 1 of Given.prompts\('train'\) is a held-out prompt, too") as told:
        assert list(checked_prompts(Given(train=train), "train", 0, heldout=[Prompt(0, (4,), "y")])) == train
    assert len(told) == 1


def test_sources_may_not_have_the_names_of_what_the_run_reports_beside_them():
    areas = {name.partition("/")[0]: set() for name in METRICS}
    for name in METRICS:
        areas[name.partition("/")[0]].add(name.partition("/")[2])
    assert areas["reward"] | areas["eval"] == RESERVED_SOURCES


def test_held_out_prompts_may_be_few_but_not_none():
    assert heldout_prompts(Given([GOOD]), 5) == [GOOD]
    with pytest.raises(ValueError, match=r"Given.prompts\('heldout'\) gives no prompt"):
        heldout_prompts(Given(), 5)


def test_held_out_prompts_that_are_mostly_repetitions_are_warned_of():
    heldout = [Prompt(number, [number % 2 + 1], "") for number in range(5)]
    with pytest.warns(UserWarning, match=r"Given.prompts\('heldout'\) has 2 different prompts in 5: .*num_prompts=2"):
        assert heldout_prompts(Given(heldout), 5) == heldout


@pytest.mark.parametrize("scores", [None, {}, {"guess": float("nan")}, {"guess": "high"}, 0.5])
def test_no_skill_scores_are_finite_numbers_and_one_at_least(scores):
    assert no_skill(Given(scores={"guess": np.float32(0.5)}), [GOOD]) == {"guess": 0.5}
    with pytest.raises(ValueError, match=r"Given.baselines\(\) gave .*, for example \{'empty reply': 0.0\}"):
        no_skill(Given(scores=scores), [GOOD])
