"""How long each environment takes over replies that are made to hold it up: python bench/graders.py [--size 16384]

Prints the slowest reply of each, and what failed. A reply may score anything, but it scores, soon: a grader that raises
has the attempt made again under the same seed, and one that takes long holds the actor, and in Python all its threads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.envs.base import load_env
from asyncrl.types import Completion, Trajectory

_REPEATED = {
    "digits": "9",
    "grouped digits": "1,111",
    "commas": "1,",
    "minuses": "-",
    "points": ".",
    "currency": "$ ",
    "spaces": " ",
    "lines": "\n",
    "digit and space": "1 ",
    "marks": "#### ",
    "marked numbers": "#### 1",
    "asterisks": "**",
    "fractions": "1/1",
    "boxes": "\\boxed{",
    "boxed text": "\\boxed{\\text{a 1} ",
    "latex fractions": "\\frac{1}{",
    "equals": "= 1 ",
    "round brackets": "(",
    "square brackets": "[",
    "braces": "{",
    "JSON objects": '{"a":',
    "fences": "```",
    "fences of python": "```python\n",
    "open fences": "```python\n```\n```python",
    "NUL": "\0",
    "surrogates": "\ud800",
    "other digits": "\N{ARABIC-INDIC DIGIT ONE}\N{SUPERSCRIPT TWO}\N{FULLWIDTH DIGIT FIVE}",
    "answers": "<answer>",
    "ends of answers": "</answer>",
    "calls of a calculator": "<calculator>",
    "calls of python": "<python>",
    "queries": "<sql>",
    "views": "<view>",
    "tests": "<test>",
    "empty edits": '<edit path="">',
    "begun edits": '<edit path="',
    "edits with an old text": '<edit path="stats.py"><old>',
    "edits with a new text": '<edit path="stats.py"><old></old><new>',
    "old texts": "<old></old>",
}
_NUMBERS = ("1e999999", "-1e-999999", "9**9**9", "Infinity", "nan", "sNaN123", "0x1F", "1_000", "1/0", "9" * 5000)
_WRAPPED = {
    "": "{}",
    "box": "\\boxed{{{}}}",
    "fraction": "\\boxed{{\\frac{{{0}}}{{{0}}}}}",
    "mark": "#### {}",
    "answer": "<answer>{}</answer>",
    "calculator": "<calculator>{}</calculator>",
    "query": "<answer>SELECT {}</answer>",
}
_PROGRAMS = {
    "prints deep JSON": "print('[' * 60000)",
    "prints deep objects": "print('{\"a\":' * 10000)",
    "returns a number of 5,000 digits": "import sys\nsys.stdout.write('9' * 5000)\nsys.exit()",
    "prints a gigantic exponent": "print('1e' + '9' * 30)",
    "prints NaN": "print('sNaN')",
    "prints what is no text": "import sys\nsys.stdout.buffer.write(bytes(range(256)))",
    "prints too much": "print('9 ' * 10**6)",
    "is nested deeply": "x = " + "(" * 5000,
    "does not end": "while True: pass",
}

Environments = dict[str, tuple[str, dict[str, Any], str]]


def environments(folder: Path) -> Environments:
    """Import path, arguments, and the prompt's target to play ("" for the first) of every environment that is shipped,
    the data of some in `folder`."""
    row = {"question": "How many?", "answer": "6 * 3 = 18\n#### 18"}
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"q": f"{n}", "a": "18"}) + "\n" for n in range(60)))
    match = {"source": str(folder / "rows.jsonl"), "reward": "asyncrl.envs.rewards:exact_match"}
    text = {"max_context_tokens": 1 << 20}
    found: Environments = {
        "GSM8K": ("asyncrl.envs.gsm8k:GSM8K", {"source": str(folder)}, ""),
        "exact_match": ("asyncrl.envs.dataset:DatasetEnv", {**match, "prompt": "q", "target": "a"}, ""),
        "LargestDigit": ("asyncrl.envs.digits:LargestDigit", {}, ""),
        "SortDigits": ("asyncrl.envs.digits:SortDigits", {}, ""),
        "LargestOfThree": ("asyncrl.envs.numbers:LargestOfThree", {}, ""),
        "ToolUse": ("asyncrl.envs.tools:ToolUse", text, ""),
        "TextToSQL": ("asyncrl.envs.sql:TextToSQL", text, ""),
        "CodeTask": ("asyncrl.envs.code:CodeTask", text, "0"),
        "CodeTask, a function": ("asyncrl.envs.code:CodeTask", text, "4"),
        "RepairTask": ("asyncrl.envs.swe:RepairTask", text, "0"),
    }
    return found


def replies(size: int) -> dict[str, str]:
    """Texts of at most `size` characters, by what they are."""
    found = {name: (text * (size // len(text) + 1))[:size] for name, text in _REPEATED.items()}
    for wrapping, form in _WRAPPED.items():
        found |= {f"{number[:12]} {wrapping}".strip(): form.format(number) for number in _NUMBERS}
        room = size - len(form.format("")) * 2
        found |= {
            f"{sign * 3} {wrapping}".strip(): form.format(sign * (room // (2 * len(sign)))) for sign in ("(", "-", "1,")
        }
    found["an edit of spaces"] = f'<edit path="stats.py">{" " * (size - 40)}</edit>'
    found["an edit of old texts"] = f'<edit path="stats.py">{"<old></old><new>" * (size // 16 - 3)}</edit>'
    found["a cut edit"] = '<edit path="stats.py"><old>' + "</old><new>" * (size // 11 - 3)
    return found


def programs() -> dict[str, str]:
    """Replies that hold a program, by what it does."""
    return {name: f"```python\n{program}\n```" for name, program in _PROGRAMS.items()}


class Characters:
    """One token a character, so that any text can be said."""

    eos_token_id, chat_template = 0, "roles"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [ord(character) + 1 for character in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        del skip_special_tokens
        return "".join(chr(token - 1) for token in token_ids if token)

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> str:
        del add_generation_prompt, tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in conversation) + "<assistant>"


async def play(env: Any, target: str, reply: str) -> Trajectory:
    """The attempt of a model that says the same in every turn."""
    prompt = next(one for one in env.prompts("train", 0) if target in ("", one.target))
    ids = np.array([*Characters().encode(reply), 0], np.int32)

    async def generate(_token_ids: Any) -> Completion:
        return Completion(ids, np.full(len(ids), -1, np.float32), np.zeros(len(ids), np.int32), "stop")

    trajectory: Trajectory = await env.play(prompt, generate)
    return trajectory


async def _measure(size: int, only: str) -> bool:
    told, failed = f"{'environment':<22}{'replies':>8}{'worst':>9}  reply", False
    print(told)
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, args, target) in environments(Path(folder)).items():
            if only and only not in name:
                continue
            env, worst, slowest = load_env(path, Characters(), args), 0.0, ""
            texts = replies(size) | (programs() if "Code" in name else {})
            for reply, text in texts.items():
                begin = time.perf_counter()
                try:
                    reward = (await play(env, target, text)).reward
                    wrong = "" if math.isfinite(reward) else f"scored {reward}"
                except Exception as error:
                    wrong = f"raised {error!r:.60}"
                seconds = time.perf_counter() - begin
                if wrong:
                    failed = True
                    print(f"{name}: {reply}: {wrong}")
                if seconds > worst:
                    worst, slowest = seconds, reply
            print(f"{name:<22}{len(texts):>8}{worst:>8.2f}s  {slowest}", flush=True)
    return not failed


def main() -> int:
    """0 if every reply was scored."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=16384, help="characters of a reply")
    parser.add_argument("--only", default="", help="environments that have this in their names")
    options = parser.parse_args()
    return 0 if asyncio.run(_measure(options.size, options.only)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
