"""Conversations of several turns: `messages` with role and content, or ShareGPT's `conversations` with from and value.

Tool calls, the results of tools, and reasoning are kept for the chat template. Images and parts that are no text, which
no template shows, make the row unusable, so that half a turn is never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ray_peft.tasks.llm_sft.conversation import REASONING, Conversation, Turn, Unusable, WrongShape
from ray_peft.tasks.llm_sft.fields import keys, kind, text_of

_ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system",
    "developer": "system", "tool": "tool", "observation": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip
_TURNS = ("messages", "conversations", "conversation")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_LOSS = ("train", "training", "loss")
"""Fields of a turn that other trainers read as `weight` if they are true or false."""


def messages(row: Mapping[str, Any]) -> Conversation:
    """A conversation: messages with role and content, as in Tulu v2 and UltraChat; empty turns are dropped.

    System text is put at the start of the user turn that it follows or, if that is answered already, of the next one. A
    column `system` opens the conversation. System text after the last answer is dropped, and so are the turns after the
    last answer that is trained on (`weight: 0` marks those that are not).

    Raises:
        WrongShape: the turns are no list of mappings with role and text.
        Unusable: roles that do not alternate, or what no chat template shows.
    """
    turns, field = _raw_turns(row)
    written = _Writer(text_of(row, "system", default=""))
    for index, message in enumerate(turns):
        place = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise WrongShape(
                f"{place} must be a mapping with role and content (found {kind(message)})",
                f"a turn of {field} is no mapping",
            )
        role = _role(message, place)
        written.add(_turn(message, role), _is_trained(message))
    return written.conversation(_tools(row))


class _Writer:
    """Puts turns in order as they come."""

    def __init__(self, system: str) -> None:
        self._turns: list[Turn] = []
        self._untrained: set[int] = set()
        self._system = system
        """System text that waits for the next user turn."""

    def add(self, turn: Turn, trained: bool) -> None:
        role, content = turn["role"], turn["content"]
        if role == "system":
            self._instruct(content)
            return
        if not content and len(turn) == 2 and role != "tool":
            return
        if role == "user" and self._system:
            turn["content"], self._system = f"{self._system}\n\n{content}", ""
        if role == "assistant" and not trained:
            self._untrained.add(len(self._turns))
        self._turns.append(turn)

    def conversation(self, tools: tuple[dict[str, Any], ...]) -> Conversation:
        """The turns up to the last answer that is trained."""
        _check_order(self._turns)
        answers = {index for index, turn in enumerate(self._turns) if turn["role"] == "assistant"}
        if answers == self._untrained:
            raise Unusable("every answer has weight 0")
        end = max(answers - self._untrained) + 1
        untrained = frozenset(index for index in self._untrained if index < end)
        return Conversation(tuple(self._turns[:end]), tools=tools, untrained=untrained)

    def _instruct(self, content: str) -> None:
        before = self._turns[-1]["role"] if self._turns else ""
        if not content or content == self._system:
            return
        if before == "user":
            self._turns[-1]["content"] = f"{content}\n\n{self._turns[-1]['content']}"
        elif before == "tool":
            raise Unusable("system text between a tool's result and the answer")
        else:
            self._system = f"{self._system}\n\n{content}" if self._system else content


def _raw_turns(row: Mapping[str, Any]) -> tuple[Sequence[object], str]:
    """The turns as they stand, and the field that holds them."""
    if any(row.get(field) for field in _MEDIA):
        raise Unusable("images, audio or video beside the text")
    field = next((field for field in _TURNS if row.get(field) is not None), _TURNS[0])
    turns = row.get(field)
    if not isinstance(turns, list):
        reason = f"field 'messages' must be a list (found {kind(turns)}"
        raise WrongShape(f"{reason}; the row has {keys(row)})", f"{reason})")
    return turns, field


def _role(message: Mapping[str, Any], place: str) -> str:
    name = "role" if message.get("role") is not None else "from"
    role = _ROLES.get(str(message.get(name, "")).strip().lower())
    if role is None:
        name = name if name in message else "role"
        reason = f"role is {message.get(name)!r}; known are {', '.join(_ROLES)}"
        raise WrongShape(f"{place}.{reason.replace('role', name, 1)}", reason)
    return role


def _turn(message: Mapping[str, Any], role: str) -> Turn:
    """The turn that a chat template gets."""
    if any(message.get(field) for field in _MEDIA):
        raise Unusable("images, audio or video beside the text")
    calls = _calls(message)
    if str(message.get("from", "")).strip().lower() == "function_call":
        return {"role": role, "content": "", "tool_calls": _as_calls(message.get("value"))}
    turn: Turn = {"role": role, "content": _content(message, calls is not None)}
    if role == "tool":
        turn |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    if calls is not None:
        if role != "assistant":
            raise Unusable("tool calls in a turn that is not the assistant's")
        turn["tool_calls"] = calls
    for key in REASONING if role == "assistant" else ():
        if isinstance(message.get(key), str) and message[key].strip():
            turn[key] = message[key].strip()
            break
        if message.get(key) and not isinstance(message[key], str | bool):
            raise Unusable("reasoning that is no text")
    return turn


def _content(message: Mapping[str, Any], has_calls: bool) -> str:
    field = "value" if "value" in message and "content" not in message else "content"
    parts = message.get(field)
    if isinstance(parts, list):
        return "".join(map(_part, parts)).strip()
    return text_of(message, field, default="" if has_calls else None)


def _part(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    type_name = part.get("type") if isinstance(part, Mapping) else kind(part)
    raise Unusable(f"a part of type {type_name}, where text alone is trained")


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tool calls of a turn; None if it has none."""
    value = message.get("tool_calls") or message.get("function_call")
    return _as_calls(value) if value else None


def _as_calls(value: object) -> list[dict[str, Any]]:
    """One call or several, also as JSON text, as chat templates take them."""
    value = _from_json(value)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise Unusable("a tool call without name and arguments")
    return [_call(call) for call in calls]


def _call(call: object) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call without name and arguments")
    arguments = _from_json(function.get("arguments", function.get("parameters")))
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise Unusable("a tool call whose arguments are no JSON object")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The functions that the row offers."""
    value = _from_json(row.get("tools") or row.get("functions"))
    if not value:
        return ()
    tools = value if isinstance(value, list) else [value]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise Unusable("tools that are no list of functions")
    return tuple(
        _without_none(tool if "function" in tool else {"type": "function", "function": tool}) for tool in tools
    )


def _without_none(value: Any) -> Any:
    """The value without keys of None: columnar files give every object the keys of all."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _from_json(value: object) -> Any:
    """What JSON text means; other values, and text that is no JSON, as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _is_trained(message: Mapping[str, Any]) -> bool:
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise Unusable("a weight other than 0 and 1")
    return weight != 0 and all(message.get(field) is not False for field in _LOSS)


def _check_order(turns: Sequence[Turn]) -> None:
    """Roles alternate; between two turns of the assistant, tools may answer.

    Raises:
        Unusable: they do not.
    """
    if not turns:
        raise Unusable("no turns")
    if turns[0]["role"] != "user":
        raise Unusable("does not start with the user")
    if turns[-1]["role"] != "assistant":
        raise Unusable("does not end with the assistant")
    for before, after in zip(turns, turns[1:], strict=False):
        if after["role"] == "tool" and before["role"] == "user":
            raise Unusable("a tool's result that follows the user")
        if before["role"] == after["role"] != "tool":
            raise Unusable("roles do not alternate")
