"""Texts that end a completion, looked for as its tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

Decode: TypeAlias = Callable[[list[int]], str]
"""Text of token ids, special tokens included."""


def reach(texts: Sequence[str]) -> int:
    """Tokens from the end in which each of these texts is, whole, once it is complete: a token is a byte at least."""
    return max(len(text.encode()) for text in texts)


def is_ended(token_ids: Sequence[int], texts: Sequence[str], decode: Decode) -> bool:
    """Whether one of the texts is in the last tokens. Asked after every token, that is whether the last one completed
    it."""
    if not texts:
        return False
    said = decode(list(token_ids[-reach(texts) :]))
    return any(text in said for text in texts)
