"""Recipes: one row of a data set -> a conversation (or plain text), by the field rules of its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Turn = dict[str, str]
"""{"role": "user" | "assistant", "content": text}"""

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate, start with the user and end with the assistant; or `text` alone."""

    turns: tuple[Turn, ...] = ()
    text: str | None = None


class WrongShape(Exception):
    """A row lacks what its recipe reads; the text names the field."""


class Unusable(Exception):
    """A row of the right shape has nothing to learn from; the text is the reason under which it is counted."""


def alpaca(row: Mapping[str, Any]) -> Conversation:
    """Stanford Alpaca: instruction, input (appended as "Input: ..." when there is one), output."""
    question = _text(row, "instruction")
    extra = _text(row, "input", default="")
    return _pair(f"{question}\n\nInput: {extra}" if extra else question, _text(row, "output"))


def dolly(row: Mapping[str, Any]) -> Conversation:
    """Databricks Dolly: instruction, context (put after the instruction when there is one), response."""
    question = _text(row, "instruction")
    context = _text(row, "context", default="")
    return _pair(f"{question}\n\n{context}" if context else question, _text(row, "response"))


def prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """One question and one answer: prompt, completion."""
    return _pair(_text(row, "prompt"), _text(row, "completion"))


def messages(row: Mapping[str, Any]) -> Conversation:
    """A conversation: messages with role and content, as in Tulu v2 and UltraChat; empty turns are dropped.

    System text is put before the user turn that it stands behind or, if that is answered already, before the next one:
    before the first user turn where it opens the conversation. After the last answer it instructs nothing and goes.
    """
    found = row.get("messages")
    if not isinstance(found, list):
        raise WrongShape(f"field 'messages' must be a list (found {_kind(found)}; the row has {_keys(row)})")
    turns: list[Turn] = []
    system = ""
    for index, message in enumerate(found):
        if not isinstance(message, Mapping):
            raise WrongShape(f"messages[{index}] must be a mapping with role and content (found {_kind(message)})")
        role = _ROLES.get(str(message.get("role", "")).strip().lower())
        if role is None:
            raise WrongShape(f"messages[{index}].role is {message.get('role')!r}; known are {', '.join(_ROLES)}")
        content = _text(message, "content")
        if not content:
            continue
        if role == "system" and turns and turns[-1]["role"] == "user":
            turns[-1]["content"] = f"{content}\n\n{turns[-1]['content']}"
            continue
        if role == "system":
            system = f"{system}\n\n{content}" if system else content
            continue
        if role == "user" and system:
            content, system = f"{system}\n\n{content}", ""
        turns.append({"role": role, "content": content})
    return Conversation(turns=tuple(_checked(turns)))


def text(row: Mapping[str, Any]) -> Conversation:
    """Plain text without turns: text."""
    content = _text(row, "text")
    if not content:
        raise Unusable("empty text")
    return Conversation(text=content)


RECIPES: dict[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "alpaca": alpaca,
    "dolly": dolly,
    "tulu": messages,
    "ultrachat": messages,
    "messages": messages,
    "prompt_completion": prompt_completion,
    "text": text,
}


def _pair(question: str, answer: str) -> Conversation:
    if not question:
        raise Unusable("empty question")
    if not answer:
        raise Unusable("empty answer")
    return Conversation(turns=({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def _checked(turns: list[Turn]) -> list[Turn]:
    if not turns:
        raise Unusable("no turns")
    if turns[0]["role"] != "user":
        raise Unusable("does not start with the user")
    if turns[-1]["role"] != "assistant":
        raise Unusable("does not end with the assistant")
    if any(first["role"] == second["role"] for first, second in zip(turns, turns[1:], strict=False)):
        raise Unusable("roles do not alternate")
    return turns


def _text(row: Mapping[str, Any], field: str, default: str | None = None) -> str:
    value = row.get(field, default)
    if value is None and field in row:
        return ""  # null is how many files write an empty field
    if not isinstance(value, str):
        raise WrongShape(f"field {field!r} must be text (found {_kind(value)}; the row has {_keys(row)})")
    return value.strip()


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "no fields"
