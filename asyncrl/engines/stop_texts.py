"""What ends a completion, looked for as its tokens are drawn: stop tokens, and texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from asyncrl.types import Sampling

Decode: TypeAlias = Callable[[list[int]], str]
"""Text of token ids, special tokens included."""


def check(sampling: Sampling, decode: Decode | None) -> None:
    """Raises `ValueError` for stop texts where there is no tokenizer to find them with."""
    if sampling.stop and decode is None:
        raise ValueError(f"stop texts need an engine with a tokenizer, got {sampling.stop}: give it `decode`")


def is_stopped(token_ids: Sequence[int], sampling: Sampling, decode: Decode | None) -> bool:
    """Whether the last token ends the completion, by itself or by a text that it completes. Asked after each token."""
    if token_ids[-1] in sampling.stop_token_ids:
        return True
    return decode is not None and is_said(token_ids, sampling.stop, decode)


def is_said(token_ids: Sequence[int], texts: Sequence[str], decode: Decode) -> bool:
    """Whether one of the texts is in the last tokens."""
    if not texts:
        return False
    said = decode(list(token_ids[-reach(texts) :]))
    return any(text in said for text in texts)


def reach(texts: Sequence[str]) -> int:
    """Tokens from the end in which each of these texts is, whole, once it is complete: a token is a byte at least."""
    return max(len(text.encode()) for text in texts)
