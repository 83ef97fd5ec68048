"""Values in messages: a row of data, a reply or an object of the user's may have megabytes, a message a few lines."""

from __future__ import annotations

LONGEST = 4000
"""Characters of the message that ends a command, whoever wrote it."""


def quote(value: object, most: int = 80) -> str:
    """`repr(value)`, of which `most` characters at most; what has no repr is named by its type."""
    if isinstance(value, str | bytes) and len(value) > most:
        return f"{value[:most]!r}{_size(len(value))}"
    try:
        text = repr(value)
    except Exception as error:  # code of the user's, or an integer with too many digits
        return f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
    return cut(text, most)


def cut(text: str, most: int = 400) -> str:
    """The text, of which `most` characters at most, and then how many there were."""
    return text if len(text) <= most else text[:most] + _size(len(text))


def _size(length: int) -> str:
    return f"... [{length:,} characters]"
