"""GSM8K: grade-school word problems with a whole number as the answer (Cobbe et al. 2021, arXiv:2110.14168).

`launch/prepare_gsm8k.py` writes the data. The reply's final number counts: after `####`, in `\\boxed{}`, or, unless
only those forms are wanted, the last number of the text.
"""

from __future__ import annotations

import importlib.util
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

from asyncrl.envs.base import Tokenizer
from asyncrl.envs.chat import Style
from asyncrl.envs.data import Row
from asyncrl.envs.dataset import DatasetEnv
from asyncrl.utils.quote import quote

SYSTEM_PROMPT = "Solve the problem step by step. End with the answer on a line of its own, as #### and the number."

# A minus after a digit, a letter or a closing bracket subtracts. Commas only part thousands.
NUMBER = r"(?:(?<![\w.)\]])-)?(?:[$€£]\s?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d\w])-?\.\d+"
"""A pattern of what is read as a number; `plain` first."""
_NUMBER = re.compile(NUMBER)
# Of an answer by itself a space may part thousands, too, and a sign may stand off.
_WHOLE = r"\d{1,3}(?:[ ,]\d{3})+(?!\d)|\d+"
_VALUE = re.compile(
    rf"(?P<sign>-?)\s*+(?:\\[dt]?frac\{{(?P<over>\d+)\}}\{{(?P<under>\d+)\}}"
    rf"|(?:(?P<add>{_WHOLE})\s++)?(?P<above>\d+)\s*+/\s*+(?P<below>\d+)"
    rf"|(?P<number>(?:{_WHOLE})(?:\.\d+)?|\.\d+))"
)
_BEGIN = re.compile(r"(?:^\s*+-\s*+|(?<![\w.)\]])-)?(?:\d|\.\d|\\[dt]?frac)")
_POWER = re.compile(r"(?<=[A-Za-z])\^\{?\d\}?")
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=\d)\s+[A-Za-z][A-Za-z ./]*$")
_MARKUP = re.compile(r"\^\{?\\circ\}?|\\[$%,!;: ]|[%°$€£]")


class GSM8K(DatasetEnv):
    """Reward 1 for the right final number in a reply that ended by itself."""

    pass_reward = 1.0

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str = "data/gsm8k",
        *,
        heldout: str = "validation",
        form: Literal["any", "marked"] = "any",
        math_verify: Literal["on", "off"] = "off",
        style: Style = "auto",
        system_prompt: str = SYSTEM_PROMPT,
        num_shots: int = 0,
        max_prompt_tokens: int = 512,
        bad_rows: Literal["error", "skip"] = "error",
        end_required: bool = True,
    ) -> None:
        """`heldout`: "validation", or "test" for the final score. `form`: "marked" wants `####` or `\\boxed{}`.
        `math_verify`: judge a boxed expression that is no plain number by that package. The rest is as in
        `DatasetEnv`."""
        if math_verify == "on" and importlib.util.find_spec("math_verify") is None:
            raise ValueError("env.args.math_verify is 'on', but it is not installed: pip install 'asyncrl[math]'")
        self._marked, self._verify = form == "marked", math_verify == "on"
        super().__init__(
            tokenizer,
            source,
            self.reward,
            prompt="question",
            target="target",
            reply="reply",
            heldout=heldout,
            style=style,
            system_prompt=system_prompt,
            num_shots=num_shots,
            max_prompt_tokens=max_prompt_tokens,
            bad_rows=bad_rows,
            end_required=end_required,
        )

    @property
    def columns(self) -> list[str]:
        return ["question", "answer"]

    def clean(self, row: Row) -> Row:
        return prepare_row(row)

    def reward(self, prompts: list[Any], completions: list[Any], target: list[str], **_columns: Any) -> list[float]:
        """1 for each completion whose final number is the target."""
        del prompts
        pairs = zip(completions, target, strict=True)
        return [float(is_right(text, wanted, marked=self._marked, verify=self._verify)) for text, wanted in pairs]


