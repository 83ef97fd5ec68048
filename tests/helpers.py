"""Small things that several test files need."""

import asyncio
import os
import re
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from asyncrl.envs.digits import SortDigits
from asyncrl.monitor.events import Emit, Events
from asyncrl.types import Completion, Trajectory

Result = TypeVar("Result")
_LISTEN = "0A"


def run(coroutine: Coroutine[Any, Any, Result], seconds: float = 60) -> Result:
    """Runs it to its end, or fails after `seconds`."""

    async def bounded() -> Result:
        async with asyncio.timeout(seconds):
            return await coroutine

    return asyncio.run(bounded())


class Sevens(SortDigits):
    """A task on which random weights already score: the share of sevens in the reply."""

    async def play(self, prompt, generate):
        attempt = await super().play(prompt, generate)
        seven = self.encode("7")[0]
        return replace(attempt, reward=float((attempt.token_ids[attempt.mask] == seven).mean()))


def trajectory(num_prompt: int, num_new: int, *, seed: int, reward: float = 0.0, version: int = 0) -> Trajectory:
    """Random tokens of the tiny model's vocabulary, with made-up log-probs."""
    rng = np.random.default_rng(seed)
    length = num_prompt + num_new
    mask = np.arange(length) >= num_prompt
    return Trajectory(
        token_ids=rng.integers(2, 25, length).astype(np.int32),
        mask=mask,
        logprobs=np.where(mask, -rng.uniform(0.5, 4, length), 0).astype(np.float32),
        versions=np.where(mask, version, 0).astype(np.int32),
        reward=reward,
        finish="stop",
    )


class TextTokenizer:
    """One token a character, so that any text can be a prompt; its chat template writes the roles out."""

    eos_token_id = 0
    chat_template: str | None = "roles"

    def encode(self, text, *, add_special_tokens=True):
        del add_special_tokens
        return [ord(character) for character in text]

    def decode(self, token_ids, *, skip_special_tokens=False):
        return "".join(chr(token) for token in token_ids if token or not skip_special_tokens)

    def apply_chat_template(self, conversation, *, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in conversation) + "<assistant>"


def attempt(env, prompt, reply: str, finish="stop") -> Trajectory:
    """The trajectory of an environment on `TextTokenizer` when the engine says `reply`."""
    ids = np.array([*map(ord, reply), *([0] if finish == "stop" else [])], np.int32)

    async def generate(_token_ids):
        return Completion(ids, np.full(len(ids), -1, np.float32), np.zeros(len(ids), np.int32), finish)

    return run(env.play(prompt, generate))


def session_of(leader: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = re.sub(r"^.*\) ", "", path.read_text()).split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def listening(processes):
    """Addresses that these processes listen on, by TCP, as in /proc/net: hexadecimal, little-endian words."""
    sockets = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").glob("*"):
            try:
                sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
            except OSError:  # closed meanwhile
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTEN and words[9] in sockets:
                found.add(words[1].partition(":")[0])
    return found


def is_loopback(address):
    last = address[-8:]  # of an IPv4 address within IPv6, the part that counts
    mapped = address[:-8] in ("", "0000000000000000FFFF0000")
    return (mapped and last.endswith("7F")) or address == "00000000000000000000000001000000"


def telling(said: list[str]) -> Emit:
    """An `Emit` that puts the line of each event into a list."""
    told = Events(None)
    told.listen(lambda event: said.append(event.line))
    return told.emit
