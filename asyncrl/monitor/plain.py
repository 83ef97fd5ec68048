"""Text of models, environments and other processes, made safe to show."""

from __future__ import annotations

import html
import re

_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, the beginnings of escape sequences among them, but \t and \n
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # what turns the direction of text, or breaks a line unseen
    "\ud800-\udfff\ufeff]"  # halves of characters, which no output takes
)


def plain(text: str) -> str:
    """The text with whatever a terminal would act on written out: `\\x1b[2J` as those letters."""
    return _ACTIVE.sub(lambda found: ascii(found[0])[1:-1], text)


def inert(text: str) -> str:
    """The text for a page that shows Markdown: no markup, image or link in it takes effect there."""
    lines = html.escape(plain(text)).splitlines()
    return "\n".join(f"    {line}" for line in lines)  # a block of code, which no fence in the text ends
