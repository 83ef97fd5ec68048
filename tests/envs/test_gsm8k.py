"""GSM8K: what counts as the final number, its data, and the environment's prompts, rewards and demonstrations."""

import itertools
import json
from fractions import Fraction

import pytest
from helpers import TextTokenizer, attempt

from asyncrl.cli import prepare_gsm8k
from asyncrl.envs.base import load_env
from asyncrl.envs.gsm8k import final_number, is_right

PATH = "asyncrl.envs.gsm8k:GSM8K"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So she has 72.\n#### 72", 72),
        ("#### 1,319.", 1319),
        ("#### $1,200 per week", 1200),
        ("#### 3 apples", 3),
        ("#### 3 apples, not 4", None),
        ("#### 18/2", 9),
        (r"#### \frac{18}{2}", 9),
        ("#### 18 * 2 = 36", 36),
        ("#### 18 20 22", None),
        ("#### 18 or 20", None),
        ("20 and 18\n#### 20 or 18", None),
        ("#### 18-20", None),
        ("#### 3:30", None),
        ("#### 3 1/2", Fraction(7, 2)),
        ("#### 3*6 = 18", 18),
        ("#### 36/2", 18),
        ("#### 1/2", Fraction(1, 2)),
        ("#### 1/0", None),
        ("#### 1 234", 1234),
        ("#### 1 234.5 kg", Fraction("1234.5")),
        ("#### - 5", -5),
        ("#### x = - 5", -5),
        ("#### the answer - 18", 18),
        ("#### it is -5", -5),
        ("#### twenty-one 21", 21),
        ("#### 18 m^2", 18),
        ("#### \\text{18 apples}", 18),
        ("7\n#### none", 7),
        (r"\boxed{18 20 22}", None),
        (r"\boxed{3 1/2}", Fraction(7, 2)),
        (r"\boxed{1/2}", Fraction(1, 2)),
        (r"\boxed{1 234}", 1234),
        ("#### -12", -12),
        ("#### \N{MINUS SIGN}12", -12),
        ("#### nope 3", 3),
        ("12 #### 3\n#### 4", 4),
        (r"\boxed{1{,}200}", 1200),
        (r"\boxed{\$18.50}", Fraction("18.5")),
        (r"\boxed{50\%}", 50),
        (r"\boxed{x = 5\text{ apples}} which is 6 less", 5),
        (r"\boxed{-\frac{1}{2}}", Fraction(-1, 2)),
        (r"\boxed{\frac{1}{0}}", None),
        (r"\boxed{18 apples}", 18),
        (r"\boxed{\text{18}}", 18),
        (r"\boxed{\$18 \text{ per day}}", 18),
        (r"\boxed{(18)}", 18),
        (r"\boxed{18^\circ}", 18),
        (r"\boxed{18x}", None),
        (r"\boxed{5 or 6}", None),
        (r"7, so \boxed{2+3}", None),
        (r"\boxed{5", 5),
        ("It is 18.00 dollars.", 18),
        ("the answer is $-5.", -5),
        ("that leaves -$5", -5),
        ("10-3 = 7", 7),
        ("10 - 3", 3),
        ("10-3", 3),
        ("(10)-3", 3),
        ("the totals are 1, 23", 23),
        ("1,23", 23),
        ("$ 1,000,000.50", Fraction("1000000.5")),
        ("**72**", 72),
        ("a half is .5", Fraction(1, 2)),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_reply(text, number):
    assert final_number(text) == number


def test_only_marked_numbers_count_where_marks_are_wanted():
    assert final_number("It is 7", marked=True) is None
    assert final_number("#### no number, but 7 above\n", marked=True) == 7
    assert final_number("7 ####", marked=True) is None
    assert final_number(r"\boxed{7}", marked=True) == 7


def test_math_verify_judges_expressions_only():
    pytest.importorskip("math_verify")
    assert is_right(r"\boxed{2+3}", "5", verify=True)
    assert is_right(r"\boxed{\sqrt{25}}", "5", verify=True)
    assert not is_right(r"\boxed{2+3}", "6", verify=True)
    assert not is_right(r"\boxed{hello}", "5", verify=True)
    assert not is_right(r"\boxed{2+3}", "5"), "without it an expression is no number"