def prepare_row(row: Row) -> Row:
    """`question`, `reply` and `target` from a row of GSM8K, whose `answer` is a solution that ends in `#### number`.

    The reply is without the data set's calculator notes (`<<48/2=24>>`). Raises `ValueError` for another answer.
    """
    if not row.get("question") or not row.get("answer"):
        raise ValueError("a row needs a question and an answer")
    solution = re.sub(r"<<[^<>]*>>", "", str(row["answer"])).strip()
    marked = solution.rpartition("####")
    target = _line_number(marked[2]) if marked[1] else None
    if target is None:
        raise ValueError(f"the answer must end in '#### number', got {quote(solution[-60:])}: correct the data")
    return {"question": row["question"], "reply": solution, "target": _write(target)}


def is_right(text: str, target: str, *, marked: bool = False, verify: bool = False) -> bool:
    """Whether the final number of `text` is exactly `target`. `verify`: math-verify has the last word on a boxed
    expression that is no number."""
    number = final_number(text, marked=marked)
    if number is None and verify and (boxed := _last_boxed(text)) is not None:
        return _verify(boxed, target)
    return number == Fraction(target)


def final_number(text: str, *, marked: bool = False) -> Fraction | None:
    """The number that a reply ends on, exactly; None if it has none, or, with `marked`, none in a marked form.

    An answer is looked for in the last `\\boxed{}`, then after the last `####`, then as the last number of the text.
    The whole of a box or of the line after `####` counts, or what stands behind its last `=`: a number, a fraction or a
    mixed number, with words around it. A box or line that holds anything else has no number, whatever comes before it.
    """
    text = plain(text)
    if (boxed := _last_boxed(text)) is not None:
        return _boxed_number(boxed)
    _, mark, after = text.rpartition("####")
    line = after.strip().partition("\n")[0]
    if mark and any(character.isdigit() for character in line):
        return _line_number(line)
    if marked:
        return None
    found = _NUMBER.findall(text)
    return _parse(found[-1]) if found else None


def plain(text: str) -> str:
    """The text with numbers as they are typed: no typographic minus, no LaTeX around commas, no bold print."""
    return text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",").replace("**", "")


def value_of(number: str) -> str:
    """A match of `NUMBER` without currency and commas."""
    return re.sub(r"[,$€£\s]", "", number)


def _line_number(line: str) -> Fraction | None:
    """The number of a short text such as `$1,200 per week` or `3 * 6 = 18`; None where it has several, or none."""
    text = _POWER.sub("", _MARKUP.sub("", _unwrapped(line))).rpartition("=")[2]
    begin = _BEGIN.search(text)
    if begin is None:
        return None
    last = max(place for place, character in enumerate(text) if character.isdigit() or character == "}")
    return _read(text[begin.start() : last + 1].strip())


def _read(text: str) -> Fraction | None:
    """The number that a text is, from its first character to its last."""
    found = _VALUE.fullmatch(text)
    if found is None:
        return None
    above, below = found["over"] or found["above"], found["under"] or found["below"]
    if above is None:
        value = _parse(found["number"])
    elif below.strip("0"):
        value = _parse(found["add"] or "0") + _parse(above) / _parse(below)
    else:
        return None
    return -value if found["sign"] else value


def _parse(text: str) -> Fraction:
    return Fraction(Decimal(value_of(text)))


def _write(number: Fraction) -> str:
    return str(number.numerator) if number.denominator == 1 else str(number)


def _boxed_number(boxed: str) -> Fraction | None:
    bare = _MARKUP.sub("", _UNIT.sub("", _unwrapped(boxed).strip())).rpartition("=")[2].strip().rstrip(".")
    if bare[:1] + bare[-1:] == "()":
        bare = bare[1:-1]
    return _read(bare.strip())


def _unwrapped(text: str) -> str:
    """Without LaTeX around words; words alone are left out."""
    return _WRAPPED.sub(lambda found: found[1] if re.search(r"\d", found[1]) else "", text)


def _last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, with its braces matched; None without one that is closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end]
    return None


def _verify(boxed: str, target: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    # Its own time limits are signals, which only the main thread of a process may set.
    given = parse(f"\\boxed{{{boxed}}}", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    wanted = parse(f"${target}$", parsing_timeout=None)
    return bool(given) and bool(verify(wanted, given, timeout_seconds=None))
