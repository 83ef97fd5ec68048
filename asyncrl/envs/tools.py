"""Questions that the model answers with the help of tools: a calculator, and Python in a sandbox.

The model writes `<calculator>12 * 34</calculator>` and ends its turn; the result comes back as the user's words, which
are not trained on. `<answer>408</answer>` ends the attempt.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TypeAlias

from asyncrl.envs.base import Tokenizer
from asyncrl.envs.chat import Message
from asyncrl.envs.data import Row
from asyncrl.envs.multi_turn import SHIPPED, Episode, MultiTurn, field
from asyncrl.envs.sandbox import Limits, Sandbox

Tool: TypeAlias = Callable[[str], Awaitable[str]]
"""What stands between its tags -> what the model reads. `ToolError` for a call that cannot be done."""

_HELP = {
    "calculator": "<calculator>(12 + 3) * 4</calculator> computes with + - * / // % **.",
    "python": "<python>print(sum(range(10)))</python> runs a program and shows what it prints.",
}
_LONGEST_RESULT = 500
_LARGEST_EXPONENT = 64
_LARGEST_NUMBER = 1e100


class ToolError(Exception):
    """A call that the model got wrong; the text tells it how."""


class ToolUse(MultiTurn):
    """Rows of `question` and `answer`. Reward 1 for the right answer: the same number, or the same text.

    `tools` are names of the two above. A turn makes one call; a turn that makes none is told so and counted.
    """

    pass_reward = 1.0

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        data: str | Path = SHIPPED / "tools.jsonl",
        tools: Sequence[str] = ("calculator", "python"),
        max_turns: int = 4,
        max_context_tokens: int = 1024,
        time_limit_s: float = 5.0,
    ) -> None:
        if unknown := set(tools) - set(_HELP):
            raise ValueError(f"env.args.tools has {sorted(unknown)}; there are {', '.join(_HELP)}")
        sandbox = Sandbox(Limits(time_s=time_limit_s))

        async def python(code: str) -> str:
            outcome = await sandbox.run(code)
            if not outcome.ok:
                raise ToolError(outcome.explain())
            return outcome.stdout

        every: dict[str, Tool] = {"calculator": calculator, "python": python}
        self._tools = {name: every[name] for name in tools}
        super().__init__(tokenizer, data=data, max_turns=max_turns, max_context_tokens=max_context_tokens)

    def opening(self, row: Row) -> list[Message]:
        field(row, "answer")
        help_lines = "\n".join(_HELP[name] for name in self._tools)
        system = (
            f"Answer the question. You have tools; call one per turn:\n{help_lines}\nEnd with <answer>...</answer>."
        )
        return [{"role": "system", "content": system}, {"role": "user", "content": field(row, "question")}]

    @asynccontextmanager
    async def episode(self, row: Row) -> AsyncIterator[Episode]:
        yield _ToolEpisode(self._tools, str(row["answer"]))


class _ToolEpisode:
    def __init__(self, tools: dict[str, Tool], answer: str) -> None:
        self.metrics = {"tool_calls": 0.0, "bad_calls": 0.0}
        self._tools, self._right, self._given = tools, answer, ""

    async def respond(self, reply: str) -> str | None:
        if (answer := tagged(reply, "answer")) is not None:
            self._given = answer
            return None
        for name, tool in self._tools.items():
            if (text := tagged(reply, name)) is not None:
                self.metrics["tool_calls"] += 1
                return await self._call(tool, text)
        self.metrics["bad_calls"] += 1
        return f"error: no call and no answer; write one of {', '.join(f'<{n}>...</{n}>' for n in self._tools)}"

    async def _call(self, tool: Tool, text: str) -> str:
        try:
            return shorten(await tool(text))
        except ToolError as error:
            self.metrics["bad_calls"] += 1
            return shorten(f"error: {error}")

    async def score(self) -> float:
        return float(same_answer(self._given, self._right))


def tagged(text: str, name: str) -> str | None:
    """What stands between the first `<name>` and the next `</name>`, None where there is no such pair."""
    found = between(text, f"<{name}>", f"</{name}>")
    return found[0].strip() if found else None


def between(text: str, *marks: str) -> list[str] | None:
    """What stands between marks, the first of each after the one before; None where one is missing.

    In one pass: a pattern with lazy parts would look from every first mark to the end of a text that lacks the last.
    """
    parts: list[str] = []
    end = 0
    for number, mark in enumerate(marks):
        start = text.find(mark, end)
        if start < 0:
            return None
        if number:
            parts.append(text[end:start])
        end = start + len(mark)
    return parts


def shorten(text: str) -> str:
    """At most 500 characters: a tool must not eat the token budget of the attempt."""
    text = text.strip()
    return text if len(text) <= _LONGEST_RESULT else f"{text[:_LONGEST_RESULT]} [cut]"


def same_answer(given: str, right: str) -> bool:
    """Exactly equal as numbers if both are numbers, as texts otherwise."""
    try:
        return Decimal(given.replace(",", "")) == Decimal(right.replace(",", ""))
    except InvalidOperation:
        return given.strip() == right.strip()


_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


async def calculator(text: str) -> str:
    """The value of an arithmetic expression. It is parsed, not run; numbers and exponents are bounded."""
    if len(text) > _LONGEST_RESULT:
        raise ToolError(f"an expression has at most {_LONGEST_RESULT} characters")
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ToolError(f"cannot compute {text!r}: {error}") from error
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            result: float = number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            result = _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _value(left), _value(right)
            if isinstance(op, ast.Pow) and abs(b) > _LARGEST_EXPONENT:
                raise ValueError(f"exponents go up to {_LARGEST_EXPONENT}")
            result = _BINARY[type(op)](a, b)
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")
    if isinstance(result, complex) or not abs(result) <= _LARGEST_NUMBER:
        raise ValueError("the result is no number of ordinary size")
    return result