def problem(number):
    answer = f"{number} + 1 = <<{number}+1={number + 1}>>{number + 1} apples.\n#### {number + 1:,}"
    return {"question": f"Ann has {number} apples and buys one. How many?", "answer": answer}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    raw = tmp_path_factory.mktemp("raw")
    for split, numbers in (("train", range(1000, 1040)), ("test", range(9))):
        (raw / f"{split}.jsonl").write_text("".join(json.dumps(problem(n)) + "\n" for n in numbers))
    folder = tmp_path_factory.mktemp("data")
    assert prepare_gsm8k.main(["--source", str(raw), "--folder", str(folder), "--num-validation", "10"]) == 0
    return folder


def test_preparing_splits_without_loss_or_overlap(data):
    env = {split: load_env(PATH, TextTokenizer(), {"source": str(data), "heldout": split}) for split in SPLITS}
    held = {split: set(env[split].prompts("heldout", 0)) for split in SPLITS}
    train = set(itertools.islice(env["test"].prompts("train", 0), 30))
    texts = {name: {p.token_ids for p in prompts} for name, prompts in (held | {"train": train}).items()}
    assert {name: len(found) for name, found in texts.items()} == {"validation": 10, "test": 9, "train": 30}
    assert len(set.union(*texts.values())) == 49


SPLITS = ("validation", "test")


def test_preparing_refuses_data_that_are_not_gsm8k(tmp_path, capsys):
    rows = [problem(1), problem(2) | {"answer": 42}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare_gsm8k.main(["--source", str(tmp_path), "--folder", str(tmp_path / "out")]) == 2
    assert "row 1: the answer must end in '#### number', got '42'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_right_number_scores_if_the_reply_ends(data):
    env = load_env(PATH, TextTokenizer(), {"source": str(data)})
    prompt = next(env.prompts("train", 0))
    text = TextTokenizer().decode(prompt.token_ids)
    assert text.startswith("<system>Solve the problem")
    assert text.endswith("How many?<assistant>")
    answer = int(text.split("Ann has ")[1].split()[0]) + 1
    assert attempt(env, prompt, f"so #### {answer:,}").reward == 1.0
    assert attempt(env, prompt, f"so \\boxed{{{answer}}}").reward == 1.0
    assert attempt(env, prompt, f"so #### {answer + 1}").reward == 0.0
    assert attempt(env, prompt, f"so #### {answer}", finish="length").reward == 0.0


def test_demonstrations_are_training_solutions_without_calculator_notes(data):
    env = load_env(PATH, TextTokenizer(), {"source": str(data)})
    heldout = {prompt.token_ids for prompt in env.prompts("heldout", 0)}
    seen = set()
    for prompt, reply in itertools.islice(env.demonstrations(0), 30):
        text = TextTokenizer().decode(reply[:-1])
        assert "<<" not in text
        assert reply[-1] == 0
        assert tuple(prompt) not in heldout
        number = int(TextTokenizer().decode(prompt).split("Ann has ")[1].split()[0])
        assert is_right(text, str(number + 1), marked=True)
        seen.add(tuple(prompt))
    assert len(seen) == 30, "an epoch shows every problem once"


def test_worked_examples_come_first_and_are_not_drawn(data):
    plain = TextTokenizer()
    plain.chat_template = None
    env = load_env(PATH, plain, {"source": str(data), "num_shots": 2, "max_prompt_tokens": 1000})
    prompts = {prompt.token_ids: plain.decode(prompt.token_ids) for prompt in itertools.islice(draws(env), 28)}
    assert len(prompts) == 28
    for text in prompts.values():
        system, first, answer, second, _, asked, last = text.split("\n\n")
        assert system.startswith("Solve the problem")
        assert answer.startswith("Answer: ")
        assert last == "Answer:"
        assert asked.startswith("Question: ")
        assert asked not in (first, second)


def draws(env):
    return env.prompts("train", 0)
