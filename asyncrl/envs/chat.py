"""How a question becomes the tokens of a prompt: the tokenizer's chat template, plain text, or the text as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

from asyncrl.envs.base import Tokenizer
from asyncrl.utils.quote import cut, quote

Style: TypeAlias = Literal["auto", "chat", "plain", "raw"]
""" "chat" applies the tokenizer's template; "plain" writes "Question: ... Answer:", after the token that begins a text
if the tokenizer has one; "raw" adds that token alone, where the text does not have it; "auto" is "chat" where the
tokenizer has a template and "plain" elsewhere."""

Message: TypeAlias = dict[str, Any]
"""`role` and `content`."""

_ANSWER = "Answer:"
_LABELS = {"user": "Question: ", "assistant": f"{_ANSWER} "}
_REPLY = "(the reply of the model)"
_EXCHANGE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _REPLY}]


@dataclass(frozen=True)
class ChatFormat:
    """Renders questions, after a system prompt and worked examples (question, reply)."""

    tokenizer: Tokenizer
    style: Style = "auto"
    system_prompt: str = ""
    examples: Sequence[tuple[str | Sequence[Message], str]] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the template, such as `enable_thinking` or `tools`."""

    def __post_init__(self) -> None:
        if self.style == "chat" and not self.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, which env.args.style 'chat' and environments of several turns "
                "need: take a model with one, or set env.args.style to 'plain' where the environment has it"
            )
        if self._resolved == "raw" and (self.system_prompt or self.examples):
            raise ValueError("env.args.style 'raw' adds nothing to a prompt: leave system_prompt and num_shots out")

    def encode(self, question: str | Sequence[Message]) -> list[int]:
        """Token ids of the prompt for a question, or for a conversation that the model has to go on with."""
        token_ids = self._tokens(self.render(question))
        begun = token_ids[: len(self._beginning)] == self._beginning  # as in texts that a template made
        return token_ids if self._resolved == "chat" or begun or not token_ids else [*self._beginning, *token_ids]

    def reply_in(self, text: str) -> str:
        """What of a generated text is the reply: a base model may go on with a question of its own."""
        return text.partition(f"\n\n{_LABELS['user'].strip()}")[0] if self._resolved == "plain" else text

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens, without those that begin, end or pad: other special tokens, such as a `<think>`
        of the model's own, are what it said."""
        return str(self.tokenizer.decode([token for token in token_ids if token not in self._ends]))

    def encode_answer(self, answer: str | Sequence[Message], last: int) -> list[int]:
        """Token ids between the end of a reply, whose last token is `last`, and the start of the next.

        The template ends the turn after the reply; where its end is the stop token just sampled, it is not repeated.
        """
        text = self.render([*_EXCHANGE, *_messages(answer)]).partition(_REPLY)[2]
        after = self._tokens(text)
        return after[1:] if after[:1] == [last] else after

    def encode_reply(self, reply: str) -> list[int]:
        """Token ids of a reply as the model should have given it, with its end: the template's, if it has one."""
        start = " " if self._resolved == "plain" else ""
        end = self.tokenizer.eos_token_id if self._end_of_turn is None else self._end_of_turn
        return [*self._tokens(start + reply), end]

    def render(self, question: str | Sequence[Message]) -> str:
        """The text of the prompt."""
        asked = _messages(question)
        if self._resolved == "raw":
            return "".join(message["content"] for message in asked)
        messages = [*self._opening(), *asked]
        begun = asked[-1]["role"] == "assistant"
        if self._resolved == "plain":
            return "\n\n".join(map(_plain, messages)) + ("" if begun else f"\n\n{_ANSWER}")
        options = dict(self.template_args)
        if begun:  # the model goes on with the reply, which the template would close
            options["continue_final_message"] = True
        text: str = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=not begun, tokenize=False, **options
        )
        return text

    def _tokens(self, text: str) -> list[int]:
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:  # the library behind the tokenizers raises no other kind
            raise ValueError(
                f"the model's tokenizer cannot take the text {quote(text)} ({cut(str(error))}): take a model.path "
                "that can; of the built-in ones 'tiny' knows digits and signs alone, 'tiny-bytes' any text"
            ) from error

    @cached_property
    def _beginning(self) -> list[int]:
        """The tokens that the tokenizer puts before a text, unless it puts others after it, too."""
        bare = self._tokens(_ANSWER)
        begun = list(self.tokenizer.encode(_ANSWER, add_special_tokens=True))
        return begun[: -len(bare)] if begun[-len(bare) :] == bare else []

    @cached_property
    def _ends(self) -> frozenset[int]:
        named = (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("eos", "pad", "bos"))
        return frozenset(token for token in (*named, self._end_of_turn) if token is not None)

    @cached_property
    def _end_of_turn(self) -> int | None:
        """The special token that the template writes after a reply, if any (`asyncrl.models.loading.end_of_turn`)."""
        if self._resolved != "chat":
            return None
        try:
            text = self.render([*_EXCHANGE, {"role": "user", "content": "!"}])
        except Exception:  # a template that takes no conversation like this
            return None
        after = self._tokens(text.partition(_REPLY)[2].lstrip())
        known = getattr(self.tokenizer, "added_tokens_decoder", {})
        return after[0] if after and after[0] in known and known[after[0]].special else None

    @property
    def _resolved(self) -> Style:
        if self.style != "auto":
            return self.style
        return "chat" if self.tokenizer.chat_template else "plain"

    def _opening(self) -> list[Message]:
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        for question, reply in self.examples:
            messages += [*_messages(question), {"role": "assistant", "content": reply}]
        return messages


def check_messages(given: Any, where: str) -> None:
    """Raises `ValueError` for what is no conversation: templates fail on it far from the data, or leave it out."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"{quote(given)} in {where}, where a text or a list of messages belongs")
    for number, message in enumerate(given):
        says = isinstance(message, dict) and isinstance(message.get("role"), str)
        # Some templates take a content in parts, [{"type": "text", "text": ...}].
        if not says or not (isinstance(message.get("content"), str | list) or message.get("tool_calls")):
            raise ValueError(
                f"message {number} of {where} is {quote(message)}: a message has a role and a content, as in "
                '{"role": "user", "content": "3+4="}'
            )


def messages_of(said: Sequence[Mapping[str, Any]]) -> list[Message]:
    """A conversation in one form, whatever file it came from: no fields without a value, which Parquet adds to every
    message, role and content first, and a content in parts of text as one text."""
    return [_ordered(_without_none(message)) for message in said]


def _ordered(message: dict[str, Any]) -> Message:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        message["content"] = "".join(part.get("text", "") for part in content)
    names = [name for name in ("role", "content") if name in message]
    return {name: message[name] for name in [*names, *sorted(message.keys() - set(names))]}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def _messages(said: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": said}] if isinstance(said, str) else messages_of(said)


def _plain(message: Message) -> str:
    return _LABELS.get(message["role"], "") + message["content"]
